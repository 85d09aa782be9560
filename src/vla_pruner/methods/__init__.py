"""The registry of pruning methods: built-in ones and those of installed packages."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import warnings
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

import numpy as np

from vla_pruner._callable import listing_package
from vla_pruner.methods.adp import VLAADP
from vla_pruner.methods.base import Choice, Evidence, Method, OneCut, ScoreSpec, StepContext
from vla_pruner.methods.cdpruner import CDPruner
from vla_pruner.methods.dart import DART
from vla_pruner.methods.divprune import DivPrune
from vla_pruner.methods.efficientvla import EfficientVLA
from vla_pruner.methods.fastv import FastV
from vla_pruner.methods.fitprune import FitPrune
from vla_pruner.methods.fixed import Fixed
from vla_pruner.methods.holov import HoloV
from vla_pruner.methods.none import NoPruning
from vla_pruner.methods.pact import PACT
from vla_pruner.methods.random import Random
from vla_pruner.methods.scope import SCOPE
from vla_pruner.methods.sparsevlm import SparseVLM
from vla_pruner.methods.sparsevlm_release import SparseVLMRelease
from vla_pruner.methods.team_vla import TEAMVLA
from vla_pruner.methods.vla_pruner import VLAPruner
from vla_pruner.methods.vla_pruner_release import VLAPrunerRelease
from vla_pruner.methods.vtw import VTW
from vla_pruner.pruning.history import HistorySpec

__all__ = [
    "DART",
    "PACT",
    "SCOPE",
    "TEAMVLA",
    "VLAADP",
    "VTW",
    "CDPruner",
    "Choice",
    "DivPrune",
    "EfficientVLA",
    "Evidence",
    "FastV",
    "FitPrune",
    "Fixed",
    "HistorySpec",
    "HoloV",
    "Method",
    "NoPruning",
    "OneCut",
    "Random",
    "ScoreSpec",
    "SparseVLM",
    "SparseVLMRelease",
    "StepContext",
    "VLAPruner",
    "VLAPrunerRelease",
    "build",
    "list_methods",
    "parse",
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
    VLAADP,
    PACT,
    CDPruner,
    TEAMVLA,
    SCOPE,
    DART,
    EfficientVLA,
    FitPrune,
    VTW,
    Fixed,
)
_IN_ROOMS_OF_THEIR_OWN = {
    "safe-pruner": "vla_pruner.temporal.safe_pruner:SAFEPruner",
    "vla-iap": "vla_pruner.temporal.vla_iap:VLAIAP",
    "specprune-vla": "vla_pruner.temporal.specprune:SpecPrune",
    "prefix-reuse": "vla_pruner.temporal.prefix_reuse:PrefixReuse",
    "hiprune": "vla_pruner.towers.hiprune:HiPrune",
    "vla-cache": "vla_pruner.vla_cache.method:VLACache",
}


def list_methods() -> dict[str, type[Method]]:
    """Every method that can be named: the built-in ones, then those of the entry-point group.

    An installed package registers a subclass of `Method` in the group `vla_pruner.methods`. One
    that cannot be loaded, is no method, or takes a name that is taken is left out with a warning.
    """
    known = {method.name: method for method in _BUILT_IN}
    known |= {name: _imported(where) for name, where in _IN_ROOMS_OF_THEIR_OWN.items()}
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


def methods() -> dict[str, type[Method]]:
    """The old name of `list_methods`."""
    warnings.warn(
        "`vp.methods()` is now `vp.list_methods()`; the old call goes in version 0.3.",
        DeprecationWarning,
        stacklevel=3,
    )
    return list_methods()


def parse(text: str) -> tuple[str, dict[str, Any]]:
    """Name and options in a method's short form, `NAME[@KEEP][:OPTION=VALUE ...]`.

    "vla-pruner@0.25" keeps a quarter of the visual tokens, "fastv@64" keeps 64 of them,
    "vla-pruner@0.25:window=1:first=nearest" sets options. A value is a number, true, false, none, a
    list such as (3,5), or a word. The same form is read by `vp.prune`, `--method`, `--conditions`
    and YAML files.

    Raises:
        ValueError: another form.
    """
    head, *rest = text.strip().split(":")
    name, at, keep = head.partition("@")
    options: dict[str, Any] = {}
    if at:
        try:
            options["keep"] = int(keep) if keep.isdecimal() else float(keep)
        except ValueError:
            raise ValueError(
                f"{text!r}: after '@' comes a fraction such as 0.25 or a number of visual tokens "
                "such as 64"
            ) from None
    for option in rest:
        key, sign, said = option.partition("=")
        if not (key and sign and said):
            raise ValueError(
                f"{text!r}: options come after a colon as name=value, such as ':window=1'"
            )
        if key in options:
            raise ValueError(f"{text!r} says {key!r} twice; say it once.")
        options[key] = _value(said)
    return name, options


def _plain(value: Any) -> Any:
    """Numbers of numpy, such as `np.linspace` gives, as those of Python."""
    return value.item() if isinstance(value, np.generic) else value


def _value(said: str) -> Any:
    words = {"none": None, "true": True, "false": False}
    if said.lower() in words:
        return words[said.lower()]
    try:
        return ast.literal_eval(said)
    except (ValueError, SyntaxError):
        return said


def _imported(where: str) -> type[Method]:
    module, _, name = where.partition(":")
    found: type[Method] = getattr(import_module(module), name)
    return found


def build(method: str | Method, **options: Any) -> Method:
    """A method from its name and options.

    Args:
        method: a registered name, the short form that `parse` reads, or an instance, which takes
            no further options.
        options: fields of the method; None leaves an option at its default. `tokens`, the number of
            visual tokens that stay, may stand in the place of `keep`, their share.

    Raises:
        ValueError: an unknown name or option (the message lists the valid ones), or a bad value.
        TypeError: `method` is neither a name nor an instance of `Method`.
    """
    given = {name: _plain(value) for name, value in options.items() if value is not None}
    if isinstance(method, Method):
        if given:
            raise ValueError(
                f"options {sorted(given)} came with an instance of {type(method).__name__}; "
                "set them where the instance is made, or pass the method by name."
            )
        return method
    if not isinstance(method, str):
        raise TypeError(f"`method` must be a name or an instance of Method; got {method!r}.")
    method, said = parse(method)
    if twice := sorted(said.keys() & given.keys()):
        raise ValueError(f"{', '.join(twice)} stand in {method!r} and beside it; say it once.")
    given = _with_budget({**given, **said})
    known = list_methods()
    if method not in known:
        raise ValueError(f"unknown method {method!r}{_suggest(method, list(known))}")
    chosen = known[method]
    valid = [field.name for field in dataclasses.fields(chosen) if field.init]
    for name in given:
        if name not in valid:
            raise ValueError(f"method {method!r} has no option {name!r}{_suggest(name, valid)}")
    return chosen(**given)


def _with_budget(options: dict[str, Any]) -> dict[str, Any]:
    """`tokens` as methods keep it: an integer `keep`."""
    if "tokens" not in options:
        return options
    tokens = options.pop("tokens")
    if "keep" in options:
        raise ValueError(
            f"`keep={options['keep']}` and `tokens={tokens}` both say how many visual tokens stay; "
            "give the share or the number."
        )
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise ValueError(
            f"`tokens={tokens!r}` must be a positive number of visual tokens; a share is `keep`."
        )
    return {**options, "keep": tokens}


def _suggest(wrong: str, valid: list[str]) -> str:
    close = difflib.get_close_matches(wrong, valid, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return f"{hint} Valid: {', '.join(valid)}."


listing_package(__name__)
