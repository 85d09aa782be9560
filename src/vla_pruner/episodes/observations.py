"""Observations to calibrate on: what a policy saw, recorded once, in a folder of small files.

A file is an `.npz` with `images` uint8 `[n, cameras, H, W, 3]`, `instruction` (a string), and, if
the policy reads it, `proprio` `[n, P]`: n moments of one episode. It may hold `unnorm_key` (a
string) for policies with several statistics; recorded ones also hold `seed`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vla_pruner._short import short
from vla_pruner.episodes.control import Control
from vla_pruner.episodes.episode import Moment, Subscriber, run_episode
from vla_pruner.episodes.policy_runner import LocalPolicyRunner
from vla_pruner.scenes.scene import Scene, Suite

Observation = dict[str, Any]


class Watcher(Subscriber):
    """Collects what a policy is shown at each of its calls, and where the hand is.

    Args:
        seen: dicts with `images`, `instruction`, `proprio` (None: not read) and, for a policy with
            statistics of several datasets, `unnorm_key`.
        hands: position of the hand at each call and at the end, each `[3]`, m.
    """

    def __init__(self) -> None:
        self.seen: list[Observation] = []
        self.hands: list[np.ndarray] = []

    def started(self, scene: Scene, control: Control, side: float) -> None:
        """Nothing has been seen yet."""
        self._scene, self._control = scene, control
        self.seen, self.hands = [], []

    def called(self, moment: Moment) -> None:
        """Keep what was shown."""
        images = [moment.images[camera] for camera in self._control.cameras]
        self.seen.append(
            {"images": images, "instruction": moment.instruction, "proprio": moment.state}
            | self._control.arguments
        )
        self._note_hand()

    def ended(self) -> None:
        """Keep where the hand came to rest."""
        self._note_hand()

    @property
    def motion(self) -> np.ndarray:
        """How far the hand got after each call `[n]`, m."""
        return np.linalg.norm(np.diff(np.stack(self.hands), axis=0), axis=1)

    def _note_hand(self) -> None:
        self.hands.append(np.array(self._scene.proprio()[:3]))


@dataclass(frozen=True)
class Observations:
    """Inputs of `predict_action`, and where they come from.

    Args:
        items: dicts with `images`, `instruction` and, where there is one, `proprio`.
        source: for people.
        seeds: scenes they come from, ascending; empty if unknown.
    """

    items: tuple[Observation, ...]
    source: str
    seeds: tuple[int, ...] = ()

    def describe(self) -> dict[str, Any]:
        """Provenance for a recipe."""
        return {"count": len(self.items), "source": self.source, "seeds": list(self.seeds)}


def observations_in(folder: Path) -> list[Path]:
    """The files of a folder of observations, by name. Errors: FileNotFoundError, there are none."""
    if not (paths := sorted(folder.glob("*.npz"))):
        raise FileNotFoundError(
            f"no observations (*.npz) in {short(str(folder))}; record some with --episodes."
        )
    return paths


def read_observations(folder: str | Path, *, held_out: Sequence[int] = ()) -> Observations:
    """Every observation of a folder, files by name.

    Args:
        folder: see above.
        held_out: scenes kept for evaluation; observations of these are refused.

    Raises:
        FileNotFoundError: no such folder, or nothing in it.
        ValueError: a file that holds something else, or a held-out scene.
    """
    folder = Path(folder)
    paths = observations_in(folder)
    items: list[Observation] = []
    seeds: set[int] = set()
    for path in paths:
        found, seed = read_episode(path)
        items.extend(found)
        if seed is not None:
            if seed in held_out:
                raise ValueError(
                    f"{path} comes from scene {seed}, which is kept for evaluation: a method "
                    "calibrated on it could not be measured fairly."
                )
            seeds.add(seed)
    return Observations(tuple(items), folder.name, tuple(sorted(seeds)))


def record_observations(
    policy: Any,
    open_scene: Callable[[], Scene],
    folder: str | Path,
    seeds: Sequence[int],
    *,
    suite: Suite,
    control: Control,
    per_episode: int = 6,
    on_episode: Callable[[], None] = lambda: None,
) -> None:
    """Let an unpruned policy act, and keep some of what it sees in each episode.

    Scenes whose file exists are skipped, so that a recording can be continued; a file appears only
    when it is complete.

    Args:
        policy: has `predict_action`, see `LocalPolicyRunner`.
        open_scene: makes the scene; not called if nothing is missing.
        folder: where the files go.
        seeds: scenes; seed s asks for the task `suite.task_of(s)`.
        suite: its held-out scenes are refused.
        control: how the policy is driven.
        per_episode: moments to keep, evenly spread over the episode's calls.
        on_episode: called after each episode.

    Raises:
        ValueError: a held-out scene, or `per_episode` below 1.
    """
    if per_episode < 1:
        raise ValueError(f"`per_episode={per_episode}` must be at least 1.")
    if kept := [seed for seed in seeds if seed in suite.seeds]:
        raise ValueError(
            f"scene {kept[0]} is kept for evaluation; calibrate on training scenes instead."
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    missing = [seed for seed in seeds if not episode_path(folder, seed).exists()]
    for _ in range(len(seeds) - len(missing)):
        on_episode()
    if not missing:
        return
    scene = open_scene()
    try:
        for seed in missing:
            watcher = Watcher()
            run_episode(
                LocalPolicyRunner(policy, arguments=control.arguments),
                scene,
                seed,
                suite.task_of(seed),
                control=control,
                step_limit=suite.step_limit,
                subscribers=[watcher],
            )
            seen = watcher.seen
            moments = np.linspace(0, len(seen) - 1, min(per_episode, len(seen)))
            chosen = [seen[moment] for moment in np.unique(moments.round().astype(int))]
            write_episode(episode_path(folder, seed), chosen, seed)
            on_episode()
    finally:
        scene.close()


def episode_path(folder: Path, seed: int) -> Path:
    """File of a scene."""
    return folder / f"scene_{seed:07d}.npz"


def write_episode(
    path: Path, seen: Sequence[Observation], seed: int | None = None, **more: np.ndarray
) -> None:
    """Write moments of one episode; the file appears when it is complete.

    Args:
        path: of the file.
        seen: one dict per moment, as in `Observations`.
        seed: of the scene; None: it has no number among those of an evaluation.
        more: further arrays, which `read_episode` leaves alone.
    """
    arrays = {
        "images": np.stack([np.stack(one["images"]) for one in seen]),
        "instruction": np.array(seen[0]["instruction"]),
        **more,
    }
    if seed is not None:
        arrays["seed"] = np.array(seed)
    if "unnorm_key" in seen[0]:
        arrays["unnorm_key"] = np.array(seen[0]["unnorm_key"])
    if seen[0]["proprio"] is not None:
        arrays["proprio"] = np.stack([one["proprio"] for one in seen])
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
    partial.replace(path)


def read_episode(path: Path) -> tuple[list[Observation], int | None]:
    """The moments of one file, and the scene they come from, if it is known.

    Raises:
        ValueError: the file holds something else.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
        images, instruction = arrays["images"], str(arrays["instruction"])
        proprio = arrays.get("proprio")
        if images.dtype != np.uint8 or images.ndim != 5 or images.shape[-1] != 3:
            raise ValueError(f"images are {images.dtype} {images.shape}")
        if proprio is not None and len(proprio) != len(images):
            raise ValueError(f"{len(proprio)} states for {len(images)} moments")
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{path} holds no observations ({error}); expected images uint8 [n, cameras, H, W, 3], "
            "instruction, and proprio [n, P] for policies that read it."
        ) from error
    items: list[Observation] = []
    for number, views in enumerate(images):
        item: Observation = {"images": list(views), "instruction": instruction}
        if proprio is not None:
            item["proprio"] = proprio[number]
        if "unnorm_key" in arrays:
            item["unnorm_key"] = str(arrays["unnorm_key"])
        items.append(item)
    return items, int(arrays["seed"]) if "seed" in arrays else None
