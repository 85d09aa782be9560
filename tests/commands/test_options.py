"""Arguments that several commands take mean the same in each, and every argument is explained."""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from vla_pruner.cli import COMMANDS, build_parser, main
from vla_pruner.commands import analyze, bench, calibrate, demo, realtime, tune

SHARED = ("--policy", "--device", "--unnorm-key", "--suite", "--methods", "--resume", "--seed")


def actions(word: str) -> list[argparse.Action]:
    parser = argparse.ArgumentParser()
    add_arguments, _ = COMMANDS[word].load()
    add_arguments(parser)
    return parser._actions


def test_what_several_commands_take_is_defined_once() -> None:
    texts: dict[str, set[str]] = defaultdict(set)
    users: dict[str, set[str]] = defaultdict(set)
    for word in COMMANDS:
        for action in actions(word):
            for option in action.option_strings:
                if word == "watch" and option in ("--policy", "--suite"):
                    continue  # which of a run's, not which to run
                texts[option].add(str(action.help))
                users[option].add(word)
    for option in SHARED:
        assert len(users[option]) >= 2, option
        assert len(texts[option]) == 1, option
    acting = {"eval", "sweep", "demo", "analyze", "calibrate", "serve", "tune", "realtime"}
    assert users["--unnorm-key"] == acting
    assert users["--device"] == acting | {"latency", "doctor", "watch", "bench"}


@pytest.mark.parametrize("word", list(COMMANDS))
def test_every_argument_is_explained(word: str) -> None:
    for action in actions(word):
        assert action.help, action.dest


@pytest.mark.parametrize("word", list(COMMANDS))
def test_a_help_shows_defaults_as_they_are_typed(word: str) -> None:
    (commands,) = build_parser(word)._subparsers._group_actions
    said = " ".join(commands.choices[word].format_help().split())
    defaults = re.findall(r"\(default: ([^()]*)\)", said)
    assert not {"None", "False", "[]", ""} & set(defaults), said
    assert not any(found.startswith("[") for found in defaults), said
    for action in actions(word):
        if action.required or action.default in (None, False, "", [], "==SUPPRESS=="):
            continue
        typed = action.default if isinstance(action.default, list) else [action.default]
        assert any(str(typed[0]) in found for found in defaults), action.dest


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["eval", "--out", "o", "--execute", "0"], "0 is no whole number of at least 1"),
        (["eval", "--out", "o", "--execute", "1.5"], "1.5 is no whole number of at least 1"),
        (["eval", "--out", "o", "--time-limit", "nan"], "nan is no number of at least 0.001"),
        (["eval", "--out", "o", "--video", "-1"], "-1 is no whole number of at least 0"),
        (["sweep", "a.yaml", "--out", "o", "--gpus", "inf"], "inf is no number of at least 0"),
        (["latency", "o", "--threads", "0"], "0 is no whole number of at least 1"),
        (["tune", "mini-oft", "--execute", "0"], "0 is no whole number of at least 1"),
        (["tune", "--tolerance", "-1"], "-1 is no number above 0"),
        (["analyze", "--layer", "0"], "0 is no whole number of at least 1"),
        (["bench", "--layers", "0"], "0 is no whole number of at least 1"),
        (["calibrate", "vtw", "--eta", "-0.1"], "-0.1 is no number of at least 0"),
        (["calibrate", "vtw", "--first-seed", "-1"], "-1 is no whole number of at least 0"),
        (["eval", "--out", "o", "--episodes", "0"], "0 is no whole number of at least 1"),
        (["eval", "--out", "o", "--seed", "-1"], "-1 is no whole number of at least 0"),
        (["eval", "--out", "o", "--workers", "1e9"], "1e9 is no whole number of 1 to 4096"),
        (["eval", "--out", "o", "--ray", "here"], "here is no HOST:PORT, nor auto"),
        (["eval", "--out="], "the name is empty"),
        (["eval", "--out", "o", "--latency-of="], "the name is empty"),
        (["tune", "--observations= "], "the name is empty"),
        (["tune", "--rounds", "-1"], "-1 is no whole number of at least 0"),
        (["realtime", "--hz", "nan"], "nan is no number above 0"),
        (["realtime", "--actions-hz", "0"], "0 is no number above 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_numbers_that_mean_nothing_are_refused_before_anything_is_loaded(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2 and re.search(said, capsys.readouterr().err)


@pytest.mark.parametrize(
    "words",
    [
        ["bench", "--model", "mini-oft", "--out", "OUT.json"],
        ["calibrate", "vtw", "--episodes", "1", "--keep", "0.25", "--out", "OUT.json"],
        ["tune", "--out", "OUT"],
        ["demo", "--out", "OUT"],
        ["analyze", "--out", "OUT"],
        ["realtime", "--out", "OUT"],
    ],
    ids=lambda words: words[0],
)
@pytest.mark.parametrize("kind", ["through a file", "taken"])
def test_what_cannot_be_written_to_is_refused_before_anything_is_loaded(
    words: list[str], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """A folder where a file is wanted, a file where a folder is."""
    for module in (bench, calibrate, tune, demo, analyze):
        for name in ("load", "build_workload", "_load", "EpisodeRunner", "Runner"):
            monkeypatch.setattr(module, name, None, raising=False)
    monkeypatch.setattr(realtime, "_trials", None)
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "clients" / "python" / "src"))
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "x" if kind == "through a file" else tmp_path / "taken"
    name = words[-1].replace("OUT", str(out))
    if kind == "taken":
        Path(name).mkdir() if "." in words[-1] else Path(name).touch()
    assert main([*words[:-1], name]) == 2
    assert re.search("in the way|is a folder|is a file|through a file", capsys.readouterr().err)


def test_a_budget_of_the_doctor_is_a_share(capsys: pytest.CaptureFixture[str]) -> None:
    for keep in ("2", "0", "nan", "-0.5"):
        assert main(["doctor", "nothing/there", "--keep", keep]) == 2
        assert "expected a fraction in (0, 1]" in capsys.readouterr().err
    assert main(["doctor", " "]) == 2
    assert "the name of the model is empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("eval --episodes 1000000000 --out OUT", "1000000000 episodes from held-out scene 0"),
        ("eval --seed 1000000000 --out OUT", "50 episodes from held-out scene 1000000000"),
        ("calibrate vtw --keep 0.25 --observations OUT", "no observations"),
        ("calibrate vtw --keep 2 --observations OUT", r"keep=2.0: expected a share in \(0, 1\]"),
        ("calibrate vtw --keep nan --observations OUT", "keep=nan: expected a share"),
        ("calibrate vtw --keep 0.2 --eta 1 --observations OUT", "instead of `keep`"),
        ("calibrate vtw --keep 0.2 --episodes 1 --first-seed 99999999", "not all training scenes"),
        ("calibrate fitprune --observations OUT", "fitprune is calibrated for one budget"),
        ("tune --observations OUT", "OUT': there is no such folder"),
        ("tune --observations HERE", "holds neither .npz files nor meta/info.json"),
        ("tune --observations HERE --cameras a", "--cameras is for LeRobotDatasets"),
        ("tune --cameras a", "--cameras and --instruction say how to read a dataset"),
        ("tune --instruction x", "--cameras and --instruction say how to read a dataset"),
        ("realtime --conditions none none", "something is there twice"),
        ("realtime --conditions fastv@0.5 fastv@0.50", "need different conditions"),
        ("realtime --policy mini-ofd", "no policy that ships here"),
        ("realtime --token abc", "--token is shown to a server that runs"),
        ("realtime --url x --conditions none", "--url x: expected ws://HOST:PORT"),
        ("realtime --url ws://a:1 --conditions none --gripper rlds", "--gripper is for the server"),
        ("realtime --episodes 1000000000", "1000000000 episodes from held-out scene 0"),
        ("demo --capture fast", "--capture fast: there are"),
        ("bench --capture fast", "--capture fast: there are"),
        ("eval --capture fast --out OUT", "--capture fast: there are"),
    ],
)
def test_what_needs_no_policy_is_refused_before_one_is_loaded(
    words: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("something was loaded before the arguments were read")

    monkeypatch.setattr("vla_pruner.models.openvla.from_pretrained", load)
    monkeypatch.setattr("vla_pruner.realtime.served.Served.__init__", load)
    monkeypatch.setattr(bench, "build_workload", load)
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "clients" / "python" / "src"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "HERE").mkdir()
    assert main(words.split()) == 2
    assert re.search(said, capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["HERE"]


def test_a_message_is_short_and_holds_no_commands_for_the_terminal(capsys: Any) -> None:
    assert main(["demo", "--device", "cu\x1b[31mda\rx" + "a" * 100_000]) == 2
    found = capsys.readouterr().err
    assert "\x1b" not in found and "\r" not in found and len(found) < 9000
    with pytest.raises(SystemExit):
        main(["demo", "--episodes", "\x1b[31m" + "9" * 100_000])
    found = capsys.readouterr().err
    assert "\x1b" not in found and len(found) < 12_000
