"""Films of an episode: camera, scores as heat maps, and what each method keeps."""

from __future__ import annotations

import base64
import io
import math

import numpy as np
from PIL import Image

from vla_pruner.analysis.record import Trace

QUALITY = 55
SECONDS_PER_CALL = 0.4
_WARM = np.array([255, 140, 0], dtype=np.float32)


def film(trace: Trace, camera: int, replays: list[str]) -> str:
    """An animated WebP as a data URI, one picture per call.

    Panels from left to right: the frame, prefill score, action score, then each replay's kept
    patches. Heat maps are on a square-root scale, 1 for the largest score of the call.

    Args:
        trace: the episode.
        camera: number of the camera.
        replays: names, in order.

    Raises:
        ValueError: the camera's tokens are no square grid.
    """
    pictures = [
        Image.fromarray(np.concatenate(panels(trace, call, camera, replays), axis=1))
        for call in range(len(trace.steps))
    ]
    buffer = io.BytesIO()
    pictures[0].save(
        buffer,
        "WEBP",
        save_all=True,
        append_images=pictures[1:],
        duration=round(1000 * SECONDS_PER_CALL),
        loop=0,
        quality=QUALITY,
    )
    return _uri(buffer)


def strip(trace: Trace, camera: int, replays: list[str], calls: int = 8) -> str:
    """Some calls, evenly spaced, one above the other, in the panels of `film`; a data URI."""
    chosen = np.unique(np.linspace(0, len(trace.steps) - 1, calls).round().astype(int))
    rows = [np.concatenate(panels(trace, call, camera, replays), axis=1) for call in chosen]
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate(rows)).save(buffer, "WEBP", quality=QUALITY)
    return _uri(buffer)


def panels(trace: Trace, call: int, camera: int, replays: list[str]) -> list[np.ndarray]:
    """The panels of one call, uint8 `[H, W, 3]` each."""
    frame = trace.frames[call, camera]
    start = sum(trace.views[:camera])
    tokens = slice(start, start + trace.views[camera])
    result = [frame]
    for scores in (trace.semantic[call], trace.action[call]):
        heat = np.sqrt(np.clip(scores[tokens], 0, None) / max(float(scores.max()), 1e-30))
        result.append(_glow(frame, heat))
    for name in replays:
        weight = np.where(trace.replays[name].kept[call, tokens], 1.0, 0.18)
        result.append((frame * _enlarged(weight, frame)).astype(np.uint8))
    return result


def _glow(frame: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """A darkened frame with warm light where `heat` `[n]` in [0, 1] is high."""
    weight = _enlarged(heat, frame)
    return np.asarray(0.35 * frame * (1 - weight) + _WARM * weight).astype(np.uint8)


def _enlarged(values: np.ndarray, frame: np.ndarray) -> np.ndarray:
    """Values of the patches `[n]` at each pixel of a frame: `[H, W, 1]`."""
    side = math.isqrt(len(values))
    if side * side != len(values):
        raise ValueError(f"{len(values)} visual tokens of a camera are no square grid of patches")
    height, width = frame.shape[:2]
    rows, columns = np.arange(height) * side // height, np.arange(width) * side // width
    return values.reshape(side, side)[rows[:, None], columns[None]][..., None]


def _uri(buffer: io.BytesIO) -> str:
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
