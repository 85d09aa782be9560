"""Recorded LIBERO episodes as observations to calibrate on."""

import numpy as np
import pytest
from test_libero_dataset import FRAMES, make_episode

from vla_pruner.episodes.observations import read_observations
from vla_pruner.reference.__main__ import main
from vla_pruner.reference.demonstrations import load_episode, write_episode
from vla_pruner.reference.libero.observations import write_observations


def test_observations_are_moments_of_one_episode_of_each_task(tmp_path):
    for task in range(3):
        for seed in (0, 1):
            name = f"episode_libero_object_{task}_{seed:06d}.npz"
            write_episode(tmp_path / name, make_episode(seed=task))
    out = tmp_path / "out"
    assert main(["observations", "--data", str(tmp_path), "--out", str(out), "--seed", "1"]) == 0
    assert len(list(out.iterdir())) == 3
    assert write_observations(tmp_path, out, seed=1, moments=3) == 3
    # Official initial states have numbers, too: none of them is refused as if it were one.
    found = read_observations(out, held_out=range(500))
    assert len(found.items) == 9
    assert found.seeds == ()
    episode = load_episode(tmp_path / "episode_libero_object_0_000001.npz")
    for item, frame in zip(found.items, (0, 2, FRAMES - 1), strict=False):
        assert item["instruction"] == str(episode["instruction"])
        np.testing.assert_array_equal(item["proprio"], episode["proprio"][frame])
        for image, camera in zip(item["images"], ("agentview", "wrist"), strict=True):
            np.testing.assert_array_equal(image, episode[camera][frame])


def test_what_is_not_there_is_named(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="no LIBERO episode of seed 4 in"):
        write_observations(tmp_path, tmp_path / "out", seed=4)
    with pytest.raises(ValueError, match="`moments=0` must be at least 1"):
        write_observations(tmp_path, tmp_path / "out", moments=0)
    assert main(["observations", "--data", str(tmp_path), "--out", str(tmp_path)]) == 2
    assert "record some with" in capsys.readouterr().err
