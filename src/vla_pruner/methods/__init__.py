"""The registry of pruning methods: built-in ones and those of installed packages."""

from __future__ import annotations

import dataclasses
import difflib
import warnings
from importlib.metadata import entry_points
from typing import Any

from vla_pruner._callable import listing_package
from vla_pruner.methods.adp import VLAADP
from vla_pruner.methods.base import (
    Choice,
    Evidence,
    HistorySpec,
    Method,
    ScoreSpec,
    StepContext,
)
from vla_pruner.methods.divprune import DivPrune
from vla_pruner.methods.efficientvla import EfficientVLA
from vla_pruner.methods.fastv import FastV
from vla_pruner.methods.fitprune import FitPrune
from vla_pruner.methods.fixed import Fixed
from vla_pruner.methods.holov import HoloV
from vla_pruner.methods.none import NoPruning
from vla_pruner.methods.pact import PACT
from vla_pruner.methods.random import Random
from vla_pruner.methods.recall import Recall, Reuse
from vla_pruner.methods.sparsevlm import SparseVLM
from vla_pruner.methods.sparsevlm_release import SparseVLMRelease
from vla_pruner.methods.vla_cache import VLACache
from vla_pruner.methods.vla_pruner import VLAPruner
from vla_pruner.methods.vla_pruner_release import VLAPrunerRelease
from vla_pruner.methods.vtw import VTW

__all__ = [
    "Choice",
    "Evidence",
    "HistorySpec",
    "Method",
    "Recall",
    "Reuse",
    "ScoreSpec",
    "StepContext",
    "build",
    "methods",
]

GROUP = "vla_pruner.methods"
_BUILT_IN: tuple[type[Method], ...] = (
    NoPruning,
    Random,
    FastV,
    VLAPruner,
    VLAPrunerRelease,
    SparseVLM,
    SparseVLMRelease,
    DivPrune,
    HoloV,
    VLACache,
    VLAADP,
    PACT,
    EfficientVLA,
    FitPrune,
    VTW,
    Fixed,
)


def methods() -> dict[str, type[Method]]:
    """Every method that can be named: the built-in ones, then those of the entry-point group.

    An installed package registers a subclass of `Method` in the group `vla_pruner.methods`. One
    that cannot be loaded, is no method, or takes a name that is taken is left out with a warning.
    """
    known = {method.name: method for method in _BUILT_IN}
    for entry in entry_points(group=GROUP):
        try:
            loaded = entry.load()
        except Exception as error:
            warnings.warn(f"method {entry.name!r} ({entry.value}) left out: {error}", stacklevel=2)
            continue
        if not (isinstance(loaded, type) and issubclass(loaded, Method)):
            problem = "it is not a subclass of vla_pruner.methods.Method"
        elif entry.name in known:
            problem = "the name is taken"
        else:
            known[entry.name] = loaded
            continue
        warnings.warn(f"method {entry.name!r} ({entry.value}) left out: {problem}", stacklevel=2)
    return known


def build(method: str | Method, **options: Any) -> Method:
    """A method from its name and options.

    Args:
        method: a registered name, or an instance, which takes no further options.
        options: fields of the method; None leaves an option at its default.

    Raises:
        ValueError: an unknown name or option (the message lists the valid ones), or a bad value.
        TypeError: `method` is neither a name nor an instance of `Method`.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if isinstance(method, Method):
        if given:
            raise ValueError(
                f"options {sorted(given)} came with an instance of {type(method).__name__}; "
                "set them where the instance is made, or pass the method by name."
            )
        return method
    if not isinstance(method, str):
        raise TypeError(f"`method` must be a name or an instance of Method; got {method!r}.")
    known = methods()
    if method not in known:
        raise ValueError(f"unknown method {method!r}{_suggest(method, list(known))}")
    chosen = known[method]
    valid = [field.name for field in dataclasses.fields(chosen) if field.init]
    for name in given:
        if name not in valid:
            raise ValueError(f"method {method!r} has no option {name!r}{_suggest(name, valid)}")
    return chosen(**given)


def _suggest(wrong: str, valid: list[str]) -> str:
    close = difflib.get_close_matches(wrong, valid, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return f"{hint} Valid: {', '.join(valid)}."


listing_package(__name__)
