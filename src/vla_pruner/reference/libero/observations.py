"""Recorded LIBERO episodes as observations to calibrate on."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ...episodes.observations import write_episode
from ...scenes.pick_place_task import CAMERAS
from ..demonstrations import load_episode


def write_observations(data: Path, out: Path, *, seed: int = 0, moments: int = 6) -> int:
    """Write what a policy would have seen in one episode of every task; returns how many tasks.

    Placements of recordings are none of the official initial states, so that a recipe made from
    them can be measured fairly.

    Args:
        data: folder of recorded episodes.
        out: folder for the `.npz` files; what is there already is written anew.
        seed: which episode of each task; a task without it, because the expert failed, is left out.
        moments: frames of each episode, evenly spread.

    Raises:
        FileNotFoundError: no task has that episode.
        ValueError: fewer than one moment.
    """
    if moments < 1:
        raise ValueError(f"`moments={moments}` must be at least 1.")
    paths = sorted(Path(data).glob(f"episode_libero_*_{seed:06d}.npz"))
    if not paths:
        raise FileNotFoundError(
            f"There is no LIBERO episode of seed {seed} in {data}; record some with "
            "`python -m vla_pruner.reference demos --suite libero_object --out FOLDER`."
        )
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    for path in paths:
        episode = load_episode(path)
        last = len(episode["proprio"]) - 1
        frames = np.unique(np.linspace(0, last, moments).round().astype(int))
        seen = [
            {
                "images": [episode[camera][frame] for camera in CAMERAS],
                "instruction": str(episode["instruction"]),
                "proprio": episode["proprio"][frame],
            }
            for frame in frames
        ]
        write_episode(out / path.name.removeprefix("episode_"), seen)
    return len(paths)
