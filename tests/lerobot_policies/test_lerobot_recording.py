"""What our client records is a LeRobotDataset v3, read by lerobot itself."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[2] / "clients" / "python" / "src"))
pytest.importorskip("lerobot.datasets.lerobot_dataset", reason="run `make test-lerobot`")
pytest.importorskip("websockets", reason="run `make test-lerobot`")
pytest.importorskip("msgpack", reason="run `make test-lerobot`")

from vla_pruner_client import Command
from vla_pruner_client.recording import Recorder


def seen(tick: int, task: str) -> dict[str, Any]:
    """What the xArm driver gives."""
    image = np.full((32, 48, 3), 8 * tick, np.uint8)
    return {
        "observation/image": image,
        "observation/wrist_image": 255 - image,
        "observation/joint_position": np.arange(6.0),
        "observation/gripper_position": np.ones(1),
        "observation/state": np.array([*range(6), tick / 10.0]),
        "prompt": task,
    }


@pytest.mark.parametrize("videos", [False, True])
def test_two_episodes_are_read_back(tmp_path: Path, videos: bool) -> None:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    recorder = Recorder(tmp_path / "set", 30, videos=videos)
    for task, ticks in (("wave", 5), ("pick up the can", 7)):
        recorder.add(None, Command(np.zeros(7, np.float32), True, 0.0))
        recorder.add(seen(0, task), Command(None, True, 0.0))
        for tick in range(ticks):
            action = np.array([tick, 0, 0, 0, 0, 0, 0.5], np.float32)
            recorder.add(seen(tick, task), Command(action, False, 0.1))
        recorder.end_episode()
    recorder.close()

    found = LeRobotDataset("local/set", root=tmp_path / "set")
    assert (
        found.meta.info["codebase_version"].startswith("v3")
        if isinstance(found.meta.info, dict)
        else str(found.meta.info.codebase_version).startswith("v3")
    )
    assert (len(found), found.num_episodes, found.fps) == (12, 2, 30)
    assert found.meta.robot_type == "xarm6"
    for number, (task, tick) in enumerate(
        [("wave", t) for t in range(5)] + [("pick up the can", t) for t in range(7)]
    ):
        row = found[number]
        assert row["task"] == task
        assert np.allclose(row["action"], [tick, 0, 0, 0, 0, 0, 0.5])
        assert np.allclose(row["observation.state"], [*range(6), tick / 10])
        image = np.asarray(row["observation.images.image"])
        assert image.shape == (3, 32, 48)
        assert abs(float(image.mean()) - 8 * tick / 255) < 0.02
        wrist = np.asarray(row["observation.images.wrist_image"])
        assert abs(float(wrist.mean()) - (255 - 8 * tick) / 255) < 0.02
