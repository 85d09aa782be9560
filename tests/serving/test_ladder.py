"""The ladder steps down before answers are late, up when there is room, and does not flutter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vla_pruner.serving.ladder import Ladder, Rung
from vla_pruner.serving.policy import ServedPolicy

RUNGS = [Rung("none", 1.0, 100), Rung("vla-pruner", 0.5, 70), Rung("vla-pruner", 0.25, 50)]


def drive(ladder: Ladder, load: float, answers: int, noise: float = 0.0) -> list[int]:
    """Rungs while every answer takes `load` times what its rung was tuned at."""
    random, seen = np.random.default_rng(0), []
    for _ in range(answers):
        ladder.observe(load * ladder.rung.p99_ms / 1000 * (1 + noise * random.standard_normal()))
        seen.append(ladder.at)
    return seen


def test_it_steps_down_rung_by_rung_until_answers_are_in_time() -> None:
    ladder = Ladder(RUNGS, deadline_s=0.12)
    assert set(drive(ladder, 1.0, 300)) == {0}
    assert drive(ladder, 1.3, 300)[-1] == 1
    assert drive(ladder, 2.0, 300)[-1] == 2
    assert set(drive(ladder, 5.0, 300)) == {2}


def test_it_steps_up_when_the_rung_above_would_be_in_time() -> None:
    ladder = Ladder(RUNGS, deadline_s=0.12)
    drive(ladder, 2.0, 300)
    assert ladder.at == 2
    assert drive(ladder, 0.5, 1000)[-1] == 0


@pytest.mark.parametrize("load", [1.05, 1.15, 1.3, 1.5])
def test_it_does_not_flutter(load: float) -> None:
    changes = np.abs(np.diff(drive(Ladder(RUNGS, deadline_s=0.12), load, 5000, noise=0.05)))
    assert changes.sum() <= 9


def test_a_rung_that_was_climbed_too_early_is_tried_ever_more_rarely() -> None:
    ladder = Ladder([Rung("none", 1.0, 51), Rung("fastv", 0.5, 50)], 0.1, patience=20, least=4)
    down = []
    for number in range(4000):  # The receipt is wrong: above, it takes twice as long.
        if ladder.observe(0.095 if ladder.at == 0 else 0.05) < 0:
            down.append(number)
    gaps = np.diff(down)
    assert len(gaps) > 3 and (gaps[1:] > 1.5 * gaps[:-1]).all()


@pytest.mark.parametrize("wrap", [lambda rungs: rungs, lambda rungs: {"rungs": rungs, "more": 1}])
def test_only_rungs_that_the_receipt_allows_are_used(tmp_path: Path, wrap: Any) -> None:
    entries = [
        {"method": "vla-pruner", "keep": 0.25, "p99_ms": 50, "allowed": True},
        {"method": "vla-pruner", "keep": 0.125, "p99_ms": 40, "allowed": False},
        {"method": "vla-pruner", "keep": 0.0625, "p99_ms": 30},
        {"method": "none", "keep": None, "p99_ms": 100.5, "allowed": True},
        {"method": "fastv", "keep": 0.25, "p99_ms": 60, "allowed": True},
    ]
    file = tmp_path / "receipt.json"
    file.write_text(json.dumps(wrap(entries)), "utf-8")
    ladder = Ladder.read(file, 0.1)
    assert [rung.name for rung in ladder.rungs] == ["none", "vla-pruner@0.25"]


def test_a_receipt_of_tune_is_read_and_compared_with_the_policy(tmp_path: Path) -> None:
    def rung(method: str, keep: Any, p99: float | None, allowed: bool) -> dict[str, Any]:
        return {"method": method, "keep": keep, "options": {}, "p50_ms": p99, "p99_ms": p99,
                "deviation": 0.1, "allowed": allowed}  # fmt: skip

    receipt = {
        "kind": "vla-pruner tune",
        "schema": 1,
        "policy": {"name": "mini-oft", "weights": "abc"},
        "tolerance": 0.2,
        "recommended": "vla-pruner@0.5",
        "ladder": [
            rung("none", 1.0, None, True),
            rung("vla-pruner", 0.5, None, True),
            rung("vla-pruner", 40, None, True),
            rung("vla-pruner", 0.125, None, False),
        ],
        "environment": {},
    }
    (tmp_path / "receipt.json").write_text(json.dumps(receipt), "utf-8")
    for path in (tmp_path, tmp_path / "receipt.json"):
        ladder = Ladder.read(path, 0.1, weights="abc", patience=20)
        assert [rung.name for rung in ladder.rungs] == ["none", "vla-pruner@0.5", "vla-pruner@40"]
    for _ in range(30):
        ladder.observe(0.2)
    assert ladder.at == 2
    for _ in range(300):
        ladder.observe(0.001)
    assert ladder.at == 0
    with pytest.raises(ValueError, match=r"weights abc, these are xyz: run `vla-pruner tune`"):
        Ladder.read(tmp_path, 0.1, weights="xyz")
    (tmp_path / "receipt.json").write_text(
        json.dumps([{"method": "fastv", "keep": 0.5, "p99_ms": 9, "allowed": True}]), "utf-8"
    )
    with pytest.raises(ValueError, match="does not say of which policy"):
        Ladder.read(tmp_path, 0.1, weights="abc")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"ladder": []}', "no receipt of"),
        ("{", "cannot be read as a receipt"),
        ("{}", "holds no list of rungs"),
        ("[]", "allows no rung"),
        ("[1]", "a rung is"),
        ('[{"method": "fastv", "keep": 0.5}]', "a rung is"),
        ('[{"method": "fastv", "keep": 0.5, "p99_ms": 9, "allowed": false}]', "allows no rung"),
        ('[{"method": "fastv", "keep": 2, "p99_ms": 9, "allowed": true}]', r"a share in \(0, 1\]"),
        ('[{"method": "fastv", "keep": 0.5, "p99_ms": NaN, "allowed": true}]', "p99_ms above 0"),
        ('[{"method": "fastv", "keep": 0.5, "p99_ms": "9", "allowed": true}]', "p99_ms above 0"),
        ('[{"method": 3, "keep": 0.5, "p99_ms": 9, "allowed": true}]', "needs a method"),
    ],
)
def test_a_receipt_that_is_none_is_refused(tmp_path: Path, content: str, said: str) -> None:
    file = tmp_path / "receipt.json"
    file.write_text(content, "utf-8")
    with pytest.raises(ValueError, match=said):
        Ladder.read(file, 0.1)
    with pytest.raises(ValueError, match="cannot be read"):
        Ladder.read(tmp_path / "nowhere", 0.1)


def test_rungs_and_deadlines_that_make_no_ladder_are_refused() -> None:
    for rungs, deadline in ((RUNGS[::-1], 0.1), ([], 0.1), (RUNGS, 0.0), (RUNGS, float("nan"))):
        with pytest.raises(ValueError, match=r"ladder|rungs"):
            Ladder(rungs, deadline)


# -- budgets of a real policy --------------------------------------------------------------------


def observation(oft: Any, seed: int) -> dict[str, Any]:
    from wire import message

    sent = message(seed)
    return {
        "images": list(sent["images"].values()),
        "instruction": "pick up the can",
        "proprio": sent["states"],
    }


def test_another_budget_goes_on_with_what_episodes_remember(oft: Any) -> None:
    pytest.importorskip("vla_eval", reason="vla-eval is missing: pip install 'vla-pruner[serve]'")
    served = ServedPolicy(oft, "vla-pruner", keep=0.5, unnorm_key="pick_place")
    try:
        episode = served.start("a")
        seen = [observation(oft, seed) for seed in range(9)]
        kept = []
        for step, rung in enumerate([None, None, None, None, (0.25), (1.0), "none", (0.5)]):
            if rung is not None:
                method = "none" if rung == "none" else "vla-pruner"
                served.change(method, 1.0 if rung == "none" else float(rung))
            (done,) = served.step([episode], [seen[step]])
            kept.append((done.warm_up, done.keep))
        assert kept == [
            (True, 1.0), (True, 1.0), (True, 1.0), (False, 0.5), (False, 0.25), (False, 1.0),
            (False, 1.0), (False, 0.5),
        ]  # fmt: skip
        before = served.session
        with pytest.raises(ValueError, match="fastvv"):
            served.change("fastvv", 0.5)
        assert served.session is before and before.attached
        served.change("fastv", 0.5)
        assert not served.step([episode], [seen[0]])[0].warm_up
        served.change("vla-pruner", 0.5)
        assert served.step([episode], [seen[0]])[0].warm_up, "FastV remembered nothing"
    finally:
        served.close()


def test_a_session_knows_whether_the_next_step_runs_on_all_tokens(oft: Any) -> None:
    pytest.importorskip("vla_eval", reason="vla-eval is missing: pip install 'vla-pruner[serve]'")
    for method, wanted in (("vla-pruner", [True] * 3 + [False] * 2), ("fastv", [False] * 5)):
        served = ServedPolicy(oft, method, keep=0.5, unnorm_key="pick_place")
        try:
            episode, told, was = served.start("a"), [], []
            for step in range(5):
                told.append(served.warm_up(episode))
                (done,) = served.step([episode], [observation(oft, step)])
                was.append(done.warm_up)
                assert done.warm_up_next == served.warm_up(episode)
            assert told == was == wanted
        finally:
            served.close()
