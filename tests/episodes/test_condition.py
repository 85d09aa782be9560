"""One grammar for a condition everywhere, and methods of one's own by MODULE:CLASS."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from own_method import FirstTokens
from toy_task import save_policy, tiny_policy
from vla_pruner.cli import main
from vla_pruner.commands.shared.options import keep_of, words_of
from vla_pruner.episodes.condition import Condition, make_method
from vla_pruner.runs.store import Store

OWN = "own_method:FirstTokens"


@pytest.mark.parametrize(
    "text",
    [
        "none",
        "fastv@64",
        "vla-pruner@0.25:window=1",
        "vla-pruner@0.25:first=nearest",
        "vla-pruner@0.25:action_layers=(4,5)",
        "vla-pruner@0.25:action_layers=(5,)",
        f"{OWN}@0.5",
        f"{OWN}@0.5:skip=3",
    ],
)
def test_a_condition_is_read_as_it_is_written(text: str) -> None:
    condition = Condition.parse(text)
    assert condition.name == text
    stored = json.loads(json.dumps(dict(condition.options)))
    assert Condition(condition.method, condition.keep, tuple(stored.items())) == condition
    assert len({condition, Condition.parse(text)}) == 1


def test_a_method_of_ones_own_is_made_with_its_options() -> None:
    condition = Condition.parse(f"{OWN}@0.5:skip=3")
    assert condition.build() == FirstTokens(keep=0.5, skip=3)
    assert make_method(OWN, keep=None) == FirstTokens()
    assert make_method(FirstTokens(keep=4)) == FirstTokens(keep=4)


def test_it_prunes() -> None:
    policy = tiny_policy()
    session = Condition.parse(f"{OWN}@8:skip=2").attach(policy)
    assert session is not None
    with session:
        policy.predict_action([np.zeros((40, 40, 3), np.uint8)] * 2, "pick up", np.zeros(8))
        assert session.last.kept_mask[0].nonzero()[:, 0].tolist() == list(range(2, 10))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no_such_module:A@0.5", "method 'no_such_module:A': No module named 'no_such_module'"),
        ("own_method:Other@0.5", "module own_method has no 'Other'"),
        ("own_method:torch@0.5", "expected a subclass of vla_pruner.methods.Method"),
        ("os:abort@0.5", "expected a subclass of vla_pruner.methods.Method"),
        (f"{OWN}@0.5:jump=1", "unexpected keyword argument 'jump'"),
        (f"{OWN}@1.5", r"not in \(0, 1\]"),
        (f"{OWN}", "write 'none', or a method with what it keeps"),
        (":@0.5", "method ':'"),
        ("fastv@", "after '@' comes a fraction"),
        ("x" * 10_000 + "@0.5", "unknown method"),
    ],
)
def test_a_wrong_condition_is_explained(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Condition.parse(text)


def test_every_command_takes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy = save_policy(tmp_path / "policy")
    out = tmp_path / "run"
    words = ["--policy", policy, "--suite", "toy_task:toy_task", "--episodes", "1"]
    run = ["eval", *words, "--workers", "1", "--out", str(out)]
    assert main([*run, "--conditions", "none", f"{OWN}@0.5:skip=1"]) == 0
    with Store(out) as store:
        assert [item.condition.name for item in store.planned()] == ["none", f"{OWN}@0.5:skip=1"]
    result = tmp_path / "bench.json"
    bench = ["bench", "--model", policy, "--methods", OWN, f"{OWN}@4:skip=1", "--keep", "0.5"]
    assert main([*bench, "--repeats", "1", "--out", str(result)]) == 0
    rows = json.loads(result.read_text())["rows"]
    assert [row["visual"] for row in rows] == [32, 16, 4, 16, 4]  # the last two: their ideals
    analyze = ["analyze", *words, "--methods", OWN, "--out", str(tmp_path / "page")]
    assert main([*analyze, "--layer", "1"]) == 0
    capsys.readouterr()
    assert main(["methods", OWN]) == 0
    assert "tokens at the start that are left out" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("given", ["a,b c", ["a", "b", "c"], ["a,b", "c"], ["a,", "b", ",c"]])
def test_lists_are_apart_by_spaces_or_commas(given: str | list[str]) -> None:
    assert words_of("--methods", given) == ["a", "b", "c"]


def test_a_list_in_an_option_stays_whole() -> None:
    text = "vla-pruner@0.25:action_layers=(4,5):window=1"
    assert words_of("--conditions", f"none,{text},fastv@8") == ["none", text, "fastv@8"]


def test_an_empty_list_or_a_word_that_is_there_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="--methods is empty"):
        words_of("--methods", ["", ","])
    with pytest.raises(ValueError, match="--methods a b a: something is there twice"):
        words_of("--methods", "a,b a")


def test_one_token_and_all_tokens_are_told_apart() -> None:
    assert keep_of("1") == 1 and isinstance(keep_of("1"), int)
    assert keep_of("1.0") == 1.0 and isinstance(keep_of("1.0"), float)
