"""The scripted expert: reads the goal of a LIBERO task and strings skills together."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from .scene import Joint, LiberoScene
from .skills import Actions, Arm, SkillFailed, middle
from .suites import STEP_LIMITS

_ORDER = {"open": 0, "turnon": 0, "on": 1, "in": 1, "close": 2}
_OPEN_M = 0.05
"""A drawer that is open this far needs no pulling before something is put inside."""
_BESIDE_M = 0.05
"""Two things on one spot stand this far from its middle."""
_PULL_M = 0.11
_PULL_TO_OPEN_M = 0.2


class Expert:
    """Solves the task of `scene` from wherever it stands; privileged, never a policy.

    `seed` draws the grasps of second attempts. `docs/libero.md` says which tasks are beyond it.
    """

    def __init__(self, scene: LiberoScene, seed: int = 0) -> None:
        self.scene = scene
        self.arm = Arm(scene, np.random.default_rng(seed))

    def actions(self) -> Actions:
        """The expert's actions `[7]`, each for the state at which it is asked for.

        They end where the plan ends, or where a skill gave up; whether the task is solved, the
        scene knows.
        """
        try:
            for goal in sorted(self.scene.goals, key=lambda goal: _ORDER.get(goal[0], 1)):
                yield from self._reach(goal)
        except SkillFailed:
            return

    def _reach(self, goal: tuple[str, ...]) -> Actions:
        """Make one predicate of the goal true."""
        scene, arm = self.scene, self.arm
        match goal:
            case ("on" | "in", thing, place):
                drawer = _drawer(scene, place)
                if drawer is not None and drawer.position < _OPEN_M:
                    yield from arm.open_drawer(drawer, _PULL_M, tilt_deg=60)
                yield from arm.pick(thing)
                yield from self._put(thing, place)
            case ("open", place) if drawer := _drawer(scene, place):
                tilt = 60 if "top" in place else 82
                yield from arm.open_drawer(drawer, _PULL_TO_OPEN_M, tilt_deg=tilt)
            case ("close", place) if drawer := _drawer(scene, place):
                yield from arm.close_drawer(drawer)
            case ("turnon", fixture):
                yield from arm.turn_knob(scene.joint(f"{fixture}_button"))
            case _:
                raise SkillFailed(f"there is no skill for {' '.join(goal)}")

    def _put(self, thing: str, place: str) -> Actions:
        """Set the held thing down at a place: an object, or a region of something."""
        scene = self.scene
        base = scene.base_of(place)
        hang = scene.eef()[0][2] - scene.points(thing)[:, 2].min()
        if "basket" in base:
            brim = scene.points(base)[:, 2].max()
            spot = partial(self._over, base)
            release = max(brim - 0.02 + max(hang - 0.09, 0.0), brim + 0.005)
            clear = brim + hang + 0.04
        else:
            spot = partial(self._spot, thing, place, base)
            top = self._top(place, base, spot())
            release = top + hang + 0.008
            clear = max(top + hang + 0.08, scene.eef()[0][2])
        yield from self.arm.place(thing, lambda: np.array([*spot(), release]), clear)

    def _over(self, base: str) -> np.ndarray:
        return middle(self.scene.points(base))

    def _spot(self, thing: str, place: str, base: str) -> np.ndarray:
        """Where `thing` goes `[2]`; two things that share a region go side by side."""
        scene = self.scene
        if place == base:
            return scene.position(base)[:2] if "plate" in base else self._over(base)
        spot = scene.site(place)[:2]
        sharing = [goal[1] for goal in scene.goals if len(goal) > 2 and goal[2] == place]
        if len(sharing) == 2:
            return spot + np.array([0.0, _BESIDE_M if thing == sharing[0] else -_BESIDE_M])
        return spot

    def _top(self, place: str, base: str, spot: np.ndarray) -> float:
        """Height (m) of what the thing will stand on at `spot` [2]."""
        scene = self.scene
        if "table" in base:
            return float(scene.site(place)[2]) + 0.005
        if "plate" in base:
            return float(scene.position(base)[2]) + 0.012
        if "cabinet" in base and "top_side" not in place:
            return float(scene.site(place)[2]) - 0.005
        points = scene.points(base, dense=True)
        near = np.linalg.norm(points[:, :2] - spot, axis=1) < 0.06
        return float(points[near, 2].max())


def solve(scene: LiberoScene, seed: int = 0) -> int:
    """Act until the task is solved; the steps that it took, 0 if it was not."""
    for step, action in enumerate(Expert(scene, seed).actions(), start=1):
        scene.step(action)
        if scene.success():
            return step
        if step == STEP_LIMITS[scene.suite]:
            break
    return 0


def measure(suite: str, tasks: Sequence[int], states: Sequence[int]) -> dict[int, list[int]]:
    """Steps to success, 0 for a failure, from official initial states; printed as they come."""
    found: dict[int, list[int]] = {}
    for task in tasks:
        with LiberoScene(suite, task) as scene:
            found[task] = []
            for state in states:
                scene.reset_official(state)
                found[task].append(solve(scene))
            print(f"{suite} {task}: {found[task]} steps, {scene.instruction}", flush=True)
    return found


def _drawer(scene: LiberoScene, place: str) -> Joint | None:
    """The slide of the drawer that a region such as `wooden_cabinet_1_top_region` names."""
    if "cabinet" in place and place.endswith("_region"):
        return scene.joint(place.removesuffix("_region") + "_level")
    return None
