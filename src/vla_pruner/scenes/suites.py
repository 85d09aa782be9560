"""The suites that `--suite` understands, by name."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import FunctionType

from vla_pruner._short import short
from vla_pruner.scenes.clock import read_clock
from vla_pruner.scenes.perturb import PERTURBATIONS, PerturbedScene
from vla_pruner.scenes.scene import Suite

PICK_PLACE = "robosuite_pickplace"


def pick_place() -> Suite:
    """Pick and place by language, the task of the policies that ship with the package.

    Raises:
        ImportError: the simulator is not installed.
    """
    from vla_pruner.scenes import pick_place as scene

    return Suite(
        name=PICK_PLACE,
        open_scene=scene.PickPlaceScene,
        cameras=scene.CAMERAS,
        seeds=scene.EVALUATION_SEEDS,
        tasks=scene.OBJECT_NAMES,
        step_limit=scene.STEP_LIMIT,
        hz=scene.CONTROL_HZ,
    )


def _libero(name: str) -> Suite:
    """A suite of vla-eval, which is imported when it is asked for."""
    from vla_pruner.scenes.vla_eval import libero

    return libero(name)


SUITES: dict[str, Callable[[], Suite]] = {
    PICK_PLACE: pick_place,
    **{
        name: partial(_libero, name)
        for name in ("libero_spatial", "libero_object", "libero_goal", "libero_10")
    },
}
"""What `--suite` understands, besides `MODULE:FUNCTION` of a function that gives a `Suite`."""


def open_suite(name: str) -> Suite:
    """The suite called `name`, with what is changed of it: `SUITE+camera`, `SUITE+live5:200ms`.

    Raises:
        ValueError: there is none, what the name leads to is no suite, or the change is not known.
        ImportError: its simulator is not installed.
        FileNotFoundError: latencies are to come from a file that is not there.
    """
    base, *changes = name.split("+")
    suite = _open_base(base)
    for change in changes:
        suite = replace(_changed(suite, change), name=f"{suite.name}+{change}")
    return suite


def _changed(suite: Suite, change: str) -> Suite:
    if change.startswith("live"):
        if suite.clock is not None:
            raise ValueError(f"{suite.name}+{change}: the clock is set twice")
        return replace(suite, clock=read_clock(change, suite.hz))
    if change not in PERTURBATIONS:
        raise ValueError(
            f"{suite.name}+{short(change)}: there are {', '.join(PERTURBATIONS)}, and live"
        )
    if suite.base != PICK_PLACE:
        raise ValueError(f"--perturb {change}: only {PICK_PLACE} can be perturbed")
    if suite.name != suite.base:
        raise ValueError(f"{suite.name}+{change}: name one perturbation, and live behind it")
    return replace(suite, open_scene=partial(PerturbedScene, change))


def _open_base(name: str) -> Suite:
    if name in SUITES:
        return SUITES[name]()
    module, _, attribute = name.partition(":")
    if name.startswith("simpler"):
        raise ValueError(
            f"{short(name)} does not run in this process: SIMPLER draws with SAPIEN, which needs a "
            "Vulkan device and an environment of its own. Serve the policy with `vla-pruner serve "
            "--benchmark simpler-google` and let `vla-eval run` evaluate it (docs/serving.md)"
        )
    if not attribute:
        raise ValueError(
            f"no suite is called {short(name)}; there are {', '.join(SUITES)}, or give your own as "
            "MODULE:FUNCTION"
        )
    if not all(part.isidentifier() for part in module.split(".")):
        raise ValueError(
            f"suite {short(name)}: {short(module)} is no module; write PACKAGE.MODULE:FUNCTION"
        )
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except ModuleNotFoundError as error:
        if error.name is not None and (module + ".").startswith(error.name + "."):
            raise ValueError(f"suite {short(name)}: there is no module {module}") from error
        raise
    if found is None:
        raise ValueError(f"suite {short(name)}: module {module} has no {short(attribute)}")
    if isinstance(found, Suite):
        return found
    # Nothing is called that could not be meant: YAML may name any function of any module.
    if not isinstance(found, FunctionType | partial):
        raise ValueError(
            f"suite {short(name)} is {short(found)}; expected a Python function that gives a "
            "vla_pruner.scenes.scene.Suite"
        )
    try:
        inspect.signature(found).bind()
    except TypeError as error:
        raise ValueError(
            f"suite {short(name)}: {error}; expected a function that is called without arguments"
        ) from None
    suite = found()
    if not isinstance(suite, Suite):
        raise ValueError(
            f"suite {short(name)} gave {short(suite)} instead of a vla_pruner.scenes.scene.Suite"
        )
    return suite
