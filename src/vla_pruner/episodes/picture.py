"""What one call did with its visual tokens, as plain values that a page or a film can show."""

from __future__ import annotations

import base64
import math
from typing import Any

import numpy as np
from torch import Tensor

from vla_pruner.core.session import StepReport
from vla_pruner.models.openvla.processing import CROP_AREA

REASONS = {"semantic": "1", "action": "2", "both": "3", "warm-up": "4", "other": "4"}
"""One character per visual token says why it stayed; a dropped one is "0"."""


def picture_of(report: StepReport, row: int = 0) -> dict[str, Any]:
    """What a call did with its visual tokens in one row of its batch, as plain values.

    Raises:
        ValueError: a camera whose tokens are no square grid.
    """
    kept = ["0"] * report.visual_full
    indices = report.kept_mask[row].nonzero()[:, 0].tolist()
    for index, reason in zip(indices, report.reasons()[row], strict=True):
        kept[index] = REASONS[reason]
    return {
        "grids": [_grid(tokens) for tokens in report.views],
        "warm_up": bool(report.warm_up[row]),
        "kept": "".join(kept),
        "semantic": _bytes(report.semantic, row),
        "forecast": _bytes(report.forecast, row),
    }


def visible_side(policy: Any) -> float:
    """The share of an image's height and width that the policy sees."""
    cropped = getattr(getattr(policy, "config", None), "center_crop", False)
    return CROP_AREA**0.5 if cropped else 1.0


def _grid(tokens: int) -> int:
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ValueError(
            f"{tokens} visual tokens of a camera are no square grid of patches, which the report "
            "page draws; run without recording"
        )
    return side


def _bytes(scores: Tensor | None, row: int) -> str | None:
    """Scores `[B, M]` of one row as base64 bytes; None if there are none or all are 0."""
    return None if scores is None else scaled_bytes(scores[row].float().cpu().numpy())


def scaled_bytes(scores: np.ndarray) -> str | None:
    """Scores `[M]` as base64 of one byte each, 255 for the largest; None if all are 0."""
    largest = float(scores.max())
    if largest <= 0:
        return None
    scaled = np.round(255 * np.clip(scores / largest, 0, 1)).astype(np.uint8)
    return base64.b64encode(scaled.tobytes()).decode()
