"""How a robot moved in an episode: time, paths, jerk, action rate, gripper switches.

Success alone hides what pruning does to motion. The measures are those of arXiv 2603.19131 but for
jerk: the formula that is handed down divides accelerations by two more steps, and is no jerk; here
it is the third difference of positions, in m/s^3 and rad/s^3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vla_pruner.episodes.control import Control
from vla_pruner.episodes.episode import Subscriber
from vla_pruner.measure.statistics import Interval, ratio_of_means
from vla_pruner.scenes.scene import Scene, pose_of

MEASURES = {
    "seconds": ("time", "s"),
    "hand_path": ("hand path", "m"),
    "joint_path": ("joint path", "rad"),
    "hand_jerk": ("hand jerk", "m/s³"),
    "joint_jerk": ("joint jerk", "rad/s³"),
    "action_rate": ("action rate", ""),
    "gripper_switches": ("gripper switches", ""),
}
"""Heading and unit of each measure."""


@dataclass(frozen=True)
class Motion:
    """How the robot moved in one episode, in simulated time.

    Args:
        seconds: until the episode ended.
        hand_path: way of the hand, in m.
        joint_path: way of the joints, in rad; None: the scene does not tell its joints.
        hand_jerk: mean norm of the hand's jerk, in m/s^3; None: fewer than three steps.
        joint_jerk: the same of the joints, in rad/s^3.
        action_rate: mean norm of the change of an action from one step to the next, in units of
            actions, the gripper's entry among them; None: fewer than two steps.
        gripper_switches: how often the gripper was told to close after open, or open after close.
    """

    seconds: float
    hand_path: float
    joint_path: float | None
    hand_jerk: float | None
    joint_jerk: float | None
    action_rate: float | None
    gripper_switches: int

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Motion:
        """The motion that `as_dict` described."""
        return cls(**values)


def path_length(points: np.ndarray) -> float:
    """Way through points `[N, D]`, one step after the other, in their unit."""
    return float(np.linalg.norm(np.diff(points, axis=0), axis=1).sum())


def mean_jerk(points: np.ndarray, hz: float) -> float | None:
    """Mean norm of the third derivative of points `[N, D]` taken `hz` times a second.

    `hz^3 / (N - 3) * sum ||q[t+3] - 3 q[t+2] + 3 q[t+1] - q[t]||`, unit per s^3; None: N < 4.
    """
    if len(points) < 4:
        return None
    return float(np.linalg.norm(np.diff(points, n=3, axis=0), axis=1).mean() * hz**3)


def mean_action_rate(actions: np.ndarray) -> float | None:
    """Mean norm of the change between actions `[N, D]`; None: N < 2."""
    if len(actions) < 2:
        return None
    return float(np.linalg.norm(np.diff(actions, axis=0), axis=1).mean())


def gripper_switches(actions: np.ndarray) -> int:
    """How often the last entry of actions `[N, D]` changes its sign; 0 is as before."""
    signs = np.sign(actions[:, -1])
    signs = signs[signs != 0]
    return int((signs[1:] != signs[:-1]).sum())


class MotionMeter(Subscriber):
    """Follows the hand and the joints of one episode.

    Args:
        hz: steps in a second of simulated time.
    """

    def __init__(self, hz: float) -> None:
        self._hz = hz
        self._scene: Scene | None = None
        self._hand: list[np.ndarray] = []
        self._joints: list[np.ndarray] = []
        self._actions: list[np.ndarray] = []

    def started(self, scene: Scene, control: Control, side: float) -> None:
        """Note where the robot is."""
        self._scene = scene
        self._look()

    def stepped(self, command: np.ndarray) -> None:
        """Note what the robot was told, and where that took it."""
        self._actions.append(np.asarray(command, dtype=np.float64))
        self._look()

    def finish(self) -> Motion:
        """The measures of the episode."""
        hand, actions = np.array(self._hand), np.array(self._actions)
        joints = np.array(self._joints) if len(self._joints) == len(hand) else None
        return Motion(
            seconds=len(actions) / self._hz,
            hand_path=path_length(hand),
            joint_path=None if joints is None else path_length(joints),
            hand_jerk=mean_jerk(hand, self._hz),
            joint_jerk=None if joints is None else mean_jerk(joints, self._hz),
            action_rate=mean_action_rate(actions),
            gripper_switches=gripper_switches(actions) if len(actions) else 0,
        )

    def _look(self) -> None:
        assert self._scene is not None
        hand, joints = pose_of(self._scene)
        self._hand.append(np.array(hand, dtype=np.float64))
        if joints is not None:
            self._joints.append(np.array(joints, dtype=np.float64))


# -- two arms ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """One measure on the scenes that two arms solved.

    Args:
        mean: of this arm.
        before: of all tokens, on the same scenes; None: this is all tokens.
        ratio: mean over before; None where before is 0 or missing.
        interval: 95 % bootstrap interval of the ratio, over scenes; None of one scene.
    """

    mean: float
    before: float | None = None
    ratio: float | None = None
    interval: Interval | None = None


@dataclass(frozen=True)
class MotionRow:
    """How the robot moved in the scenes that both arms solved; of all tokens, that it solved.

    Args:
        scenes: how many.
        changes: by measure; those that every episode has.
    """

    scenes: int
    changes: Mapping[str, Change]


def compare_motion(
    after: Sequence[Mapping[str, Any]], before: Sequence[Mapping[str, Any]] | None = None
) -> MotionRow | None:
    """The measures of episodes, beside those of the same scenes before; None: no episodes.

    Args:
        after: values of `Motion`, an entry per scene.
        before: the same scenes on all tokens; None: this is all tokens.
    """
    if not after:
        return None
    changes = {}
    for name in MEASURES:
        mine = [one[name] for one in after]
        old = [one[name] for one in before or ()]
        if any(value is None for value in (*mine, *old)):
            continue
        mean = sum(mine) / len(mine)
        if before is None:
            changes[name] = Change(mean)
            continue
        ratio, interval = ratio_of_means(old, mine)
        known = ratio == ratio  # NaN: nothing to divide by
        changes[name] = Change(mean, sum(old) / len(old), ratio if known else None, interval)
    return MotionRow(len(after), changes)
