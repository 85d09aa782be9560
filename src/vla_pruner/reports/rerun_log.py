"""What a server saw, kept and answered, as a Rerun file; it never waits, and drops images first."""

from __future__ import annotations

import base64
import importlib
import logging
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Shown:
    """One answer.

    Args:
        episode: number and label.
        step: how many observations of the episode came before.
        images: uint8 `[H, W, 3]` of each camera; None: dropped.
        picture: which tokens stayed and their scores, see `episodes.picture`; None: dropped, or
            the method shows none.
        actions: `[H, dim]`.
        numbers: by name: latency_ms, infer_ms, tokens, keep, late, warm_up.
        at: seconds since 1970.
    """

    episode: str
    step: int
    images: Sequence[np.ndarray] | None
    picture: Mapping[str, Any] | None
    actions: np.ndarray
    numbers: Mapping[str, float]
    at: float


class RerunLog:
    """Writes answers in a thread of its own.

    From half of `most` waiting answers on, new ones lose images and pictures; above, they are
    left out. `dropped_images` and `dropped` count them.

    Args:
        path: of the `.rrd` file.
        most: answers that wait to be written.

    Raises:
        ModuleNotFoundError: rerun is not installed.
        OSError: the file cannot be written.
    """

    def __init__(self, path: str | Path, most: int = 64) -> None:
        self.path, self.most = Path(path), most
        self.written = self.dropped_images = self.dropped = 0
        self._rr: Any = importlib.import_module("rerun")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_bytes(b"")  # what cannot be written is said now
        self._stream = self._rr.RecordingStream("vla-pruner", recording_id=str(self.path.stem))
        self._stream.save(str(self.path))
        self._waiting: deque[Shown] = deque()
        self._lock = threading.Condition()
        self._ending = False
        self._thread = threading.Thread(target=self._run, daemon=True, name="rerun log")
        self._thread.start()

    def put(self, shown: Shown) -> None:
        """Hand over an answer; returns at once, whatever the disk does."""
        with self._lock:
            if self._ending or len(self._waiting) >= self.most:
                self.dropped += 1
                return
            if len(self._waiting) >= self.most // 2:
                shown = replace(shown, images=None, picture=None)
                self.dropped_images += 1
            self._waiting.append(shown)
            self._lock.notify()

    def close(self, timeout_s: float = 10.0) -> None:
        """Write what waits, at most so long, and say what was dropped."""
        with self._lock:
            self._ending = True
            self._lock.notify()
        self._thread.join(timeout_s)
        logger.info(
            "%s: %d answers; %d without images, %d left out",
            self.path,
            self.written,
            self.dropped_images,
            self.dropped + len(self._waiting),
        )

    def _run(self) -> None:
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._waiting or self._ending)
                if not self._waiting:
                    break
                shown = self._waiting.popleft()
            try:
                self._write(shown)
                self.written += 1
            except Exception:
                self.dropped += 1
                if self.dropped == 1:
                    logger.exception("%s: an answer could not be written", self.path)
        self._stream.flush()

    def _write(self, shown: Shown) -> None:
        rr, stream, where = self._rr, self._stream, shown.episode
        stream.set_time("time", timestamp=shown.at)
        stream.set_time("step", sequence=shown.step)
        for camera, image in enumerate(shown.images or ()):
            stream.log(f"{where}/camera/{camera}", rr.Image(image))
        for name, cells in maps(shown.picture or {}):
            stream.log(f"{where}/{name}", rr.Image(cells))
        for name, value in shown.numbers.items():
            stream.log(f"{where}/{name}", rr.Scalars(float(value)))
        if len(shown.actions):
            stream.log(f"{where}/action", rr.Scalars(shown.actions[0]))
            stream.log(f"{where}/chunk", rr.Tensor(shown.actions, dim_names=("step", "entry")))


def maps(picture: Mapping[str, Any]) -> list[tuple[str, np.ndarray]]:
    """Kept tokens and both scores as small images `[grid, grid]`, by name and camera."""
    if not picture:
        return []
    values = {"kept_tokens": np.array([255 * (one != "0") for one in picture["kept"]], np.uint8)}
    for score in ("semantic", "forecast"):
        if picture.get(score):
            values[score] = np.frombuffer(base64.b64decode(picture[score]), dtype=np.uint8)
    found, begin = [], 0
    for camera, grid in enumerate(picture["grids"]):
        for name, cells in values.items():
            part = cells[begin : begin + grid * grid].reshape(grid, grid)
            found.append((f"{name}/{camera}", part))
        begin += grid * grid
    return found
