"""The whole tuning: rows, what is allowed and recommended, the receipt, the command."""

import argparse
import json
import re
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from toy_task import save_policy, toy_task
from vla_pruner import cli
from vla_pruner.commands import tune as command
from vla_pruner.runs.job import fingerprint
from vla_pruner.serving.ladder import Ladder
from vla_pruner.tuning.deviation import compare
from vla_pruner.tuning.expectation import shipped_expectation
from vla_pruner.tuning.receipt import ladder_rows, load_receipt, receipt_of, save_receipt
from vla_pruner.tuning.replay import answer
from vla_pruner.tuning.sources import Source
from vla_pruner.tuning.tune import BASELINE, conditions_of, tune

METHODS = [
    "vla-pruner@0.5:layer=1:window=1",
    "vla-pruner@0.125:layer=1:window=1",
    "random@4:layer=1",
]


@pytest.fixture(scope="module")
def source(episodes):
    return Source("npz", tuple(episodes))


@pytest.fixture(scope="module")
def found(policy, source):
    return tune(
        policy, conditions_of(METHODS, []), source, execute=2, tolerance=0.5, rounds=1, timed=1
    )


def receipt(found, source, policy):
    return receipt_of(
        found,
        source,
        policy="toy",
        weights=fingerprint(policy),
        device="cpu",
        unnorm_key=None,
        seen="here",
    )


# -- rows ------------------------------------------------------------------------------------------


def test_rows_say_what_each_condition_did(policy, source, found):
    assert [row.condition.name for row in found.rows] == ["none", *METHODS]
    full = answer(policy, BASELINE, source.episodes)
    assert found.rows[0].deviation.mean == 0 and found.rows[0].flops == 1
    for row in found.rows[1:]:
        pruned = answer(policy, row.condition, source.episodes)
        calls = [
            compare(a.actions, b.actions, found.scale) for a, b in zip(full, pruned, strict=True)
        ]
        moved = np.concatenate([one.moved for one in calls])
        assert row.deviation.mean == pytest.approx(moved.mean())
        macs = [call for one in pruned for call in one.calls]
        assert row.flops == sum(c.prefill_macs for c in macs) / sum(c.full_macs for c in macs) < 1
        assert row.expected == shipped_expectation().at(row.deviation.mean)
    assert [row.visual for row in found.rows] == [(32, 32), (32, 16), (32, 4), (32, 4)]
    assert [row.deviation.warm_up for row in found.rows] == [0, 0.2, 0.2, 0]
    assert all(row.latency.p50_ms > 0 for row in found.rows)


def test_the_cheapest_within_the_tolerance_is_recommended(policy, source, found):
    bounds = [row.deviation.high for row in found.rows]
    assert all(row.allowed == (bound <= 0.5) for row, bound in zip(found.rows, bounds, strict=True))
    for tolerance in (1e-9, bounds[1], max(bounds)):
        again = tune(
            policy, conditions_of(METHODS, []), source, execute=2, tolerance=tolerance, rounds=0
        )
        allowed = [row for row, bound in zip(again.rows, bounds, strict=True) if bound <= tolerance]
        assert again.recommended.flops == min(row.flops for row in allowed)
    assert again.recommended.condition.name == METHODS[2]
    assert all(row.latency is None for row in again.rows)


def test_everything_that_does_not_fit_is_named_before_anything_is_replayed(source, policy):
    wrong = conditions_of(["fastv@0.5:layer=99", "fastv@0.5:layer=1", "random@900:layer=1"], [])
    started = []
    with pytest.raises(ValueError, match=r"(?s)nothing was.*layer=99.*random@900") as error:
        tune(policy, wrong, source, execute=2, tolerance=0.1, on_start=started.append)
    assert "fastv@0.5:layer=1:" not in str(error.value) and not started


@pytest.mark.parametrize(
    ("methods", "words"),
    [(["none"], "leave 'none' out"), (["fastv", "fastv@0.5"], "fastv@0.5: named twice")],
)
def test_conditions_that_make_no_sense(methods, words):
    with pytest.raises(ValueError, match=words):
        conditions_of(methods, [0.5])


def test_recorded_actions_are_compared_with_the_unpruned_policy(policy, episodes):
    full = answer(policy, BASELINE, episodes)
    first = tuple(one.actions[:, 0] for one in full)
    for change in (0.0, 0.25):
        moved = tuple(one + change for one in first)
        found = tune(
            policy,
            [],
            Source("npz", tuple(episodes), moved),
            execute=2,
            tolerance=0.1,
            rounds=0,
        )
        assert found.recorded == pytest.approx((change / found.scale.spread).mean(), abs=1e-6)


# -- the map ---------------------------------------------------------------------------------------


def test_expected_losses_rise_within_their_bounds():
    table = shipped_expectation()
    assert table.deviation[0] == 0 and list(table.deviation) == sorted(set(table.deviation))
    for curve in (table.loss, table.low, table.high):
        assert list(curve) == sorted(curve) and curve[0] >= 0 and curve[-1] <= 1
        assert len(curve) == len(table.deviation)
    assert all(a <= b <= c for a, b, c in zip(table.low, table.loss, table.high, strict=True))
    assert table.at(0).loss < 0.01 and table.at(0.7).low > 0.3
    assert table.at(99) == table.at(table.deviation[-1])
    middle = (table.deviation[10] + table.deviation[11]) / 2
    assert table.at(middle).loss == pytest.approx((table.loss[10] + table.loss[11]) / 2)
    assert table.at(table.largest(0.1)).loss <= 0.1 < table.at(table.largest(0.1) + 0.01).loss


# -- the receipt -----------------------------------------------------------------------------------


def test_a_receipt_comes_back_as_it_was(policy, source, found, tmp_path):
    values = receipt(found, source, policy)
    save_receipt(values, tmp_path / "receipt.json")
    read = load_receipt(tmp_path)
    assert read == load_receipt(tmp_path / "receipt.json")
    assert read.values == json.loads(json.dumps(values))
    assert (read.policy, read.weights, read.tolerance) == ("toy", fingerprint(policy), 0.5)
    assert read.recommended == found.recommended.condition.name
    rows = ladder_rows(found)
    assert [rung.condition for rung in read.ladder] == [row.condition for row in rows]
    for rung, row in zip(read.ladder, rows, strict=True):
        assert (rung.deviation, rung.allowed) == (row.deviation.mean, row.allowed)
        assert (rung.p50_ms, rung.p99_ms) == (row.latency.p50_ms, row.latency.p99_ms)
    assert read.allowed == tuple(rung for rung in read.ladder if rung.allowed)
    assert read.differences() == []
    read.check(fingerprint(policy))
    with pytest.raises(ValueError, match="these are 0123: run `vla-pruner tune`"):
        read.check("0123")


def test_a_server_steps_through_the_budgets_that_the_receipt_allows(policy, source, tmp_path):
    keeps = ["random@0.5", "random@0.25"]
    found = tune(policy, conditions_of(keeps, []), source, execute=2, tolerance=9, rounds=1)
    values = receipt(found, source, policy)
    save_receipt(values, tmp_path / "receipt.json")
    ladder = Ladder.read(tmp_path, 0.1)
    assert [rung.name for rung in ladder.rungs] == ["none", *keeps]
    assert [rung.p99_ms for rung in ladder.rungs] == [row.latency.p99_ms for row in found.rows]
    values["ladder"][1]["allowed"] = False
    save_receipt(values, tmp_path / "receipt.json")
    assert [rung.name for rung in Ladder.read(tmp_path, 0.1).rungs] == ["none", "random@0.25"]
    values["ladder"][2]["options"] = {"layer": 1}
    save_receipt(values, tmp_path / "receipt.json")
    assert dict(Ladder.read(tmp_path, 0.1).rungs[1].options) == {"layer": 1}


def test_the_ladder_is_of_one_method_from_many_tokens_to_few(policy, source):
    methods = ["random@4:layer=1", "random@16:layer=1", "fastv@8:layer=1", "random@8:layer=1"]
    found = tune(policy, conditions_of(methods, []), source, execute=2, tolerance=99, rounds=0)
    assert found.recommended.condition.name == "random@4:layer=1"
    names = [row.condition.name for row in ladder_rows(found)]
    assert names == ["none", "random@16:layer=1", "random@8:layer=1", "random@4:layer=1"]


DAMAGE = {
    "other kind": ("kind", "vla-pruner bench"),
    "other schema": ("schema", 2),
    "weights": ("policy", "weights", None),
    "tolerance": ("tolerance", "0.1"),
    "empty ladder": ("ladder", []),
    "no all tokens": ("ladder", 0, "allowed", False),
    "deviation": ("ladder", 1, "deviation", float("nan")),
    "allowed": ("ladder", 1, "allowed", 1),
    "method": ("ladder", 1, "method", "nobody"),
    "keep": ("ladder", 1, "keep", 1.5),
    "latency": ("ladder", 1, "p99_ms", float("inf")),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_receipt_is_refused(damage, policy, source, found, tmp_path):
    values = json.loads(json.dumps(receipt(found, source, policy)))
    *inside, last, bad = DAMAGE[damage]
    place = values
    for key in inside:
        place = place[key]
    place[last] = bad
    (tmp_path / "receipt.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"receipt\.json (is no receipt|has schema 2|is damaged)"):
        load_receipt(tmp_path)


def test_what_is_no_receipt(tmp_path):
    with pytest.raises(FileNotFoundError, match="`vla-pruner tune` makes one"):
        load_receipt(tmp_path)
    (tmp_path / "receipt.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="is no JSON file"):
        load_receipt(tmp_path)


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tiny policy, which says that it was made for the scene without a simulator."""
    folder = tmp_path_factory.mktemp("policy") / "toy"
    save_policy(folder)
    config = json.loads((folder / "config.json").read_text())
    config["control"] = {"suites": ["toy_task:toy_task"], "execute": 2}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def arguments(*words):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(list(map(str, words)))


def tuned(*words, width=160):
    console = Console(record=True, width=width)
    code = command.tune_command(arguments(*words), console=console, find_suite=lambda _: toy_task())
    assert code == 0
    return console.export_text()


def test_one_command_records_replays_and_answers(folder, tmp_path):
    out = tmp_path / "out"
    few = ("--episodes", 2, "--rounds", 1, "--timed", 1)
    text = tuned(folder, "--out", out, "--methods", "vla-pruner", "--tolerance", 9, *few)
    assert "Recommended: vla-pruner, 12.5 %" in text and "by dimension" in text
    rows = [line.split() for line in text.splitlines() if line.strip().startswith("vla-pruner, ")]
    assert [row[1] for row in rows[:3]] == ["50", "25", "12.5"]
    read = load_receipt(out)
    assert [rung.keep for rung in read.ladder] == [1.0, 0.5, 0.25, 0.125]
    assert read.values["observations"]["kind"] == "toy_task:toy_task"
    assert len(list((out / "observations").glob("*.npz"))) == 2
    again = tuned(
        folder, "--out", out, "--tolerance", 1e-9, "--rounds", 0, "--episodes", 2, width=80
    )
    assert "Keep all tokens: no budget stays within a deviation of 1e-09" in re.sub(
        r"\s+", " ", again
    )
    assert (
        load_receipt(out).values["observations"]["digest"] == read.values["observations"]["digest"]
    )
    wide = [line for line in again.splitlines() if len(line) > 80]
    assert [line for line in wide if not line.startswith("written to")] == []


def test_a_dataset_that_lerobot_wrote(folder, tmp_path):
    pytest.importorskip("pyarrow", reason="needs pip install 'vla-pruner[tune]'")
    pytest.importorskip("av", reason="needs pip install 'vla-pruner[tune]'")
    dataset = Path(__file__).with_name("dataset-v3")
    words = ("--observations", dataset, "--cameras", "hand", "front", "--out", tmp_path)
    text = tuned(folder, *words, "--rounds", 0, "--execute", 3, "--keep", 0.5)
    assert "spreads from the recorded actions" in re.sub(r"\s+", " ", text)
    seen = load_receipt(tmp_path).values["observations"]
    assert (seen["kind"], seen["episodes"], seen["calls"]) == ("lerobot v3.0", [0, 1, 2], 8)
    assert seen["unpruned_from_recorded"] > 0


def test_the_picture_shows_what_was_found(found, tmp_path):
    pytest.importorskip("matplotlib", reason="needs pip install 'vla-pruner[tune]'")
    from PIL import Image

    from vla_pruner.tuning.picture import draw

    draw(found, tmp_path / "tune.png", r"a folder $\no \such{sign}$ of TeX")
    with Image.open(tmp_path / "tune.png") as image:
        assert image.width > 1000 and len(image.convert("RGB").getcolors(1 << 20)) > 20


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--episodes", 0], "--episodes 0: must be at least 1"),
        (["--keep", "half"], "--keep half"),
        (["--methods", "nobody"], "nobody"),
        (["--execute", 9], "a chunk of this policy has 4 actions"),
        (["--observations", "/nowhere"], "there is no such folder"),
        (["--gripper-dims", 9], "gripper dimension 9: actions have 7 numbers"),
    ],
)
def test_impossible_arguments(words, sentence, folder, recordings, tmp_path):
    given = ["--observations", recordings] if "--observations" not in words else []
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        tuned(folder, "--out", tmp_path / "out", *given, *words)
    assert not (tmp_path / "out" / "receipt.json").exists()


@pytest.mark.parametrize("policy", ["mini-oft", "mini-openvla", "mini-pi0"])
def test_a_gripper_that_actions_do_not_have_is_refused_before_weights_are_read(policy, tmp_path):
    arguments = argparse.ArgumentParser()
    command.add_arguments(arguments)
    args = arguments.parse_args([policy, "--gripper-dims", "7", "--out", str(tmp_path / "out")])

    def open_policy(name):
        raise AssertionError("loaded")

    with pytest.raises(ValueError, match="gripper dimension 7: actions have 7 numbers"):
        command.tune_command(args, open_policy=open_policy)


def test_a_folder_with_something_else_is_left_alone(folder, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match=r"holds something else \(thesis\.tex\)"):
        tuned(folder, "--out", tmp_path)


def test_the_command_line_knows_it(folder, recordings, tmp_path, capsys):
    words = [
        folder,
        "--observations",
        recordings,
        "--out",
        tmp_path / "o",
        "--rounds",
        0,
        "--keep",
        0.5,
    ]
    assert cli.main(["tune", *map(str, words)]) == 0
    assert "written to" in capsys.readouterr().out
    assert cli.main(["tune", str(folder), "--observations", str(tmp_path)]) == 2
    assert "holds neither .npz files nor meta/info.json" in capsys.readouterr().err


def test_doctor_reads_the_receipt(folder, recordings, tmp_path, capsys):
    words = ["--observations", recordings, "--out", tmp_path, "--rounds", 0, "--keep", 0.5]
    assert cli.main(["tune", str(folder), *map(str, words)]) == 0
    assert cli.main(["doctor", str(folder), "--receipt", str(tmp_path)]) == 0
    assert "within a deviation of 0.1" in re.sub(r"\s+", " ", capsys.readouterr().out)
    path = tmp_path / "receipt.json"
    path.write_text(path.read_text().replace(load_receipt(path).weights, "0123456789ab"))
    assert cli.main(["doctor", str(folder), "--receipt", str(path)]) == 1
    assert re.search(r"1 of \d+ checks failed", capsys.readouterr().out)
