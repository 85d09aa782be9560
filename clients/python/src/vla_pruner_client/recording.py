"""What a robot saw and did, as a LeRobotDataset v3; written by lerobot itself (0.4 or newer)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vla_pruner_client import Command


class Recorder:
    """Episodes of one robot. `add` fits `drive(ticked=...)`; a `with` block closes, come what may.

    The features are those of the first observation: its images, and its state.

    Args:
        folder: of the data set; must not exist.
        fps: ticks in a second.
        videos: images as video; otherwise as single files.
        robot: its name.

    Raises:
        ImportError: lerobot is not installed (`pip install lerobot`, Python 3.12).
        FileExistsError: the folder is there.
    """

    def __init__(
        self, folder: str | Path, fps: int, *, videos: bool = True, robot: str = "xarm6"
    ) -> None:
        from lerobot.datasets.lerobot_dataset import LeRobotDataset

        self._make = LeRobotDataset.create
        self.folder, self.fps, self.videos, self.robot = Path(folder), fps, videos, robot
        self.frames = 0
        self._set: Any = None
        if self.folder.exists():  # lerobot would say so at the first frame: the arm moves by then
            raise FileExistsError(f"{self.folder} is there already; name a new folder")

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, seen: Mapping[str, Any] | None, command: Command) -> None:
        """One tick: what was seen last, and the action. Without both, nothing is written."""
        if seen is None or command.action is None:
            return
        frame = {
            f"observation.images.{_short(name)}": value
            for name, value in seen.items()
            if isinstance(value, np.ndarray) and value.ndim == 3
        }
        frame["observation.state"] = np.asarray(seen["observation/state"], np.float32)
        frame["action"] = np.asarray(command.action, np.float32)
        if self._set is None:
            self._set = self._make(
                repo_id=f"local/{self.folder.name}",
                root=self.folder,
                fps=self.fps,
                robot_type=self.robot,
                use_videos=self.videos,
                features={name: self._feature(value) for name, value in frame.items()},
            )
        self._set.add_frame({**frame, "task": str(seen["prompt"])})
        self.frames += 1

    def end_episode(self) -> None:
        """The ticks since the last end are an episode."""
        if self.frames and self._set is not None:
            self._set.save_episode()
            self.frames = 0

    def close(self) -> None:
        """End the episode, and finish the files: without this the data set cannot be read."""
        made, self._set = self._set, None
        if made is not None:
            try:
                if self.frames:
                    made.save_episode()
            finally:
                self.frames = 0
                made.finalize()

    def _feature(self, value: np.ndarray) -> dict[str, Any]:
        if value.ndim == 3:
            names = ["height", "width", "channels"]
            kind = "video" if self.videos else "image"
            return {"dtype": kind, "shape": value.shape, "names": names}
        return {"dtype": "float32", "shape": value.shape, "names": None}


def _short(name: str) -> str:
    return name.rpartition("/")[2]
