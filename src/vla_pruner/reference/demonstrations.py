"""Demonstrations of the scripted expert: recording them to disk, one file per episode.

Every step holds what the policy sees and what the expert would do there. In half of the episodes
the arm is disturbed now and then, so that the recording also shows how to recover; the recorded
`action` is always the expert's answer to the state that was really visited.
"""

from __future__ import annotations

import io
import itertools
import multiprocessing
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ..scenes.pick_place_task import CAMERAS, OBJECT_NAMES

if TYPE_CHECKING:  # reading episodes needs no simulator
    from ..scenes.pick_place import PickPlaceScene

FORMAT_VERSION = 1
STEPS_AFTER_SUCCESS = 3
JPEG_QUALITY = 95

_NOISE_STREAM = 7919
_worker: tuple[PickPlaceScene, Apprentice | None] | None = None


class Disturbance:
    """Replaces the expert's action during random bursts of one to three steps.

    A burst is Gaussian noise on position and yaw, a shove in one direction, or the wrong gripper
    command. Deterministic in `seed`; about half of the seeds have no bursts at all.
    """

    def __init__(self, seed: int, start_probability: float = 0.12) -> None:
        self._rng = np.random.RandomState([seed, _NOISE_STREAM])
        self._enabled = self._rng.rand() < 0.5
        self._start_probability = start_probability
        self._remaining = 0
        self._kind = "jitter"
        self._direction = np.zeros(3)

    def __call__(self, action: np.ndarray) -> tuple[np.ndarray, bool]:
        """The action `[7]` to execute instead of `action`, and whether it was disturbed."""
        if not self._enabled:
            return action, False
        if self._remaining == 0 and self._rng.rand() < self._start_probability:
            self._begin()
        if self._remaining == 0:
            return action, False
        self._remaining -= 1
        disturbed = action.copy()
        if self._kind == "jitter":
            disturbed[:3] += self._rng.normal(0.0, 0.4, size=3)
            disturbed[5] += self._rng.normal(0.0, 0.4)
        elif self._kind == "shove":
            disturbed[:3] = self._direction
        else:
            disturbed[6] = -disturbed[6]
        return np.clip(disturbed, -1.0, 1.0), True

    def _begin(self) -> None:
        self._kind = self._rng.choice(["jitter", "shove", "gripper"], p=[0.6, 0.25, 0.15])
        longest = 3 if self._kind == "jitter" else 2
        self._remaining = int(self._rng.randint(1, longest + 1))
        direction = self._rng.normal(size=3)
        self._direction = direction / np.linalg.norm(direction)


class Apprentice:
    """Lets a policy act in the first steps of an episode, before the expert takes over.

    The recording then holds the states that the policy's own mistakes lead to, and how to get out
    of them (DAgger, Ross et al., 2011).
    """

    def __init__(self, folder: str) -> None:
        from ..episodes.control import Control
        from ..models import load
        from ..models.loading import locate

        self._policy: Any = load(folder)
        self._control = Control.of(self._policy, CAMERAS, folder=Path(locate(folder)))
        self._steps = 0
        self._instruction = ""
        self._planned: list[np.ndarray] = []

    def begin(self, seed: int, instruction: str) -> int:
        """Start an episode and draw return for how many steps the policy acts: 2 to 40."""
        self._steps = int(np.random.RandomState([seed, _NOISE_STREAM]).randint(2, 41))
        self._instruction, self._planned = instruction, []
        return self._steps

    def act(self, images: dict[str, np.ndarray], proprio: np.ndarray) -> np.ndarray | None:
        """The policy's action `[7]`, None once the expert has taken over.

        As many actions of a chunk are carried out as when the policy is on its own.
        """
        if self._steps == 0:
            return None
        self._steps -= 1
        if not self._planned:
            control = self._control
            state = proprio if control.reads_state else None
            views = [images[camera] for camera in control.cameras]
            chunk = self._policy.predict_action(
                views, self._instruction, proprio=state, **control.arguments
            )
            self._planned = list(np.atleast_2d(chunk)[: control.execute])
        return self._control.command(self._planned.pop(0))


def record_episode(
    scene: PickPlaceScene, seed: int, target: int, apprentice: Apprentice | None = None
) -> dict[str, np.ndarray] | None:
    """Run the expert once; the arrays of the episode, or None if it did not succeed.

    With an `apprentice` a policy acts first, instead of random disturbances; the expert then has as
    many steps as in an episode of its own. See `load_episode` for the arrays; here images are still
    JPEG bytes.
    """
    from ..scenes.pick_place import STEP_LIMIT
    from . import expert

    instruction = str(scene.reset(seed, target)["instruction"])
    disturb = Disturbance(seed)
    limit = STEP_LIMIT
    if apprentice is not None:
        limit += apprentice.begin(seed, instruction)
    steps: list[dict[str, np.ndarray]] = []
    images: dict[str, list[np.ndarray]] = {camera: [] for camera in CAMERAS}
    remaining = STEPS_AFTER_SUCCESS
    succeeded = False
    while remaining > 0 and len(steps) < limit + STEPS_AFTER_SUCCESS:
        action = expert.act(scene.state())
        seen = scene.observe()
        for camera, image in seen.items():
            images[camera].append(image)
        if apprentice is not None:
            choice = apprentice.act(seen, scene.proprio())
            executed, perturbed = (action, False) if choice is None else (choice, True)
        else:
            executed, perturbed = (action, False) if succeeded else disturb(action)
        steps.append(_describe_step(scene, action, executed, perturbed))
        scene.step(executed)
        succeeded = succeeded or scene.success()
        remaining -= succeeded
        if not succeeded and len(steps) >= limit:
            return None
    if not scene.success():
        return None
    episode = {key: np.stack([step[key] for step in steps]) for key in steps[0]}
    for camera in CAMERAS:
        episode |= pack_images(camera, images[camera])
    episode["target"] = np.array(target)
    episode["seed"] = np.array(seed)
    episode["format"] = np.array(FORMAT_VERSION)
    return episode


def record(
    out_dir: Path, episodes: int, seed0: int = 0, workers: int = 2, policy: str | None = None
) -> int:
    """Record seeds `seed0 .. seed0 + episodes - 1`; returns how many episodes are on disk.

    Episode `seed` asks for object `seed % 4` and becomes `episode_SEED.npz`. A file appears only
    when it is complete, and a rerun skips what exists. An episode in which the expert failed
    leaves an empty `episode_SEED.failed`. `policy` names a policy that acts first in every
    episode, see `Apprentice`.
    """
    from ..scenes.pick_place import TRAINING_SEEDS

    seeds = range(seed0, seed0 + episodes)
    if episodes < 1 or seeds[0] not in TRAINING_SEEDS or seeds[-1] not in TRAINING_SEEDS:
        raise ValueError(
            f"Seeds {seed0} to {seed0 + episodes - 1} are not all training seeds "
            f"({TRAINING_SEEDS.start} to {TRAINING_SEEDS.stop - 1}); the seeds above are kept "
            "for evaluation. Choose a smaller --seed0 or fewer --episodes."
        )
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    missing = [seed for seed in seeds if not any(path.exists() for path in _paths(out_dir, seed))]
    print(f"{episodes - len(missing)} of {episodes} episodes exist, {len(missing)} to record")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    start = time.monotonic()
    with ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), _open_worker, (policy,)
    ) as pool:
        jobs = pool.map(_record_to_file, [out_dir] * len(missing), missing)
        for done, (seed, steps) in enumerate(jobs, start=1):
            if done % 10 == 0 or done == len(missing):
                rate = done / (time.monotonic() - start)
                left_min = (len(missing) - done) / rate / 60
                print(
                    f"{done}/{len(missing)} episodes, {rate:.2f} per second, "
                    f"{left_min:.1f} min left, "
                    + (f"seed {seed} took {steps} steps" if steps else f"seed {seed} failed"),
                    flush=True,
                )
    return sum(_paths(out_dir, seed)[0].exists() for seed in seeds)


def pack_images(camera: str, images: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """The images of a camera as `load_episode` reads them: JPEG files and where each one ends."""
    files = [_to_jpeg(image) for image in images]
    return {
        f"{camera}_jpeg": np.frombuffer(b"".join(files), dtype=np.uint8),
        f"{camera}_offsets": np.cumsum([0, *map(len, files)]),
    }


def write_episode(path: Path, episode: Mapping[str, np.ndarray]) -> None:
    """Write an episode's arrays to `path`, which appears only when it is complete."""
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.savez(file, allow_pickle=False, **episode)
    partial.replace(path)


def load_episode(path: Path) -> dict[str, np.ndarray]:
    """Read one episode of T steps.

    Returns
    -------
    dict with
        agentview, wrist : uint8 `[T, 160, 160, 3]`
        proprio : float32 `[T, 8]`
        action : float32 `[T, 7]`, the expert's action at the state of this step
        answers : float32 `[T, 4, 7]`, the expert's action had each object been named
        answerable : bool `[T, 4]`, False where another object is in the gripper's way
        executed : float32 `[T, 7]`, what the arm was really told
        perturbed : bool `[T]`, whether `executed` was disturbed
        object_positions : float32 `[T, 4, 3]`, world, metres, in the order of `OBJECT_NAMES`
        eef_position : float32 `[T, 3]`, world, metres
        agentview_points, wrist_points : float32 `[T, 5, 2]`, pixels (column, row) of the four
            objects and of the gripper; outside [0, 160] when out of view, NaN behind the camera
        target : int, index into `OBJECT_NAMES`
        seed : int
    """
    with np.load(path, allow_pickle=False) as file:
        episode = {key: file[key] for key in file.files}
    version = int(episode.pop("format", -1))
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format {version}, but this version reads format {FORMAT_VERSION}; "
            "record the demonstrations again."
        )
    for camera in CAMERAS:
        data = episode.pop(f"{camera}_jpeg").tobytes()
        ends = episode.pop(f"{camera}_offsets")
        images = [_from_jpeg(data[a:b]) for a, b in itertools.pairwise(ends)]
        episode[camera] = np.stack(images)
    return episode


def episode_paths(directory: Path) -> list[Path]:
    """The recorded episodes in `directory`, by seed."""
    paths = sorted(Path(directory).glob("episode_*.npz"))
    if not paths:
        raise FileNotFoundError(
            f"There are no demonstrations in {directory}; record some with "
            f"`python -m vla_pruner.reference demos --out {directory}`."
        )
    return paths


def _describe_step(
    scene: PickPlaceScene, action: np.ndarray, executed: np.ndarray, perturbed: bool
) -> dict[str, np.ndarray]:
    """Everything about one step except the images."""
    from . import expert

    objects, proprio = scene.object_positions(), scene.proprio()
    points = np.concatenate([objects, proprio[None, :3]])
    states = [scene.state(target) for target in range(len(OBJECT_NAMES))]
    free = not any(state.held for state in states)
    return {
        "proprio": proprio,
        "action": action.astype(np.float32),
        "answers": np.stack([expert.act(state) for state in states]).astype(np.float32),
        "answerable": np.array([free or state.held for state in states]),
        "executed": executed.astype(np.float32),
        "perturbed": np.array(perturbed),
        "object_positions": objects,
        "eef_position": proprio[:3].copy(),
        **{f"{c}_points": scene.project(points, c).astype(np.float32) for c in CAMERAS},
    }


def _paths(out_dir: Path, seed: int) -> tuple[Path, Path]:
    """Where an episode is stored, and where its failure is noted."""
    return out_dir / f"episode_{seed:06d}.npz", out_dir / f"episode_{seed:06d}.failed"


def _open_worker(policy: str | None) -> None:
    """Prepare a process: its own scene, and its own policy on one thread."""
    global _worker
    from multiprocessing.util import Finalize

    import torch

    from ..scenes.pick_place import PickPlaceScene

    torch.set_num_threads(1)
    scene = PickPlaceScene()
    Finalize(None, scene.close, exitpriority=0)  # before atexit, where MuJoCo ends its contexts
    _worker = scene, None if policy is None else Apprentice(policy)


def _record_to_file(out_dir: Path, seed: int) -> tuple[int, int]:
    """Record one episode into its file; returns the seed and its steps, 0 if it failed."""
    assert _worker is not None, "the pool's initializer opens the scene"
    stored, failed = _paths(out_dir, seed)
    episode = record_episode(_worker[0], seed, seed % len(OBJECT_NAMES), _worker[1])
    if episode is None:
        failed.touch()
        return seed, 0
    write_episode(stored, episode)
    return seed, len(episode["action"])


def _to_jpeg(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


def _from_jpeg(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))
