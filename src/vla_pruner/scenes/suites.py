"""The suites that `--suite` understands, by name."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial

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


def _in_harness(kind: str, name: str) -> Suite:
    """A suite of vla-eval, which is imported when it is asked for."""
    return getattr(importlib.import_module("vla_pruner.scenes.vla_eval"), kind)(name)


_HARNESS = {
    "libero": ("libero_spatial", "libero_object", "libero_goal", "libero_10"),
    "simpler": (
        "simpler_pick_coke_can",
        "simpler_move_near",
        "simpler_open_drawer",
        "simpler_close_drawer",
    ),
}

SUITES: dict[str, Callable[[], Suite]] = {
    PICK_PLACE: pick_place,
    **{
        name: partial(_in_harness, kind, name) for kind, names in _HARNESS.items() for name in names
    },
}
"""What `--suite` understands, besides `MODULE:FUNCTION` of a function that gives a `Suite`."""


def open_suite(name: str) -> Suite:
    """The suite called `name`.

    Raises:
        ValueError: there is none.
        ImportError: its simulator is not installed.
    """
    if name in SUITES:
        return SUITES[name]()
    module, _, attribute = name.partition(":")
    if not attribute:
        raise ValueError(
            f"no suite is called {name!r}; there are {', '.join(SUITES)}, or give your own as "
            "MODULE:FUNCTION"
        )
    suite = getattr(importlib.import_module(module), attribute, None)
    if suite is None:
        raise ValueError(f"suite {name!r}: module {module} has no {attribute!r}")
    return suite()
