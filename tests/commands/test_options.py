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
