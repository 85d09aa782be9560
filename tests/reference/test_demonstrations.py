"""Recorded demonstrations: what a file holds, and what a second run does."""

from importlib.util import find_spec

import numpy as np
import pytest

if find_spec("robosuite") is None:  # not importorskip: the scene picks the renderer on import
    pytest.skip("robosuite is missing: pip install 'vla-pruner[sim]'", allow_module_level=True)

from vla_pruner.reference.demonstrations import (
    STEPS_AFTER_SUCCESS,
    Disturbance,
    episode_paths,
    load_episode,
    record,
    record_episode,
)
from vla_pruner.scenes.pick_place import EVALUATION_SEEDS, STEP_LIMIT, PickPlaceScene


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demonstrations")
    record(folder, episodes=3, seed0=0, workers=1)
    return folder


def test_an_episode_holds_what_its_reader_promises(folder):
    episode = load_episode(episode_paths(folder)[1])
    steps = len(episode["action"])
    shapes = {
        "agentview": (steps, 160, 160, 3),
        "wrist": (steps, 160, 160, 3),
        "proprio": (steps, 8),
        "action": (steps, 7),
        "answers": (steps, 4, 7),
        "answerable": (steps, 4),
        "executed": (steps, 7),
        "perturbed": (steps,),
        "object_positions": (steps, 4, 3),
        "eef_position": (steps, 3),
        "agentview_points": (steps, 5, 2),
        "wrist_points": (steps, 5, 2),
        "target": (),
        "seed": (),
    }
    assert {key: value.shape for key, value in episode.items()} == shapes
    assert episode["agentview"].dtype == np.uint8
    assert episode["target"] == 1 and episode["seed"] == 1
    np.testing.assert_array_equal(episode["answers"][:, 1], episode["action"])


def test_executed_differs_from_the_label_only_where_marked(folder):
    for path in episode_paths(folder):
        episode = load_episode(path)
        differs = (episode["executed"] != episode["action"]).any(axis=1)
        assert not (differs & ~episode["perturbed"]).any()
        assert not episode["perturbed"][-STEPS_AFTER_SUCCESS:].any()


def test_executed_actions_replay_to_the_recorded_states_and_images(folder):
    episode = load_episode(episode_paths(folder)[0])
    with PickPlaceScene() as scene:
        scene.reset(int(episode["seed"]), int(episode["target"]))
        image = scene.observe()["agentview"].astype(float)
        assert np.abs(image - episode["agentview"][0]).mean() < 4, "JPEG costs about 1 grey level"
        for proprio, action in zip(episode["proprio"], episode["executed"], strict=True):
            np.testing.assert_array_equal(scene.proprio(), proprio)
            scene.step(action)
        assert scene.success()


@pytest.mark.slow
def test_a_second_run_records_only_what_is_missing(folder, capsys):
    first, second = episode_paths(folder)[:2]
    before = second.stat().st_mtime_ns
    first.unlink()
    assert record(folder, episodes=3, seed0=0, workers=1) == 3
    assert "2 of 3 episodes exist" in capsys.readouterr().out
    assert first.exists() and second.stat().st_mtime_ns == before
    assert not list(folder.glob("*.partial"))


def test_evaluation_seeds_are_refused(tmp_path):
    with pytest.raises(ValueError, match="kept for evaluation"):
        record(tmp_path, episodes=1, seed0=EVALUATION_SEEDS[0])


def test_an_empty_folder_says_how_to_fill_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="reference demos"):
        episode_paths(tmp_path)


def test_about_half_of_the_seeds_are_disturbed_and_each_repeats_itself():
    def executed(seed):
        disturb = Disturbance(seed)
        return np.stack([np.append(*disturb(np.zeros(7) + 0.1)) for _ in range(40)])

    runs = [executed(seed) for seed in range(60)]
    disturbed = sum(run[:, 7].any() for run in runs)
    assert 18 < disturbed < 42
    np.testing.assert_array_equal(runs[3], executed(3))
    assert max(np.abs(run[:, :7]).max() for run in runs) <= 1.0


class Idler:
    """Stands in for a policy: keeps the arm still for a number of steps."""

    def __init__(self, steps):
        self.steps = self.left = steps

    def begin(self, seed, instruction):
        self.left = self.steps
        return self.steps

    def act(self, images, proprio):
        self.left -= 1
        return None if self.left < 0 else np.array([0, 0, 0, 0, 0, 0, -1.0])


@pytest.mark.slow
def test_the_expert_takes_over_from_a_policy_with_its_full_time():
    steps = STEP_LIMIT - 5  # too late for the expert within the limit of a plain episode
    with PickPlaceScene() as scene:
        episode = record_episode(scene, 3, 3, Idler(steps))
    assert episode is not None
    assert len(episode["action"]) > STEP_LIMIT
    np.testing.assert_array_equal(episode["perturbed"], np.arange(len(episode["action"])) < steps)
    assert not (episode["executed"][:steps] == episode["action"][:steps]).all(axis=1).any()
    np.testing.assert_array_equal(episode["executed"][steps:], episode["action"][steps:])
