"""Methods are found by name, those of other packages included."""

from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import ClassVar

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
    found = registry.methods()
    assert list(found)[:5] == NAMES
    assert all(found[name].name == name for name in NAMES)


def test_methods_of_other_packages_are_found(monkeypatch):
    install(monkeypatch, ("mine", f"{__name__}:Mine"))
    assert registry.methods()["mine"] is Mine
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
        found = registry.methods()
    assert list(found) == [method.name for method in registry._BUILT_IN]
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
