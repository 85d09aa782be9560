"""The movements of the expert: each skill is a generator of actions that looks at every step.

A skill is closed-loop: its next action follows from where the arm and the things are now, so a
recording may disturb the arm between two actions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
from scipy.spatial.transform import Rotation

from . import grasps
from .grasps import Grasp, half_turn
from .scene import Joint, LiberoScene

OPEN, CLOSE = -1.0, 1.0
Actions = Iterator[np.ndarray]

_GAIN = 12.0
"""Commanded translation per metre of distance; 1 is the fastest."""
_ATTEMPTS = 3
_RISE_M = 0.15
_VESSELS = {"bowl": 0.022, "plate": 0.012, "ramekin": 0.022}
"""Things that are taken by their rim, and how deep (m)."""


class SkillFailed(Exception):
    """A skill could not do its part; the episode will not succeed."""


class Arm:
    """Skills of the arm in a scene.

    Attributes
    ----------
    focus : where the thing is that the arm is busy with `[3]`, as a function: what is to be
        grasped, and once it is held, the place where it goes.
    """

    def __init__(self, scene: LiberoScene, rng: np.random.Generator) -> None:
        self.scene, self._rng = scene, rng
        self._first_rotation = scene.eef()[1]
        self._yaw = 0.0
        self.focus: Callable[[], np.ndarray] = lambda: scene.eef()[0]

    # ------------------------------------------------------------------ moving
    def goto(
        self,
        target: np.ndarray | Callable[[], np.ndarray],
        yaw: float,
        gripper: float,
        *,
        near: float = 0.012,
        turned: float = 0.06,
        steps: int = 70,
        fastest: float = 1.0,
    ) -> Actions:
        """Move the pads' middle to `target` [3], pointing down with `yaw`.

        Ends within `near` metres and `turned` radians of it, or after `steps` steps.
        """
        rotation = self._pointing_down(yaw)
        for _ in range(steps):
            goal = target() if callable(target) else target
            position, current = self.scene.eef()
            if np.linalg.norm(goal - position) < near and _angle(rotation, current) < turned:
                return
            yield self._toward(goal, rotation, gripper, fastest)

    def tilted_goto(
        self,
        target: np.ndarray,
        rotation: np.ndarray,
        gripper: float,
        *,
        near: float,
        steps: int = 90,
        fastest: float = 1.0,
    ) -> Actions:
        """Move to `target` [3] with any orientation of the gripper, `rotation` [3, 3]."""
        for _ in range(steps):
            position, current = self.scene.eef()
            if np.linalg.norm(target - position) < near and _angle(rotation, current) < 0.12:
                return
            yield self._toward(target, rotation, gripper, fastest, turn_limit=0.4)

    def hold(self, steps: int, yaw: float, gripper: float) -> Actions:
        """Stay where the arm is now."""
        here, rotation = self.scene.eef()[0], self._pointing_down(yaw)
        for _ in range(steps):
            yield self._toward(here, rotation, gripper)

    def rise(self, height: float, yaw: float, gripper: float, steps: int = 25) -> Actions:
        """Go straight up by `height` metres."""
        up = self.scene.eef()[0] + [0.0, 0.0, height]
        yield from self.goto(up, yaw, gripper, near=0.03, turned=9, steps=steps)

    # ------------------------------------------------------------------ things
    def pick(self, name: str) -> Actions:
        """Grasp the thing `name` and lift it.

        Raises
        ------
        SkillFailed: it is still down after three attempts.
        """
        scene = self.scene
        self.focus = partial(scene.position, name)
        for attempt in range(_ATTEMPTS):
            grasp = choose_grasp(scene, name, self._rng if attempt else None)
            before = scene.position(name)[2]
            yield from self._descend(grasp, first=attempt == 0)
            yield from self.hold(10, grasp.yaw, CLOSE)
            yield from self.rise(_RISE_M, grasp.yaw, CLOSE, steps=40)
            self._yaw = grasp.yaw
            if scene.position(name)[2] > before + 0.4 * _RISE_M:
                return
        raise SkillFailed(f"{name} could not be lifted in {_ATTEMPTS} attempts")

    def _descend(self, grasp: Grasp, *, first: bool) -> Actions:
        """Go above the grasp with open fingers, then down."""
        x, y, z = grasp.centre
        above = max(grasp.top + 0.07, z + 0.08)
        here = self.scene.eef()[0]
        if here[2] < above - 0.01:
            up = np.array([here[0], here[1], above])
            yield from self.goto(up, 0.0 if first else grasp.yaw, OPEN, near=0.03, turned=9)
        travel = max(above, min(here[2], above + 0.1))
        yield from self.goto(np.array([x, y, travel]), grasp.yaw, OPEN, near=0.02)
        yield from self.goto(np.array([x, y, z + 0.04]), grasp.yaw, OPEN, near=0.008, steps=40)
        yield from self.goto(grasp.centre, grasp.yaw, OPEN, near=0.007, steps=35, fastest=0.6)

    def place(self, name: str, target: Callable[[], np.ndarray], clear: float) -> Actions:
        """Carry the held thing `name` over `target`, lower and release it.

        `target` gives where the middle of the thing goes, and the height of the pads when they let
        go `[3]`; `clear` is the height of the pads at which everything passes below.
        """
        scene, yaw = self.scene, self._yaw
        self.focus = target

        def moved(height: float | None = None) -> np.ndarray:
            goal = target()
            shift = goal[:2] - middle(scene.points(name))
            return np.array([*(scene.eef()[0][:2] + shift), goal[2] if height is None else height])

        here = scene.eef()[0]
        if here[2] < clear - 0.02:
            up = np.array([here[0], here[1], clear])
            yield from self.goto(up, yaw, CLOSE, near=0.03, turned=9)
        yield from self.goto(lambda: moved(clear), yaw, CLOSE, turned=0.1, steps=90)
        yield from self.goto(moved, yaw, CLOSE, near=0.01, turned=0.15, steps=45, fastest=0.6)
        yield from self.hold(6, yaw, OPEN)
        yield from self.rise(0.12, yaw, OPEN)

    # ------------------------------------------------------------------ fixtures
    def open_drawer(self, drawer: Joint, pull: float, tilt_deg: float) -> Actions:
        """Hook the handle with a tilted gripper, pull it by `pull` metres, let go."""
        handle = drawer.handle()
        self.focus = partial(drawer.centre_of, handle)
        outwards = drawer.opening_axis
        rotation = self._facing(outwards, tilt_deg)
        approach = rotation[:, 2]
        grip = self.focus
        lift = np.array([0.0, 0.0, 0.04])
        yield from self.tilted_goto(grip() - 0.12 * approach + lift, rotation, OPEN, near=0.03)
        yield from self.tilted_goto(grip() - 0.02 * approach, rotation, OPEN, near=0.01)
        yield from self.tilted_goto(
            grip() + 0.005 * approach, rotation, OPEN, near=0.008, steps=30, fastest=0.5
        )
        here = self.scene.eef()[0]
        for _ in range(10):
            yield self._toward(here, None, CLOSE)
        yield from self.tilted_goto(
            here + pull * outwards, rotation, CLOSE, near=0.015, steps=60, fastest=0.7
        )
        for _ in range(4):
            yield np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, OPEN])
        away = self.scene.eef()[0] - 0.12 * approach + [0.0, 0.0, 0.1]
        yield from self.tilted_goto(away, rotation, OPEN, near=0.04, steps=40)

    def close_drawer(self, drawer: Joint) -> Actions:
        """Push the handle in with closed fingers, from the front."""
        handle = drawer.centre_of(drawer.handle())
        self.focus = partial(drawer.centre_of, drawer.handle())
        outwards = drawer.opening_axis
        yaw = half_turn(np.arctan2(outwards[1], outwards[0]))
        start = handle + 0.06 * outwards
        here = self.scene.eef()[0]
        above = np.array([start[0], start[1], max(start[2] + 0.2, here[2])])
        yield from self.goto(above, yaw, CLOSE, near=0.03, turned=0.3)
        yield from self.goto(start, yaw, CLOSE, near=0.015, turned=0.3)
        inside = handle - 0.25 * outwards
        yield from self.goto(inside, yaw, CLOSE, turned=9, steps=60, fastest=0.6)
        yield from self.rise(0.2, yaw, OPEN)

    def turn_knob(self, knob: Joint, turn: float = 1.0, enough: float = 0.6) -> Actions:
        """Take a knob between the fingers and turn it by `turn` rad, until it is at `enough`."""
        base = knob.anchor[2]
        upper = [geom for geom in knob.geoms() if knob.centre_of(geom)[2] > base + 0.012]
        points = np.concatenate([knob.points_of(geom) for geom in upper])
        yaws = np.linspace(-np.pi / 2, np.pi / 2, 37)
        widths = np.ptp(points[:, :2] @ np.stack([-np.sin(yaws), np.cos(yaws)]), axis=0)
        yaw = float(yaws[int(np.argmin(widths))])
        if yaw >= 0.3 and yaw - np.pi >= -2:
            yaw -= np.pi  # leaves room for the turn before the wrist's limit
        x, y = middle(points)
        top = points[:, 2].max()
        self.focus = lambda: np.array([x, y, top])
        yield from self.goto(np.array([x, y, top + 0.1]), yaw, OPEN, near=0.02)
        down = np.array([x, y, top - 0.015])
        yield from self.goto(down, yaw, OPEN, near=0.008, steps=40, fastest=0.6)
        yield from self.hold(8, yaw, CLOSE)
        here = self.scene.eef()[0]
        for step in range(45):
            rotation = self._pointing_down(yaw + turn * min(1.0, step / 25))
            yield self._toward(here, rotation, CLOSE)
            if knob.position > enough:
                break
        yield from self.hold(4, yaw + turn, OPEN)
        yield from self.rise(0.12, yaw, OPEN)

    # ------------------------------------------------------------------ inside
    def _pointing_down(self, yaw: float) -> np.ndarray:
        return Rotation.from_euler("z", yaw).as_matrix() @ self._first_rotation

    def _facing(self, outwards: np.ndarray, tilt_deg: float) -> np.ndarray:
        """Rotation of a gripper that is tilted from pointing down towards a front."""
        yaw = half_turn(np.arctan2(outwards[1], outwards[0]) - np.pi / 2)
        side = np.cross(outwards, [0.0, 0.0, 1.0])
        tilts = [
            Rotation.from_rotvec(sign * np.deg2rad(tilt_deg) * side).as_matrix()
            @ self._pointing_down(yaw)
            for sign in (-1, 1)
        ]
        return min(tilts, key=lambda rotation: float(rotation[:, 2] @ outwards))

    def _toward(
        self,
        target: np.ndarray,
        rotation: np.ndarray | None,
        gripper: float,
        fastest: float = 1.0,
        turn_limit: float = 0.5,
    ) -> np.ndarray:
        """Action `[7]` towards a position and, unless None, an orientation."""
        position, current = self.scene.eef()
        move = np.clip(_GAIN * (target - position), -fastest, fastest)
        turn = np.zeros(3)
        if rotation is not None:
            turn = 2 * Rotation.from_matrix(rotation @ current.T).as_rotvec()
        turn = np.clip(turn, -turn_limit, turn_limit)
        return np.clip(np.concatenate([move, turn, [gripper]]), -1.0, 1.0)


def choose_grasp(scene: LiberoScene, name: str, rng: np.random.Generator | None = None) -> Grasp:
    """How to grasp `name`: vessels by the rim, others across if they fit between the fingers."""
    points, obstacles = scene.points(name), scene.obstacles(name)
    for vessel, depth in _VESSELS.items():
        if vessel in name:
            return grasps.rim(points, obstacles, depth, rng)
    grasp = grasps.across(points, obstacles, rng)
    if grasp.width < grasps.WIDEST_M:
        return grasp
    return grasps.rim(points, obstacles, 0.022, rng)


def middle(points: np.ndarray) -> np.ndarray:
    """Middle `[2]` of the bounding box of `points` [N, 3], seen from above."""
    return (points[:, :2].max(axis=0) + points[:, :2].min(axis=0)) / 2


def _angle(rotation: np.ndarray, current: np.ndarray) -> float:
    """Angle between two rotations (rad)."""
    return float(Rotation.from_matrix(rotation @ current.T).magnitude())
