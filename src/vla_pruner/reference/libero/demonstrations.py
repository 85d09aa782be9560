"""Demonstrations of the scripted expert in LIBERO: recording them to disk, one file per episode.

Episodes start from placements that are drawn from the task's BDDL file. Official initial states,
which evaluations use, are never recorded. In half of the episodes the arm is pushed aside now and
then, or a policy acts first in every episode, so that the recording also shows how to recover; the
recorded `action` is always the expert's answer to the state that was really visited.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...scenes.pick_place_task import CAMERAS
from ..demonstrations import FORMAT_VERSION, pack_images, write_episode
from .suites import FRAME_STRIDE, STEP_LIMITS, TASKS, check_task

if TYPE_CHECKING:  # importing this module needs no simulator
    from .scene import LiberoScene

STEPS_AFTER_SUCCESS = 20
"""LIBERO counts a held thing as placed; a policy should also learn to let go."""

_BLOCK = 5
"""Episodes of one task in a row: a worker builds its scene once for them."""
_NOISE_STREAM = 7919
_MOST_CALLS = 16
_worker_scene: LiberoScene | None = None
_worker_policy: Any = None


class Pushes:
    """Adds a constant offset to the expert's action during bursts of 4 to 12 steps.

    Deterministic in `seed`; about half of the seeds have no bursts at all. The gripper command is
    left alone.
    """

    def __init__(self, seed: int, start_probability: float = 0.03) -> None:
        self._rng = np.random.RandomState([seed, _NOISE_STREAM])
        self._enabled = self._rng.rand() < 0.5
        self._start_probability = start_probability
        self._remaining = 0
        self._offset = np.zeros(7)

    def __call__(self, action: np.ndarray) -> tuple[np.ndarray, bool]:
        """The action `[7]` to execute instead of `action`, and whether it was disturbed."""
        if not self._enabled:
            return action, False
        if self._remaining == 0 and self._rng.rand() < self._start_probability:
            self._remaining = int(self._rng.randint(4, 13))
            self._offset[:3] = self._rng.normal(0.0, 0.4, size=3)
            self._offset[5] = self._rng.normal(0.0, 0.2)
        if self._remaining == 0:
            return action, False
        self._remaining -= 1
        return np.clip(action + self._offset, -1.0, 1.0), True


def lead(scene: LiberoScene, policy: Any, seed: int) -> None:
    """Let a policy act for 1 to 16 whole chunks, as many as `seed` draws, or until success.

    The expert, who takes over there, then shows how to get out of states that the policy's own
    mistakes lead to (DAgger, Ross et al., 2011).
    """
    calls = np.random.RandomState([seed, _NOISE_STREAM]).randint(1, _MOST_CALLS + 1)
    for _ in range(calls):
        images = scene.observe()
        views = [images[camera] for camera in CAMERAS]
        actions = policy.predict_action(views, scene.instruction, proprio=scene.proprio())
        for action in np.atleast_2d(actions):
            scene.step(np.append(action[:6], -1.0 if action[6] < 0 else 1.0))
            if scene.success():
                return


def record_episode(
    scene: LiberoScene, seed: int, stride: int = FRAME_STRIDE, policy: Any = None
) -> dict[str, np.ndarray] | None:
    """Run the expert once; the arrays of the episode, or None if it did not succeed.

    With a `policy`, that acts first, unrecorded, instead of pushes; None if it needs no expert.
    The expert goes on with its plan for up to 20 steps after the success. A frame is taken every
    `stride` steps; `load_episode` of `reference/demonstrations.py` reads the arrays. T steps, F
    frames:

    Returns
    -------
    dict with
        agentview_jpeg, agentview_offsets, wrist_jpeg, wrist_offsets : F images
        proprio : float32 `[F, 8]`
        focus : float32 `[F, 3]`, world (m): what is to be grasped, or where the held thing goes
        reaching : bool `[F]`, the fingers are open
        agentview_points, wrist_points : float32 `[F, 2, 2]`, pixels (column, row) of the focus and
            of the gripper; outside [0, 160] when out of view, NaN behind the camera
        action : float32 `[T, 7]`, the expert's action at the state of this step, at 20 Hz
        executed : float32 `[T, 7]`, what the arm was really told
        perturbed : bool `[T]`, whether `executed` was disturbed
        stride : int, frame f was taken before step f * stride
        instruction, suite : str; task, seed : int
    """
    from .expert import Expert

    instruction = scene.reset(seed)
    if policy is not None:
        lead(scene, policy, seed)
        if scene.success():
            return None
    push = Pushes(seed) if policy is None else None
    expert = Expert(scene, seed)
    frames: list[dict[str, np.ndarray]] = []
    images: dict[str, list[np.ndarray]] = {camera: [] for camera in CAMERAS}
    steps: list[dict[str, np.ndarray]] = []
    remaining = STEPS_AFTER_SUCCESS
    succeeded = False
    for action in expert.actions():
        if len(steps) % stride == 0:
            for camera, image in scene.observe().items():
                images[camera].append(image)
            frames.append(_describe_frame(scene, expert.arm.focus(), action))
        executed, perturbed = (action, False) if succeeded or push is None else push(action)
        steps.append(
            {
                "action": action.astype(np.float32),
                "executed": executed.astype(np.float32),
                "perturbed": np.array(perturbed),
            }
        )
        scene.step(executed)
        succeeded = succeeded or scene.success()
        remaining -= succeeded
        if remaining == 0:
            break
        if not succeeded and len(steps) >= STEP_LIMITS[scene.suite]:
            return None
    if not scene.success():
        return None
    episode = {
        key: np.stack([row[key] for row in rows]) for rows in (frames, steps) for key in rows[0]
    }
    for camera in CAMERAS:
        episode |= pack_images(camera, images[camera])
    facts = {"stride": stride, "instruction": instruction, "suite": scene.suite}
    facts |= {"task": scene.task, "seed": seed, "format": FORMAT_VERSION}
    return episode | {key: np.array(value) for key, value in facts.items()}


def record(
    out_dir: Path,
    suite: str,
    episodes: int,
    *,
    tasks: Sequence[int] = range(TASKS),
    seed0: int = 0,
    workers: int = 2,
    stride: int = FRAME_STRIDE,
    policy: str | None = None,
) -> int:
    """Record `episodes` seeds, from `seed0`, of every task; returns how many succeeded so far.

    An episode becomes `episode_SUITE_TASK_SEED.npz`. A file appears only when it is complete, and a
    rerun skips what exists. An episode in which the expert failed leaves an empty `.failed` file.
    Tasks take turns, so that a run that is stopped early leaves a bit of each. `policy` names one
    that acts first in every episode, see `lead`.
    """
    for task in tasks:
        check_task(suite, task)
    if episodes < 1 or seed0 < 0 or stride < 1:
        raise ValueError(
            f"episodes={episodes}, seed0={seed0}, stride={stride}: record at least one episode "
            "from a seed that is not negative, with an image at least every step."
        )
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    seeds = range(seed0, seed0 + episodes)
    blocks = [seeds[start : start + _BLOCK] for start in range(0, episodes, _BLOCK)]
    jobs = [(task, seed) for block in blocks for task in tasks for seed in block]
    missing = [job for job in jobs if not any(p.exists() for p in _paths(out_dir, suite, *job))]
    print(f"{len(jobs) - len(missing)} of {len(jobs)} episodes exist, {len(missing)} to record")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    start = time.monotonic()
    # One process handles a block before it takes the next, so that scenes are seldom rebuilt.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _open_worker, (policy,)) as pool:
        arguments = [(out_dir, suite, task, seed, stride) for task, seed in missing]
        results = pool.map(_record_to_file, arguments, chunksize=_BLOCK)
        for done, (task, seed, steps) in enumerate(results, start=1):
            rate = done / (time.monotonic() - start)
            print(
                f"{done}/{len(missing)} episodes, {3600 * rate:.0f} per hour, {suite} task {task} "
                f"seed {seed} " + (f"took {steps} steps" if steps else "failed"),
                flush=True,
            )
    return sum(_paths(out_dir, suite, *job)[0].exists() for job in jobs)


def _describe_frame(
    scene: LiberoScene, focus: np.ndarray, action: np.ndarray
) -> dict[str, np.ndarray]:
    """Everything about one frame except the images."""
    points = np.stack([focus, scene.eef()[0]])
    return {
        "proprio": scene.proprio(),
        "focus": focus.astype(np.float32),
        "reaching": np.array(action[6] < 0),
        **{f"{c}_points": scene.project(points, c).astype(np.float32) for c in CAMERAS},
    }


def _paths(out_dir: Path, suite: str, task: int, seed: int) -> tuple[Path, Path]:
    """Where an episode is stored, and where its failure is noted."""
    name = f"episode_{suite}_{task}_{seed:06d}"
    return out_dir / f"{name}.npz", out_dir / f"{name}.failed"


def _open_worker(policy: str | None) -> None:
    """Prepare a process: a policy if one acts first; its scene closes before MuJoCo's contexts."""
    global _worker_policy
    from multiprocessing.util import Finalize

    Finalize(None, _close_scene, exitpriority=0)
    if policy is not None:
        import torch

        from ...models import load

        torch.set_num_threads(1)
        _worker_policy = load(policy)


def _close_scene() -> None:
    global _worker_scene
    if _worker_scene is not None:
        _worker_scene.close()
        _worker_scene = None


def _record_to_file(job: tuple[Path, str, int, int, int]) -> tuple[int, int, int]:
    """Record one episode into its file; returns task, seed and steps, 0 if it failed."""
    global _worker_scene
    from .scene import LiberoScene

    out_dir, suite, task, seed, stride = job
    if _worker_scene is None or (_worker_scene.suite, _worker_scene.task) != (suite, task):
        _close_scene()
        _worker_scene = LiberoScene(suite, task)
    stored, failed = _paths(out_dir, suite, task, seed)
    episode = record_episode(_worker_scene, seed, stride, _worker_policy)
    if episode is None:
        failed.touch()
        return task, seed, 0
    write_episode(stored, episode)
    return task, seed, len(episode["action"])
