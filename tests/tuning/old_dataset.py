"""A LeRobotDataset v2.1, written by hand along its documented layout: one file per episode.

lerobot 0.6 writes v3.0 alone; nothing newer than 0.3 writes this one.
"""

import json

import av
import pyarrow
import pyarrow.parquet as pq
from write_dataset import FPS, LENGTHS, SIDE, TASKS, action_of, frame_of, state_of

VIEWS = ("observation.images.front", "observation.images.hand")


def write_video(path, images, fps=FPS):
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width = stream.height = SIDE
        stream.pix_fmt, stream.bit_rate = "yuv420p", 2_000_000
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def write_old(folder, *, fps=FPS, video_fps=FPS):
    """Three episodes as in `write_dataset`, both cameras as videos."""
    info = {
        "codebase_version": "v2.1",
        "robot_type": "toy",
        "total_episodes": len(LENGTHS),
        "total_frames": sum(LENGTHS),
        "chunks_size": 1000,
        "fps": fps,
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/"
        "episode_{episode_index:06d}.mp4",
        "features": {
            **{view: {"dtype": "video", "shape": [SIDE, SIDE, 3]} for view in VIEWS},
            "observation.state": {"dtype": "float32", "shape": [8]},
            "action": {"dtype": "float32", "shape": [7]},
        },
    }
    names = sorted(set(TASKS))
    rows = [{"episode_index": e, "tasks": [TASKS[e]], "length": n} for e, n in enumerate(LENGTHS)]
    (folder / "meta").mkdir(parents=True)
    (folder / "meta" / "info.json").write_text(json.dumps(info))
    write_lines(folder / "meta" / "episodes.jsonl", rows)
    tasks = [{"task_index": n, "task": name} for n, name in enumerate(names)]
    write_lines(folder / "meta" / "tasks.jsonl", tasks)
    for episode, length in enumerate(LENGTHS):
        frames = range(length)
        table = pyarrow.table(
            {
                "observation.state": [state_of(episode, f).tolist() for f in frames],
                "action": [action_of(episode, f).tolist() for f in frames],
                "timestamp": pyarrow.array([f / FPS for f in frames], pyarrow.float32()),
                "frame_index": list(frames),
                "episode_index": [episode] * length,
                "task_index": [names.index(TASKS[episode])] * length,
            }
        )
        path = folder / "data" / "chunk-000" / f"episode_{episode:06d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path)
        for camera, view in enumerate(VIEWS):
            name = f"episode_{episode:06d}.mp4"
            images = [frame_of(episode, f, camera) for f in frames]
            write_video(folder / "videos" / "chunk-000" / view / name, images, video_fps)
    return folder


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def change_info(folder, **changes):
    path = folder / "meta" / "info.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_table(path, **columns):
    """Other values in some columns; None takes a column out."""
    table = pq.read_table(path)
    for name, values in columns.items():
        place = table.column_names.index(name)
        table = table.remove_column(place)
        if values is not None:
            table = table.add_column(place, name, pyarrow.array(values))
    pq.write_table(table, path)
