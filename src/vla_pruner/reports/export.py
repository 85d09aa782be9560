"""Rows of a report where other tools look for them: Parquet, Weights & Biases, Trackio, Rerun."""

from __future__ import annotations

import base64
import importlib
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Rows = Sequence[Mapping[str, Any]]

PROJECT = "vla-pruner"
"""Where a tracker keeps runs, unless a project is named."""
_ABOUT = ("suite", "policy", "stand_in_assets", "name", "label")


def exporters(words: Iterable[str]) -> list[tuple[str, str]]:
    """What `--export` names, checked: a tool, and the project behind its colon.

    Raises:
        ValueError: no such tool.
        ModuleNotFoundError: the tool's package is not installed.
    """
    found = []
    for word in words:
        tool, _, project = word.partition(":")
        if tool not in PACKAGES:
            raise ValueError(f"--export {word}: there are {', '.join(PACKAGES)}")
        if project and tool not in ("wandb", "trackio"):
            raise ValueError(f"--export {word}: {tool} takes no project")
        importlib.import_module(PACKAGES[tool])
        found.append((tool, project or PROJECT))
    return found


PACKAGES = {"parquet": "pyarrow", "wandb": "wandb", "trackio": "trackio", "rerun": "rerun"}
"""The package of each tool; the extra that brings it is called like the tool."""


def to_parquet(path: Path, rows: Rows) -> None:
    """Rows as a Parquet file: the columns of all rows together, an empty cell where one has none.

    Args:
        path: of the file.
        rows: flat values; intervals of a column that is sometimes nested have columns of their own.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = list(dict.fromkeys(name for row in rows for name in row))
    columns = [c for c in columns if not any(other.startswith(c + ".") for other in columns)]
    table = pa.table({name: _column([row.get(name) for row in rows]) for name in columns})
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    pq.write_table(table, partial)
    partial.replace(path)


def _column(values: list[Any]) -> list[Any]:
    """Values of one type: numbers where all are, text otherwise."""
    known = [value for value in values if value is not None]
    if all(isinstance(value, bool) for value in known):
        return values
    if all(isinstance(value, (int, float)) for value in known):
        whole = all(isinstance(value, int) for value in known)
        return [None if v is None else (int(v) if whole else float(v)) for v in values]
    return [None if value is None else str(value) for value in values]


def to_tracker(tool: str, project: str, rows: Rows) -> None:
    """A run of a tracker for every condition: what it is as configuration, its numbers as metrics.

    Args:
        tool: "wandb" or "trackio", which share these calls.
        project: where.
        rows: of the conditions.
    """
    tracker: Any = importlib.import_module(tool)
    for row in rows:
        about = {name: row[name] for name in _ABOUT if name in row}
        numbers = {
            name: value
            for name, value in row.items()
            if name not in about and isinstance(value, (int, float)) and np.isfinite(value)
        }
        name = " ".join(str(row[key]) for key in ("policy", "suite", "name"))
        tracker.init(project=project, name=name, config=about)
        tracker.log(numbers)
        tracker.finish()


def to_rerun(path: Path, recording: Mapping[str, Any], name: str) -> None:
    """An episode as a Rerun file: frames, scores and kept tokens by camera, actions, latency.

    Args:
        path: of the `.rrd` file.
        recording: as `episodes.recording.Recorder.finish` gives it.
        name: of the episode.
    """
    import rerun as rr

    path.parent.mkdir(parents=True, exist_ok=True)
    stream = rr.RecordingStream("vla-pruner", recording_id=name)
    stream.save(str(path))
    sheets = [_open(sheet) for sheet in recording["sheets"]]
    size, columns = recording["size"], recording["columns"]
    for step in range(recording["frames"]):
        stream.set_time("step", sequence=step)
        x, y = step % columns * size, step // columns * size
        for camera, sheet in zip(recording["cameras"], sheets, strict=True):
            stream.log(f"camera/{camera}", rr.Image(sheet[y : y + size, x : x + size]))
    for call in recording["calls"]:
        stream.set_time("step", sequence=call["step"])
        kept = np.array([one != "0" for one in call["kept"]])
        stream.log("kept", rr.Scalars(float(kept.sum())))
        if "latency_ms" in call:
            stream.log("latency_ms", rr.Scalars(float(call["latency_ms"])))
        _log_maps(stream, rr, recording, call, kept)
        for number, action in enumerate(call.get("actions", ())):
            stream.set_time("step", sequence=call["step"] + number)
            stream.log("action", rr.Scalars(action))
    stream.flush()


def _log_maps(
    stream: Any, rr: Any, recording: Mapping[str, Any], call: Mapping[str, Any], kept: np.ndarray
) -> None:
    """Which tokens stayed, and both scores, as a small image for each camera."""
    maps = {"kept_tokens": kept.astype(np.uint8) * 255}
    for score in ("semantic", "forecast"):
        if call.get(score):
            maps[score] = np.frombuffer(base64.b64decode(call[score]), dtype=np.uint8)
    begin = 0
    for camera, grid in zip(recording["cameras"], recording["grids"], strict=True):
        for name, values in maps.items():
            cells = values[begin : begin + grid * grid].reshape(grid, grid)
            stream.log(f"{name}/{camera}", rr.Image(cells))
        begin += grid * grid


def _open(uri: str) -> np.ndarray:
    data = base64.b64decode(uri.partition(",")[2])
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
