"""Methods are found by name, those of other packages included."""

from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import ClassVar

import numpy as np
import pytest

import vla_pruner.methods as registry
from vla_pruner.methods.fastv import FastV

NAMES = ["none", "random", "fastv", "vla-pruner", "vla-pruner-release"]


@dataclass(frozen=True, kw_only=True)
class Mine(FastV):
    """A method of another package."""

    name: ClassVar[str] = "mine"


def install(monkeypatch, *entries: tuple[str, str]) -> None:
    """Pretend that packages with these entry points are installed."""
    made = [EntryPoint(name=name, value=value, group=registry.GROUP) for name, value in entries]
    monkeypatch.setattr(registry, "entry_points", lambda group: made)


def test_the_built_in_methods_are_listed():
    found = registry.list_methods()
    assert list(found)[:5] == NAMES
    assert all(found[name].name == name for name in NAMES)


def test_methods_of_other_packages_are_found(monkeypatch):
    install(monkeypatch, ("mine", f"{__name__}:Mine"))
    assert registry.list_methods()["mine"] is Mine
    assert registry.build("mine", keep=7).keep == 7


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        (("broken", "no_such_package:Method"), "No module named"),
        (("wrong", f"{__name__}:install"), "not a subclass"),
        (("fastv", f"{__name__}:Mine"), "the name is taken"),
    ],
)
def test_a_bad_entry_point_is_left_out_with_a_warning(monkeypatch, entry, problem):
    install(monkeypatch, entry)
    with pytest.warns(UserWarning, match=problem):
        found = registry.list_methods()
    assert list(found) == [*(m.name for m in registry._BUILT_IN), *registry._IN_ROOMS_OF_THEIR_OWN]
    assert found["fastv"] is FastV


def test_an_unknown_method_is_refused_with_a_suggestion():
    with pytest.raises(ValueError, match=r"'vla_pruner'; did you mean 'vla-pruner'\? Valid: none,"):
        registry.build("vla_pruner")
    with pytest.raises(ValueError, match=r"unknown method 'xyz'\. Valid: none, random"):
        registry.build("xyz")


def test_an_unknown_option_is_refused_with_a_suggestion():
    with pytest.raises(ValueError, match=r"no option 'windw'; did you mean 'window'\? Valid: keep"):
        registry.build("vla-pruner", windw=2)
    with pytest.raises(ValueError, match=r"method 'fastv' has no option 'gamma'\. Valid: keep,"):
        registry.build("fastv", gamma=0.5)


def test_an_instance_is_taken_as_it_is():
    method = FastV(keep=0.5)
    assert registry.build(method) is method
    assert registry.build(method, keep=None) is method
    with pytest.raises(ValueError, match=r"\['keep'\] came with an instance of FastV"):
        registry.build(method, keep=0.25)
    with pytest.raises(TypeError, match="instance of Method; got <class"):
        registry.build(FastV)


def test_none_leaves_an_option_at_its_default():
    assert registry.build("vla-pruner", keep=None, layer=None) == registry.build("vla-pruner")


def test_the_short_form_of_a_method():
    assert registry.parse("vla-pruner@0.25:window=1:first=nearest") == (
        "vla-pruner",
        {"keep": 0.25, "window": 1, "first": "nearest"},
    )
    assert registry.parse("fastv@64") == ("fastv", {"keep": 64})
    assert registry.build("vla-pruner@0.5:action_layers=(3,5):refresh=none").action_layers == (3, 5)
    assert registry.build("fastv", tokens=9) == registry.build("fastv@9") == FastV(keep=9)
    for wrong, message in (
        ("fastv@half", "a fraction such as 0.25"),
        ("fastv@0.5:layer", "name=value"),
        ("fastv@0.5:colour=red", "no option 'colour'"),
    ):
        with pytest.raises(ValueError, match=message):
            registry.build(wrong)
    with pytest.raises(ValueError, match="say it once"):
        registry.build("fastv@0.5", keep=0.25)
    with pytest.raises(ValueError, match="both say how many"):
        registry.build("fastv", keep=0.5, tokens=4)
    with pytest.raises(ValueError, match=r"tokens=0\.5"):
        registry.build("fastv", tokens=0.5)


def test_numbers_of_numpy_are_numbers():
    for options in ({"keep": np.float32(0.5)}, {"tokens": np.int64(6)}, {"keep": np.float64(0.5)}):
        made = registry.build("fastv", layer=np.int32(2), **options)
        assert made == registry.build("fastv", layer=2, **{k: v.item() for k, v in options.items()})
        assert type(made.keep) in (int, float) and type(made.layer) is int


def test_an_option_that_is_said_twice_is_refused():
    for text in ("fastv:layer=2:layer=3", "fastv@0.5:keep=0.25"):
        with pytest.raises(ValueError, match="twice; say it once"):
            registry.build(text)
