"""Arguments that several commands take mean the same in each, and every argument is explained."""

from __future__ import annotations

import argparse
from collections import defaultdict

import pytest

from vla_pruner.cli import COMMANDS

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
    acting = {"eval", "sweep", "demo", "analyze", "calibrate", "serve", "tune"}
    assert users["--unnorm-key"] == acting
    assert users["--device"] == acting | {"latency", "doctor", "watch", "bench"}


@pytest.mark.parametrize("word", list(COMMANDS))
def test_every_argument_is_explained(word: str) -> None:
    for action in actions(word):
        assert action.help, action.dest
