"""What the report page shows of an episode: frames, kept tokens, scores; plain JSON values."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from vla_pruner.episodes.control import Control
from vla_pruner.episodes.episode import Moment, Subscriber
from vla_pruner.scenes.scene import Scene

SHEET_COLUMNS = 10
"""Frames in one row of a contact sheet."""
_WEBP_QUALITY = 80


class Recorder(Subscriber):
    """Collects the frames and calls of one episode.

    A frame is what the policy sees of a camera image: cropped as the policy crops it.
    """

    wants_frames = True
    wants_picture = True

    def started(self, scene: Scene, control: Control, side: float) -> None:
        """Nothing is collected yet."""
        self._side = side
        self._execute = control.execute
        self._frames: dict[str, list[Image.Image]] = {camera: [] for camera in control.cameras}
        self._grids: list[int] = []
        self._calls: list[dict[str, Any]] = []

    def called(self, moment: Moment) -> None:
        """Keep the images of a call, and what it did with its visual tokens."""
        self.frame(moment.images)
        assert moment.answer.picture is not None
        actions = np.atleast_2d(moment.answer.actions)[: self._execute]
        values = {
            "step": moment.step,
            "latency_ms": round(moment.answer.call.latency_ms, 2),
            "actions": np.round(actions.astype(float), 4).tolist(),
            **moment.answer.picture,
        }
        self._grids = values.pop("grids")
        self._calls.append(values)

    def frame(self, images: Mapping[str, np.ndarray]) -> None:
        """Keep one image uint8 `[H, W, 3]` of each camera."""
        for camera, frames in self._frames.items():
            frames.append(crop(images[camera], self._side))

    def finish(self) -> dict[str, Any]:
        """The recording: frames as one contact sheet per camera, calls with one string each.

        `kept` has one character per visual token (`REASONS`); `semantic` and `forecast` are base64
        of one byte per visual token, 255 for the largest score of the call; `actions` are those of
        the chunk that were to be carried out, `[execute, dim]` as the policy gave them.
        """
        first = next(iter(self._frames.values()))
        return {
            "cameras": list(self._frames),
            "grids": self._grids,
            "frames": len(first),
            "size": first[0].size[0],
            "columns": SHEET_COLUMNS,
            "sheets": [_sheet(frames) for frames in self._frames.values()],
            "calls": self._calls,
        }


def crop(image: np.ndarray, side: float) -> Image.Image:
    """The middle of an image, `side` of its height and width, made square."""
    height, width = image.shape[:2]
    left, top = (1 - side) / 2 * width, (1 - side) / 2 * height
    size = round(side * min(height, width))
    return Image.fromarray(image).resize(
        (size, size), Image.Resampling.LANCZOS, box=(left, top, width - left, height - top)
    )


def _sheet(frames: list[Image.Image]) -> str:
    """Frames row by row in one WebP image, as a data URI."""
    size = frames[0].size[0]
    rows = -(-len(frames) // SHEET_COLUMNS)
    sheet = Image.new("RGB", (size * min(len(frames), SHEET_COLUMNS), size * rows))
    for number, frame in enumerate(frames):
        sheet.paste(frame, (size * (number % SHEET_COLUMNS), size * (number // SHEET_COLUMNS)))
    buffer = io.BytesIO()
    sheet.save(buffer, "WEBP", quality=_WEBP_QUALITY)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
