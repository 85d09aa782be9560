"""Suites: scenes kept for evaluation, by name, with what a policy needs to act in them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from vla_pruner.evaluation.episode import Scene

PICK_PLACE = "robosuite_pickplace"


@dataclass(frozen=True)
class Suite:
    """Scenes that no policy was trained on.

    Scene number `seed` is an initial state of task `seed % len(tasks)`.

    Args:
        name: as in `--suite`.
        open_scene: makes the scene; must be a module's function or class if processes are used.
        cameras: cameras of the scene.
        seeds: numbers of the scenes.
        tasks: what is asked for, in words.
        step_limit: an episode fails after this many steps.
        hz: steps in a second of simulated time.
        stand_in_assets: some objects look other than in the published suite, so that success rates
            do not compare with published ones.
    """

    name: str
    open_scene: Callable[[], Scene]
    cameras: tuple[str, ...]
    seeds: Sequence[int]
    tasks: tuple[str, ...]
    step_limit: int
    hz: float
    stand_in_assets: bool = False

    def held_out(self, episodes: int, first: int = 0) -> list[int]:
        """Seeds of `episodes` scenes, from number `first` of the held-out ones.

        Raises:
            ValueError: fewer than one, or more than there are.
        """
        if episodes < 1 or first < 0 or first + episodes > len(self.seeds):
            raise ValueError(
                f"{episodes} episodes from held-out scene {first}: there are {len(self.seeds)} "
                f"scenes, number 0 to {len(self.seeds) - 1}"
            )
        return list(self.seeds[first : first + episodes])

    def task_of(self, seed: int) -> int:
        """Number of the task that scene `seed` asks for."""
        return seed % len(self.tasks)

    def initial_state_of(self, seed: int) -> int:
        """Number of the scene among those of its task."""
        return (seed - self.seeds[0]) // len(self.tasks)


def pick_place() -> Suite:
    """Pick and place by language, the task of the policies that ship with the package.

    Raises:
        ImportError: the simulator is not installed.
    """
    from vla_pruner.reference import scene

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
    return getattr(importlib.import_module("vla_pruner.evaluation.harness"), kind)(name)


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
