"""Episodes of a LeRobotDataset, v2.1 or v3.0, read from its files: parquet, and mp4 or images.

Layouts as lerobot 0.3 (v2.1) and 0.6 (v3.0) write them. Nothing of lerobot is imported.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow
import pyarrow.parquet as pq
from PIL import Image

from vla_pruner._short import short
from vla_pruner.runs.replay import Recorded
from vla_pruner.tuning.sources import Source, spread_out

VERSIONS = ("v2.1", "v3.0")
_STATE, _ACTION = "observation.state", "action"
_LATE_S = 1e-3
"""How far a frame's timestamp may lie from its number over the fps."""


@dataclass(frozen=True)
class _Episode:
    """Where an episode is: its table of frames, and for each video its file and first second."""

    number: int
    length: int
    table: Path
    videos: Mapping[str, tuple[Path, float]]


def read_dataset(
    folder: Path,
    *,
    episodes: int,
    calls: int,
    stride: int,
    cameras: Sequence[str] | None = None,
    task: str | None = None,
) -> Source:
    """Some episodes of a dataset, every `stride`-th frame from the first on.

    Args:
        folder: holds meta/info.json.
        episodes: at most so many, evenly spread over the dataset.
        calls: at most so many frames of each.
        stride: actions that a policy carries out between two calls.
        cameras: features, or their last words, in the policy's order; None: all, as they are named
            in the dataset.
        task: what was asked for, where the dataset does not say.

    Raises:
        FileNotFoundError: a file that the dataset names is not there.
        ValueError: another version, a feature that is missing, or files that contradict each other.
    """
    info = _info(folder)
    features = info["features"]
    views = _views(features, cameras, folder)
    tasks = _tasks(folder, info)
    index = _index(folder, info, [view for view in views if features[view]["dtype"] == "video"])
    chosen = [index[number] for number in spread_out(len(index), episodes)]
    found, actions = [], []
    for one in chosen:
        rows = _rows(one, features, views, info["fps"])
        numbers = range(0, one.length, stride)[:calls]
        images = {view: _images(one, rows, view, numbers, info["fps"]) for view in views}
        seen = []
        for place, number in enumerate(numbers):
            item: dict[str, Any] = {
                "images": [images[view][place] for view in views],
                "instruction": task or _task(tasks, rows["task_index"][number], folder),
            }
            if _STATE in rows:
                item["proprio"] = np.asarray(rows[_STATE][number], dtype=np.float32)
            seen.append(item)
        found.append(Recorded(one.number, tuple(seen), None))
        if _ACTION in rows:
            actions.append(np.asarray([rows[_ACTION][n] for n in numbers], dtype=np.float32))
    return Source(f"lerobot {info['codebase_version']}", tuple(found), tuple(actions))


# -- what the dataset says of itself ---------------------------------------------------------------


def _info(folder: Path) -> dict[str, Any]:
    path = folder / "meta" / "info.json"
    try:
        info = json.loads(path.read_text("utf-8"))
        version, fps, features = info["codebase_version"], info["fps"], info["features"]
        count = info["total_episodes"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} describes no LeRobotDataset ({error!r})") from error
    if version not in VERSIONS:
        raise ValueError(
            f"{path}: codebase_version {short(version)}; {' and '.join(VERSIONS)} are read here. "
            "Convert older datasets with lerobot's own converters"
        )
    if not isinstance(fps, int | float) or not 0 < fps < 1000:
        raise ValueError(f"{path}: fps {short(fps)} is no rate of frames")
    if not isinstance(features, Mapping) or not isinstance(count, int) or count < 1:
        raise ValueError(f"{path}: no features, or no episodes; record some first")
    return info


def _views(
    features: Mapping[str, Any], cameras: Sequence[str] | None, folder: Path
) -> tuple[str, ...]:
    """Names of the camera features to show, in order."""
    known = [
        name
        for name, one in features.items()
        if one.get("dtype") in ("video", "image")
        and not (one.get("info") or {}).get("is_depth_map", False)
    ]
    if not known:
        raise ValueError(f"{folder} has no camera: none of its features is a video or an image")
    if cameras is None:
        return tuple(known)
    found = []
    for camera in cameras:
        fitting = [name for name in known if name == camera or name.rpartition(".")[2] == camera]
        if len(fitting) != 1:
            raise ValueError(
                f"--cameras {short(camera)}: the dataset has {', '.join(known)}; name those that "
                "the policy reads, in its order"
            )
        found.append(fitting[0])
    return tuple(found)


def _tasks(folder: Path, info: Mapping[str, Any]) -> dict[int, str]:
    """Sentence by number."""
    if info["codebase_version"] == "v2.1":
        lines = _lines(folder / "meta" / "tasks.jsonl")
        return {int(one["task_index"]): str(one["task"]) for one in lines}
    path = folder / "meta" / "tasks.parquet"
    table = _table(path, None)
    texts = [name for name in table.column_names if name != "task_index"]
    if "task_index" not in table.column_names or len(texts) != 1:
        raise ValueError(f"{path}: columns {table.column_names}; expected task_index and the task")
    numbers, words = table["task_index"].to_pylist(), table[texts[0]].to_pylist()
    return {int(number): str(word) for number, word in zip(numbers, words, strict=True)}


def _task(tasks: Mapping[int, str], number: int, folder: Path) -> str:
    if number not in tasks:
        raise ValueError(
            f"{folder}: a frame belongs to task {number}, which meta/tasks does not name; say "
            "what was asked for with --instruction"
        )
    return tasks[number]


def _index(folder: Path, info: Mapping[str, Any], videos: Sequence[str]) -> list[_Episode]:
    """All episodes, by number."""
    old = info["codebase_version"] == "v2.1"
    found = []
    if old:
        size = int(info.get("chunks_size", 1000))
        for row in _lines(folder / "meta" / "episodes.jsonl"):
            number = int(row["episode_index"])
            where = {"episode_index": number, "episode_chunk": number // size}
            table = _file(folder, info, "data_path", **where)
            files = {
                view: (_file(folder, info, "video_path", video_key=view, **where), 0.0)
                for view in videos
            }
            found.append(_Episode(number, int(row["length"]), table, files))
    else:
        pages = sorted((folder / "meta" / "episodes").glob("*/*.parquet"))
        if not pages:
            raise FileNotFoundError(f"{folder / 'meta' / 'episodes'} holds no table of episodes")
        wanted = ["episode_index", "length", "data/chunk_index", "data/file_index"]
        parts = ("chunk_index", "file_index", "from_timestamp")
        wanted += [f"videos/{view}/{part}" for view in videos for part in parts]
        for row in (row for page in pages for row in _table(page, wanted).to_pylist()):
            where = {"chunk_index": row["data/chunk_index"], "file_index": row["data/file_index"]}
            files = {}
            for view in videos:
                chunk, file, start = (row[f"videos/{view}/{part}"] for part in parts)
                place = {"video_key": view, "chunk_index": chunk, "file_index": file}
                files[view] = (_file(folder, info, "video_path", **place), float(start))
            table = _file(folder, info, "data_path", **where)
            found.append(_Episode(int(row["episode_index"]), int(row["length"]), table, files))
    if len(found) != info["total_episodes"]:
        raise ValueError(
            f"{folder}: meta/info.json counts {info['total_episodes']} episodes, meta/episodes has "
            f"{len(found)}; the recording was interrupted, or files are missing"
        )
    return sorted(found, key=lambda one: one.number)


def _file(folder: Path, info: Mapping[str, Any], which: str, **values: Any) -> Path:
    """A path that info.json describes, inside of the dataset."""
    try:
        path = folder / str(info[which]).format(**values)
    except (KeyError, ValueError, IndexError, AttributeError) as error:
        raise ValueError(f"{folder}: {which} of meta/info.json is not understood") from error
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{folder}: {which} of meta/info.json leaves the dataset: {short(path)}")
    return path


# -- frames ----------------------------------------------------------------------------------------


def _rows(
    one: _Episode, features: Mapping[str, Any], views: Sequence[str], fps: float
) -> dict[str, list[Any]]:
    """The columns of an episode's frames, in order."""
    wanted = ["episode_index", "frame_index", "timestamp", "task_index"]
    wanted += [name for name in (_STATE, _ACTION) if name in features]
    wanted += [view for view in views if features[view]["dtype"] == "image"]
    table = _table(one.table, wanted, [("episode_index", "=", one.number)])
    rows = {name: table[name].to_pylist() for name in wanted}
    where = f"episode {one.number} in {one.table}"
    if rows["frame_index"] != list(range(one.length)):
        raise ValueError(
            f"{where}: {len(rows['frame_index'])} frames, not 0 to {one.length - 1} in order; the "
            "recording was interrupted, or edited"
        )
    late = np.abs(np.asarray(rows["timestamp"]) - np.arange(one.length) / fps)
    if not (late < _LATE_S).all():
        bad = int(np.argmax(~(late < _LATE_S)))
        raise ValueError(
            f"{where}: frame {bad} is at {rows['timestamp'][bad]} s, which is not {bad} / {fps}; "
            "fps in meta/info.json is not the one that was recorded"
        )
    for name in (_STATE, _ACTION):
        values = rows.get(name)
        size = features[name].get("shape") if name in features else None
        if values is None or size is None:
            continue
        if {np.shape(value) for value in values} != {tuple(size)}:
            raise ValueError(f"{where}: {name} is not {tuple(size)} in every frame")
        if not np.isfinite(np.asarray(values, dtype=np.float64)).all():
            raise ValueError(
                f"{where}: {name} holds NaN or infinite numbers; take the episode out, or repair it"
            )
    return rows


def _images(
    one: _Episode, rows: Mapping[str, list[Any]], view: str, numbers: range, fps: float
) -> list[np.ndarray]:
    """Images uint8 `[H, W, 3]` of some frames."""
    if view in rows:
        return [_image(rows[view][number], one, view, number) for number in numbers]
    path, start = one.videos[view]
    return _frames(path, [start + number / fps for number in numbers], fps)


def _image(value: Any, one: _Episode, view: str, number: int) -> np.ndarray:
    try:
        return np.asarray(Image.open(io.BytesIO(value["bytes"])).convert("RGB"))
    except (OSError, TypeError, KeyError) as error:
        raise ValueError(
            f"episode {one.number}: {view} of frame {number} is no image ({error})"
        ) from error


def _frames(path: Path, times: Sequence[float], fps: float) -> list[np.ndarray]:
    """The frames of a video that are shown at some ascending times, s."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: a video that the dataset names is not there")
    found: list[np.ndarray] = []
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            rate = float(stream.average_rate or 0)
            if abs(rate - fps) > 0.01 * fps:
                raise ValueError(
                    f"{path} shows {rate:g} frames a second, meta/info.json says {fps:g}"
                )
            assert stream.time_base is not None
            container.seek(int(times[0] / stream.time_base), stream=stream, backward=True)
            for frame in container.decode(stream):
                if len(found) == len(times):
                    break
                if frame.time is None or frame.time < times[len(found)] - 0.5 / fps:
                    continue
                if frame.time > times[len(found)] + 0.5 / fps:
                    break
                found.append(frame.to_ndarray(format="rgb24"))
    except (av.error.FFmpegError, IndexError) as error:
        raise ValueError(f"{path} is no video that can be read ({error})") from error
    if len(found) < len(times):
        raise ValueError(
            f"{path}: no frame at {times[len(found)]:.3f} s; the video is shorter than its episodes"
        )
    return found


# -- files -----------------------------------------------------------------------------------------


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Errors of a file's contents, with its name."""
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: the dataset names it, and it is not there") from None
    except (OSError, ValueError, KeyError, TypeError) as error:  # pyarrow's are among these
        raise ValueError(
            f"{path} is damaged, or no such file of a LeRobotDataset: {error}"
        ) from error


def _table(path: Path, columns: list[str] | None, rows: Any = None) -> pyarrow.Table:
    with _reading(path):
        names = pq.read_schema(path).names
        if absent := [name for name in columns or () if name not in names]:
            raise ValueError(f"it lacks the columns {', '.join(absent)}")
        return pq.read_table(path, columns=columns, filters=rows)


def _lines(path: Path) -> list[dict[str, Any]]:
    with _reading(path):
        lines = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
        if not all(isinstance(line, dict) for line in lines):
            raise ValueError("expected one JSON object a line")
        return lines
