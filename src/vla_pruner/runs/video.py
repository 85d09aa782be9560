"""Episodes as mp4: what the policy saw, with the patches that it dropped dimmed."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vla_pruner.runs.job import Setup

FOLDER = "videos"
"""In the run folder."""

_SHADE = np.array([13, 14, 18], dtype=np.float32)
_OPACITY = 0.78
_SMALLEST = 256
"""Pixels: smaller images are enlarged by a whole number."""


def encoder() -> str:
    """Path of the ffmpeg program.

    Raises:
        ModuleNotFoundError: the package that brings it is not installed.
        RuntimeError: it brings none for this machine.
    """
    import imageio_ffmpeg

    try:
        return imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError as error:
        raise RuntimeError(
            f"videos need ffmpeg ({error}); set IMAGEIO_FFMPEG_EXE to one, or leave out --video"
        ) from error


def video_path(out: Path, setup: Setup, condition: str, seed: int) -> Path:
    """Where the video of an episode goes: `videos/SUITE/POLICY-WEIGHTS/CONDITION/SCENE.mp4`."""
    return Path(out, FOLDER, folder_name(setup), _safe(condition), f"{seed}.mp4")


def keep_recording(path: Path, recording: Mapping[str, Any], hz: float) -> None:
    """Keep what a page shows of an episode beside its video, as JSON.

    Raises:
        OSError: it cannot be written there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".json.partial")
    partial.write_text(json.dumps({"hz": hz, **recording}), encoding="utf-8")
    os.replace(partial, path.with_suffix(".json"))


def kept_recording(path: Path) -> dict[str, Any] | None:
    """The recording beside a video, with its `hz`; None: there is none that can be read."""
    try:
        found = json.loads(path.with_suffix(".json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def folder_name(setup: Setup) -> Path:
    """`SUITE/POLICY-WEIGHTS`, with nothing in it that a file system may refuse."""
    return Path(_safe(setup.suite), _safe(f"{Path(setup.policy).name}-{setup.weights}"))


def _safe(name: str) -> str:
    return re.sub(r"[^\w.@=+-]", "_", name)


def write_video(path: Path, recording: Mapping[str, Any], hz: float) -> None:
    """Write a recording as H.264; the file appears when it is complete.

    Args:
        path: of the file.
        recording: as `recording.Recorder.finish` gives it.
        hz: frames in a second.

    Raises:
        OSError: it could not be written.
    """
    pictures = frames(recording)
    first = next(pictures)
    height, width = first.shape[:2]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    words = [encoder(), "-y", "-loglevel", "error", "-f", "rawvideo", "-pix_fmt", "rgb24"]
    words += [
        "-s",
        f"{width}x{height}",
        "-r",
        f"{hz:g}",
        "-i",
        "-",
        "-c:v",
        "libx264",
        "-crf",
        "18",
    ]
    words += ["-pix_fmt", "yuv420p", "-movflags", "+faststart", "-threads", "1", "-f", "mp4"]
    process = subprocess.Popen(
        [*words, str(partial)],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C ends the sweep after this episode, not its video.
    )
    assert process.stdin is not None
    try:
        process.stdin.write(first.tobytes())
        for picture in pictures:
            process.stdin.write(picture.tobytes())
    except BrokenPipeError:
        pass  # It has given up; what it says follows.
    _, said = process.communicate()
    if process.returncode:
        partial.unlink(missing_ok=True)
        raise OSError(
            f"cannot write {path}: {said.decode(errors='replace').strip() or 'ffmpeg failed'}. "
            "Finished episodes are kept; run the same command again"
        )
    os.replace(partial, path)


def frames(recording: Mapping[str, Any]) -> Iterator[np.ndarray]:
    """Pictures uint8 `[H, W, 3]`, cameras side by side; H and W are even.

    A patch is dimmed from the call that dropped its token until the next call.
    """
    sheets = [_open(sheet) for sheet in recording["sheets"]]
    size, columns = recording["size"], recording["columns"]
    starts = [call["step"] for call in recording["calls"]]
    bright: list[np.ndarray] = []
    for number in range(recording["frames"]):
        if number in starts:
            kept = recording["calls"][starts.index(number)]["kept"]
            bright = list(_kept_pixels(kept, recording["grids"], size))
        x, y = number % columns * size, number // columns * size
        views = [
            np.where(
                mask, sheet[y : y + size, x : x + size], _dimmed(sheet[y : y + size, x : x + size])
            )
            for sheet, mask in zip(sheets, bright, strict=True)
        ]
        yield _enlarge(np.concatenate(views, axis=1))


def _open(uri: str) -> np.ndarray:
    data = base64.b64decode(uri.partition(",")[2])
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def _kept_pixels(kept: str, grids: list[int], size: int) -> Iterator[np.ndarray]:
    """For each camera, bool `[size, size, 1]`: pixels whose token stayed."""
    flags = np.array([reason != "0" for reason in kept])
    begin = 0
    for grid in grids:
        cells = flags[begin : begin + grid * grid].reshape(grid, grid)
        begin += grid * grid
        cell = np.minimum((np.arange(size) + 0.5) * grid // size, grid - 1).astype(int)
        yield cells[np.ix_(cell, cell)][:, :, None]


def _dimmed(image: np.ndarray) -> np.ndarray:
    return (_OPACITY * _SHADE + (1 - _OPACITY) * image).round().astype(np.uint8)


def _enlarge(picture: np.ndarray) -> np.ndarray:
    scale = max(1, -(-_SMALLEST // picture.shape[0]))
    picture = picture.repeat(scale, axis=0).repeat(scale, axis=1)
    height, width = picture.shape[:2]
    return np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)))
