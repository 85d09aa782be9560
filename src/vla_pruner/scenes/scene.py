"""What is acted in: a scene, and a suite of scenes that are kept for evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from vla_pruner.scenes.clock import Clock


class Scene(Protocol):
    """What is acted in; `vla_pruner.scenes.pick_place.PickPlaceScene` is one."""

    def reset(self, seed: int, target: int) -> Mapping[str, Any]:
        """Start the episode of `seed`; the result has the `instruction`."""

    def observe(self, cameras: tuple[str, ...]) -> dict[str, np.ndarray]:
        """Images uint8 `[H, W, 3]` by camera."""

    def proprio(self) -> np.ndarray:
        """State of the robot, float32 `[P]`; the first three are its hand's position (m)."""

    def step(self, action: np.ndarray) -> None:
        """Apply one action `[dim]`."""

    def success(self) -> bool:
        """Whether the instruction has been carried out."""

    def close(self) -> None:
        """Free the simulator."""


def pose_of(scene: Scene) -> tuple[np.ndarray, np.ndarray | None]:
    """Where the robot is: its hand `[3]` (m), its joints `[J]` (rad).

    A scene may say so itself, with a method `pose` that draws nothing; joints are None otherwise.
    """
    pose = getattr(scene, "pose", None)
    return (scene.proprio()[:3], None) if pose is None else pose()


def hold(scene: Scene, last: np.ndarray | None) -> np.ndarray:
    """The command with which the robot stays where it is, and its gripper as it was.

    Args:
        scene: has a method `hold`.
        last: the last command `[dim]`; None: there was none, the gripper stays open.

    Raises:
        ValueError: the scene does not tell; zeros would be wrong where commands are no differences.
    """
    if (own := getattr(scene, "hold", None)) is None:
        raise ValueError(
            f"--live: {type(scene).__name__} does not say how the robot holds still; give it a "
            "method `hold(last)` that returns the command (vla_pruner.scenes.scene.hold_delta, "
            "where commands are differences)"
        )
    return own(last)


def hold_delta(last: np.ndarray | None, dim: int = 7) -> np.ndarray:
    """`hold` where commands `[dim]` are differences of poses, and the gripper, -1 open, +1 close.

    Zero for the pose, and the gripper of the `last` command; open, where there was none.
    """
    command = np.zeros(dim if last is None else len(last))
    command[-1] = -1.0 if last is None else last[-1]
    return command


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
        clock: time that goes on while the policy computes; None: the scene waits for it.
    """

    name: str
    open_scene: Callable[[], Scene]
    cameras: tuple[str, ...]
    seeds: Sequence[int]
    tasks: tuple[str, ...]
    step_limit: int
    hz: float
    stand_in_assets: bool = False
    clock: Clock | None = None

    @property
    def base(self) -> str:
        """The name without what was changed, such as `+camera`."""
        return self.name.partition("+")[0]

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
