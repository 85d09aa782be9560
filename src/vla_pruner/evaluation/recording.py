"""What the report page shows of an episode: frames, kept tokens, scores; plain JSON values."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from vla_pruner.core.session import StepReport
from vla_pruner.models.openvla.processing import CROP_AREA

SHEET_COLUMNS = 10
"""Frames in one row of a contact sheet."""
REASONS = {"semantic": "1", "action": "2", "both": "3", "warm-up": "4", "other": "4"}
"""One character per visual token says why it stayed; a dropped one is "0"."""

_WEBP_QUALITY = 80


class Recorder:
    """Collects the frames and calls of one episode.

    A frame is what the policy sees of a camera image: cropped as the policy crops it.
    """

    def __init__(self, side: float, cameras: tuple[str, ...]) -> None:
        """Record these cameras, `side` of an image's height and width."""
        self._cameras = cameras
        self._side = side
        self._frames: dict[str, list[Image.Image]] = {camera: [] for camera in cameras}
        self._grids: list[int] = []
        self._calls: list[dict[str, Any]] = []

    def frame(self, images: dict[str, np.ndarray]) -> None:
        """Keep one image uint8 `[H, W, 3]` of each camera."""
        for camera in self._cameras:
            self._frames[camera].append(crop(images[camera], self._side))

    def call(self, step: int, call: Mapping[str, Any]) -> None:
        """Keep what a call at `step` did with its visual tokens, as `drawn` gives it."""
        values = {"step": step, **call}
        self._grids = values.pop("grids")
        self._calls.append(values)

    def finish(self) -> dict[str, Any]:
        """The recording: frames as one contact sheet per camera, calls with one string each.

        `kept` has one character per visual token (`REASONS`); `semantic` and `forecast` are base64
        of one byte per visual token, 255 for the largest score of the call.
        """
        first = next(iter(self._frames.values()))
        return {
            "cameras": list(self._cameras),
            "grids": self._grids,
            "frames": len(first),
            "size": first[0].size[0],
            "columns": SHEET_COLUMNS,
            "sheets": [_sheet(frames) for frames in self._frames.values()],
            "calls": self._calls,
        }


def drawn(report: StepReport) -> dict[str, Any]:
    """What a call did with its visual tokens (the batch's first row), as plain values.

    Raises:
        ValueError: a camera whose tokens are no square grid.
    """
    kept = ["0"] * report.visual_full
    indices = report.kept_mask[0].nonzero()[:, 0].tolist()
    for index, reason in zip(indices, report.reasons()[0], strict=True):
        kept[index] = REASONS[reason]
    return {
        "grids": [_grid(tokens) for tokens in report.views],
        "warm_up": bool(report.warm_up[0]),
        "kept": "".join(kept),
        "semantic": _bytes(report.semantic),
        "forecast": _bytes(report.forecast),
    }


def visible_side(policy: Any) -> float:
    """The share of an image's height and width that the policy sees."""
    cropped = getattr(getattr(policy, "config", None), "center_crop", False)
    return CROP_AREA**0.5 if cropped else 1.0


def crop(image: np.ndarray, side: float) -> Image.Image:
    """The middle of an image, `side` of its height and width, made square."""
    height, width = image.shape[:2]
    left, top = (1 - side) / 2 * width, (1 - side) / 2 * height
    size = round(side * min(height, width))
    return Image.fromarray(image).resize(
        (size, size), Image.Resampling.LANCZOS, box=(left, top, width - left, height - top)
    )


def _grid(tokens: int) -> int:
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ValueError(
            f"{tokens} visual tokens of a camera are no square grid of patches, which the report "
            "page draws; run without recording"
        )
    return side


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


def _bytes(scores: Tensor | None) -> str | None:
    """Scores `[B, M]` of the first row as base64 bytes; None if there are none or all are 0."""
    if scores is None:
        return None
    values = scores[0].float().cpu().numpy()
    largest = float(values.max())
    if largest <= 0:
        return None
    scaled = np.round(255 * np.clip(values / largest, 0, 1)).astype(np.uint8)
    return base64.b64encode(scaled.tobytes()).decode()
