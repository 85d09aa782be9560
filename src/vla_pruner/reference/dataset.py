"""Training samples of the reference policies, read from a folder of recorded demonstrations."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..scenes.pick_place_task import CAMERAS, IMAGE_SIZE, INSTRUCTION_TEMPLATES, OBJECT_NAMES
from .demonstrations import load_episode

CHUNK = 8
"""Actions per training sample; the last one is repeated past the end of an episode."""

CROP_FRACTION = 0.9**0.5
"""Side of the evaluation crop relative to the image (0.9 of its area, as OpenVLA evaluates)."""


@dataclass(frozen=True)
class Batch:
    """Samples as arrays; B samples, C cameras, P pixels a side.

    Attributes
    ----------
    images : uint8 `[B, C, P, P, 3]`, cropped with a random shift.
    instructions : B sentences.
    proprio : float32 `[B, 8]`.
    actions : float32 `[B, CHUNK, 7]`, the expert's.
    action_valid : bool `[B, CHUNK]`, False where no expert action is known.
    points : float32 `[B, C, 5, 2]`, image coordinates (column, row) in [0, 1] of the four objects
        and of the gripper; outside [0, 1] where they are out of view.
    relation : float32 `[B, 6]`, gripper position and vector from it to the named object (m).
    named : float32 `[B, C, 2]`, the entry of `points` for the named object.
    objects : float32 `[B, 4, 6]`, where each object is (m), and the vector to it from the gripper;
        None where a suite's objects differ from task to task.
    """

    images: np.ndarray
    instructions: list[str]
    proprio: np.ndarray
    actions: np.ndarray
    action_valid: np.ndarray
    points: np.ndarray
    relation: np.ndarray
    named: np.ndarray
    objects: np.ndarray | None = None


class Demonstrations:
    """All frames of a demonstration folder in memory, `pixels` a side after cropping."""

    def __init__(self, folder: Path, *, pixels: int, cameras: tuple[str, ...] = CAMERAS) -> None:
        self.folder, self.pixels, self.cameras = Path(folder), pixels, cameras
        self.scale = pixels / (IMAGE_SIZE * CROP_FRACTION)
        self.stored = round(IMAGE_SIZE * self.scale)
        self._seen: set[Path] = set()
        self._episodes: list[dict[str, np.ndarray]] = []
        self._index: list[tuple[int, int]] = []
        self._reaching: list[tuple[int, int]] = []

    def refresh(self) -> int:
        """Read the episodes that appeared since the last call; returns how many there are."""
        for path in sorted(self.folder.glob("episode_*.npz")):
            if path in self._seen:
                continue
            self._seen.add(path)
            episode = load_episode(path)
            for camera in CAMERAS:
                frames = episode.pop(camera)
                if camera in self.cameras:
                    episode[camera] = np.stack([self._resized(frame) for frame in frames])
            number = len(self._episodes)
            self._episodes.append(episode)
            self._index += [(number, step) for step in range(len(episode["proprio"]))]
            reaching = np.flatnonzero(self._reaching_steps(episode))
            self._reaching += [(number, int(step)) for step in reaching]
        if not self._episodes:
            raise FileNotFoundError(
                f"There are no demonstrations (episode_*.npz) in {self.folder}; record some with "
                "`python -m vla_pruner.reference demos --out FOLDER`."
            )
        return len(self._episodes)

    def __len__(self) -> int:
        return len(self._index)

    def action_quantiles(self) -> tuple[np.ndarray, np.ndarray]:
        """1st and 99th percentile of every action dimension, `[7]` each."""
        actions = np.concatenate([episode["action"] for episode in self._episodes])
        return np.quantile(actions, 0.01, axis=0), np.quantile(actions, 0.99, axis=0)

    def proprio_quantiles(self) -> tuple[np.ndarray, np.ndarray]:
        """1st and 99th percentile of every proprioception entry, `[8]` each."""
        values = np.concatenate([episode["proprio"] for episode in self._episodes])
        return np.quantile(values, 0.01, axis=0), np.quantile(values, 0.99, axis=0)

    def sample(
        self,
        rng: np.random.Generator,
        size: int,
        *,
        other_target: float = 0.4,
        reaching: float = 0.6,
        shift: float = 4.0,
    ) -> Batch:
        """Draw `size` samples.

        Parameters
        ----------
        reaching : share of samples drawn from the steps before the grasp, the only ones that need
            to find the named object in the image; the others come from all steps.
        other_target : share of samples whose instruction names another object than the
            demonstrated one; only their first action is known.
        shift : largest random displacement of the crop, pixels.
        """
        rows = [self._one(rng, other_target, reaching, shift) for _ in range(size)]
        columns = list(zip(*rows, strict=True))
        return Batch(
            images=np.stack(columns[0]),
            instructions=list(columns[1]),
            **{
                name: np.stack(column)
                for name, column in zip(
                    (
                        "proprio",
                        "actions",
                        "action_valid",
                        "points",
                        "relation",
                        "named",
                        "objects",
                    ),
                    columns[2:],
                    strict=False,
                )
            },
        )

    def _one(
        self, rng: np.random.Generator, other_target: float, reaching: float, shift: float
    ) -> tuple:
        number, step = self._draw(rng, reaching)
        episode = self._episodes[number]
        target = int(episode["target"])
        labels = episode["action"]
        length = len(labels)
        future = np.minimum(np.arange(step, step + CHUNK), length - 1)
        actions = labels[future]
        # An action is the expert's plan only while the arm did what the expert said.
        disturbed = np.cumsum(episode["perturbed"][future[:-1]])
        valid = np.concatenate([[True], disturbed == 0])
        if rng.random() < other_target:
            other = int(rng.integers(len(OBJECT_NAMES)))
            if other != target and episode["answerable"][step, other]:
                target = other
                actions = np.repeat(episode["answers"][step, other][None], CHUNK, axis=0)
                valid = np.arange(CHUNK) == 0
        template = 0 if rng.random() < 0.5 else int(rng.integers(len(INSTRUCTION_TEMPLATES)))
        images, corners = self._crops(rng, episode, step, shift)
        points = []
        for camera, corner in zip(self.cameras, corners, strict=True):
            pixel = episode[f"{camera}_points"][step] * self.scale - corner
            points.append(np.nan_to_num(pixel / self.pixels, nan=-1.0))
        eef = episode["proprio"][step, :3]
        objects = episode["object_positions"][step]
        relation = np.concatenate([eef, objects[target] - eef])
        return (
            images,
            INSTRUCTION_TEMPLATES[template].format(object=OBJECT_NAMES[target]),
            episode["proprio"][step].astype(np.float32),
            actions.astype(np.float32),
            valid,
            np.stack(points).astype(np.float32),
            relation.astype(np.float32),
            np.stack(points)[:, target].astype(np.float32),
            np.concatenate([objects, objects - eef], axis=1).astype(np.float32),
        )

    def _draw(self, rng: np.random.Generator, reaching: float) -> tuple[int, int]:
        """An episode and a frame of it."""
        index = self._reaching if rng.random() < reaching and self._reaching else self._index
        return index[rng.integers(len(index))]

    def _crops(
        self, rng: np.random.Generator, episode: dict[str, np.ndarray], frame: int, shift: float
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """Shifted crops `[C, P, P, 3]` of a frame, and the corner (column, row) of each."""
        middle = (self.stored - self.pixels) / 2
        images, corners = [], []
        for camera in self.cameras:
            row, column = np.clip(
                np.round(middle + rng.uniform(-shift, shift, 2)), 0, self.stored - self.pixels
            ).astype(int)
            image = episode[camera][frame]
            images.append(image[row : row + self.pixels, column : column + self.pixels])
            corners.append(np.array([column, row]))
        return np.stack(images), corners

    def _resized(self, frame: np.ndarray) -> np.ndarray:
        size = (self.stored, self.stored)
        return np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS))

    def _reaching_steps(self, episode: dict[str, np.ndarray]) -> np.ndarray:
        """bool `[T]`: the fingers are open and the demonstrated object is in the source bin."""
        where = episode["object_positions"][:, int(episode["target"])]
        moved = np.linalg.norm(where[:, :2] - where[0, :2], axis=1)
        return (episode["action"][:, 6] < 0) & (moved < 0.15)
