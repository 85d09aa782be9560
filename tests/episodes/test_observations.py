"""Observations are what a policy saw, recorded once, and never of scenes kept for evaluation."""

import numpy as np
import pytest

from toy_task import ToyScene, record_toys, tiny_policy
from vla_pruner.episodes.observations import read_observations


def test_recorded_observations_are_what_the_policy_saw(tmp_path):
    (scene,) = record_toys(tmp_path, [7, 8], per_episode=3)
    assert scene.resets == [(7, 1), (8, 0)] and scene.closed
    found = read_observations(tmp_path)
    assert len(found.items) == 6 and found.seeds == (7, 8) and found.source == tmp_path.name
    again = ToyScene()
    assert found.items[0]["instruction"] == again.reset(7, 1)["instruction"]
    images = again.observe(("front", "hand"))
    for one, camera in zip(found.items[0]["images"], ("front", "hand"), strict=True):
        np.testing.assert_array_equal(one, images[camera])
    assert found.items[0]["proprio"].tolist() == again.proprio().tolist()
    assert found.items[2]["proprio"][0] > found.items[1]["proprio"][0] > 0
    tiny_policy().predict_action(**found.items[-1])


def test_recording_continues_where_it_stopped(tmp_path):
    record_toys(tmp_path, [7])
    before = (tmp_path / "scene_0000007.npz").stat().st_mtime_ns
    ticks = []
    (scene,) = record_toys(tmp_path, [7, 8], on_episode=lambda: ticks.append(1))
    assert scene.resets == [(8, 0)] and len(ticks) == 2
    assert (tmp_path / "scene_0000007.npz").stat().st_mtime_ns == before
    assert record_toys(tmp_path, [7, 8]) == []


def test_scenes_kept_for_evaluation_are_refused(tmp_path):
    with pytest.raises(ValueError, match="scene 100 is kept for evaluation"):
        record_toys(tmp_path, [99, 100])
    assert not list(tmp_path.iterdir())
    record_toys(tmp_path, [7])
    with pytest.raises(ValueError, match="scene 7, which is kept for evaluation"):
        read_observations(tmp_path, held_out=range(5, 10))


def test_an_episode_that_breaks_leaves_no_file(tmp_path):
    class Breaking(ToyScene):
        def observe(self, cameras):
            if self.seed == 8 and self.actions:
                raise RuntimeError("no light")
            return super().observe(cameras)

    scene = Breaking()
    with pytest.raises(RuntimeError, match="no light"):
        record_toys(tmp_path, [7, 8], scene)
    assert scene.closed
    assert [path.name for path in tmp_path.iterdir()] == ["scene_0000007.npz"]


def test_observations_may_name_their_statistics(tmp_path):
    images = np.zeros((2, 1, 4, 4, 3), np.uint8)
    np.savez(tmp_path / "own.npz", images=images, instruction="go", unnorm_key="kitchen")
    found = read_observations(tmp_path)
    assert [set(one) for one in found.items] == [{"images", "instruction", "unnorm_key"}] * 2
    assert found.items[1]["unnorm_key"] == "kitchen" and found.seeds == ()


@pytest.mark.parametrize(
    "arrays",
    [
        {"instruction": "go"},
        {"images": np.zeros((2, 1, 4, 4, 3), np.uint8)},
        {"images": np.zeros((2, 1, 4, 4, 3)), "instruction": "go"},
        {"images": np.zeros((1, 4, 4, 3), np.uint8), "instruction": "go"},
        {"images": np.zeros((2, 1, 4, 4, 3), np.uint8), "instruction": "go", "proprio": [[1.0]]},
    ],
)
def test_files_without_observations_are_refused(tmp_path, arrays):
    np.savez(tmp_path / "wrong.npz", **arrays)
    with pytest.raises(ValueError, match=r"wrong\.npz holds no observations"):
        read_observations(tmp_path)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no observations"):
        read_observations(tmp_path)
