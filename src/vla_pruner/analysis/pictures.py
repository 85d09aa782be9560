"""Films of an episode: camera, scores, and what each method keeps, for the player of a page."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from vla_pruner.analysis.record import MethodReplay, Trace
from vla_pruner.episodes.picture import scaled_bytes

QUALITY = 70
COLUMNS = 10
"""Frames in one row of a contact sheet."""
CALLS_PER_SECOND = 2.5
ALL = "all tokens"


def scenes_of(
    traces: Sequence[Trace], cameras: Sequence[str], room: int
) -> tuple[dict[str, Any], int]:
    """What the film player is given, scene by scene while there is room, and how many are left out.

    A frame is a call. The runs of a scene are what each method would have kept of the same images.

    Args:
        traces: episodes.
        cameras: names, in the order of the views.
        room: bytes that pictures may take.

    Raises:
        ValueError: a camera's tokens are no square grid.
    """
    scenes: list[dict[str, Any]] = []
    for trace in traces:
        sheets = [_sheet(trace.frames[:, view]) for view in range(len(cameras))]
        room -= sum(map(len, sheets))
        if room < 0:
            break
        scenes.append(_scene(trace, cameras, sheets))
    names = shown(traces[0].replays) if traces else []
    data = {
        "unit": "call",
        "hz": CALLS_PER_SECOND,
        "speed": CALLS_PER_SECOND,
        "no_scores": "",
        "focus": None,
        "conditions": [{"name": name, "label": name} for name in (ALL, *names)],
        "scenes": scenes,
    }
    return data, len(traces) - len(scenes)


def shown(names: Iterable[str]) -> list[str]:
    """The replays to draw: of the first budget, and of VLA-Pruner without the kinds of memory."""
    plain = [name for name in names if "(" not in name]
    return [name for name in plain if name.endswith("@" + plain[0].partition("@")[2])]


def _scene(trace: Trace, cameras: Sequence[str], sheets: list[str]) -> dict[str, Any]:
    runs = {name: trace.replays[name] for name in shown(trace.replays)}
    first = [int(np.argmin(replay.full)) for replay in runs.values() if not replay.full.all()]
    return {
        "seed": trace.seed,
        "name": f"scene {trace.seed}",
        "instruction": trace.instruction,
        "start": max(first, default=0),
        "sheets": sheets,
        "runs": {
            ALL: _run(trace, cameras, None),
            **{name: _run(trace, cameras, replay) for name, replay in runs.items()},
        },
    }


def _run(trace: Trace, cameras: Sequence[str], replay: MethodReplay | None) -> dict[str, Any]:
    """One method on the images of a trace; None: the scores, and every token."""
    calls = []
    for call in range(len(trace.steps)):
        kept = "4" * trace.semantic.shape[1]
        if replay is not None:
            kept = "".join("4" if one else "0" for one in replay.kept[call])
        calls.append(
            {
                "step": call,
                "warm_up": bool(replay is not None and replay.full[call]),
                "kept": kept,
                "semantic": scaled_bytes(trace.semantic[call]) if replay is None else None,
                "forecast": scaled_bytes(trace.action[call]) if replay is None else None,
            }
        )
    recording = {
        "cameras": list(cameras),
        "grids": [_side(tokens) for tokens in trace.views],
        "frames": len(calls),
        "size": trace.frames.shape[2],
        "columns": COLUMNS,
        "calls": calls,
    }
    return {"success": trace.success, "steps": len(calls), "recording": recording}


def _side(tokens: int) -> int:
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ValueError(f"{tokens} visual tokens of a camera are no square grid of patches")
    return side


def _sheet(frames: np.ndarray) -> str:
    """Frames uint8 `[T, H, W, 3]`, row by row in one WebP image, as a data URI."""
    size = frames.shape[1]
    rows = -(-len(frames) // COLUMNS)
    sheet = Image.new("RGB", (size * min(len(frames), COLUMNS), size * rows))
    for number, frame in enumerate(frames):
        sheet.paste(Image.fromarray(frame), (size * (number % COLUMNS), size * (number // COLUMNS)))
    buffer = io.BytesIO()
    sheet.save(buffer, "WEBP", quality=QUALITY)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
