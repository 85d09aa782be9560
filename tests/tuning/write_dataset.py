"""Writes a small LeRobotDataset v3.0 with lerobot itself: `PYTHON write_dataset.py FOLDER`.

Run with an environment that has lerobot[dataset] 0.6; tests read what it wrote (dataset-v3).
Frame f of episode e is grey, as bright as `brightness` says, in both cameras.
"""

import shutil
import sys
from pathlib import Path

import numpy as np

FPS, LENGTHS, SIDE = 10, (7, 9, 5), 64
TASKS = ("pick up the cup", "pick up the plate", "pick up the cup")


def brightness(episode, frame, camera):
    return 20 + 60 * episode + 8 * frame + (40 if camera else 0)


def frame_of(episode, frame, camera):
    return np.full((SIDE, SIDE, 3), brightness(episode, frame, camera), np.uint8)


def state_of(episode, frame):
    return np.arange(8, dtype=np.float32) / 10 + episode + frame / 100


def action_of(episode, frame):
    return np.sin(np.arange(7, dtype=np.float32) + episode + frame / 5)


def main(folder):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    image = {"shape": (SIDE, SIDE, 3), "names": ["height", "width", "channels"]}
    dataset = LeRobotDataset.create(
        repo_id="tests/small",
        root=folder,
        fps=FPS,
        features={
            "observation.images.front": {"dtype": "video", **image},
            "observation.images.hand": {"dtype": "image", **image},
            "observation.state": {"dtype": "float32", "shape": (8,), "names": None},
            "action": {"dtype": "float32", "shape": (7,), "names": None},
        },
    )
    for episode, length in enumerate(LENGTHS):
        for frame in range(length):
            dataset.add_frame(
                {
                    "observation.images.front": frame_of(episode, frame, 0),
                    "observation.images.hand": frame_of(episode, frame, 1),
                    "observation.state": state_of(episode, frame),
                    "action": action_of(episode, frame),
                    "task": TASKS[episode],
                }
            )
        dataset.save_episode()
    dataset.finalize()
    shutil.rmtree(Path(folder) / "images", ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1])
