"""What `--suite` understands: a name, or a function that gives a suite; nothing else runs."""

import os
import sys
from types import ModuleType

import pytest

from toy_task import toy_task
from vla_pruner.scenes.scene import Suite
from vla_pruner.scenes.suites import open_suite


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module called `mine`."""
    made = ModuleType("mine")
    monkeypatch.setitem(sys.modules, "mine", made)
    return made


def test_a_suite_may_be_a_function_or_a_suite(module: ModuleType) -> None:
    module.make, module.made = lambda: toy_task(), toy_task()
    assert isinstance(open_suite("mine:make"), Suite)
    assert open_suite("mine:made") is module.made


def test_a_function_that_cannot_be_meant_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(os, "getpid", lambda: calls.append(1))
    for name in ("os:abort", "sys:exit", "pathlib:Path", "os:environ"):
        with pytest.raises(ValueError, match=f"suite '{name}' is .*; expected a Python function"):
            open_suite(name)
    assert calls == []


def test_what_a_function_gives_is_checked(module: ModuleType) -> None:
    module.wrong = lambda: ["x" * 10_000] * 1000
    with pytest.raises(ValueError, match=r"suite 'mine:wrong' gave \['xxx.*instead of a") as caught:
        open_suite("mine:wrong")
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "no suite is called 'nowhere'; there are robosuite_pickplace"),
        ("no_such_module:f", "there is no module no_such_module"),
        ("os.path.nothing:f", "there is no module os.path.nothing"),
        ("toy_task:nothing", "module toy_task has no 'nothing'"),
        ("os.path:join", "missing a required argument: 'a'; expected a function that is called"),
        ("./mine.py:suite", "'./mine.py' is no module; write PACKAGE.MODULE:FUNCTION"),
        (":suite", "'' is no module"),
        ("y" * 5000, "no suite is called 'yyy"),
    ],
)
def test_a_wrong_name_is_explained(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        open_suite(name)
    assert len(str(caught.value)) < 500
