"""Sources of .npz files and of recordings made on the spot, and what is wrong with bad ones."""

from dataclasses import replace

import numpy as np
import pytest

from toy_task import ToyScene, tiny_policy, toy_task
from vla_pruner.runs.replay import Recorded
from vla_pruner.tuning.sources import (
    Source,
    check_fit,
    open_source,
    record_source,
    spread_out,
    suite_of,
    with_key,
)

FEW = {"episodes": 5, "calls": 99, "execute": 2}


def test_a_folder_or_a_file_of_observations(policy, recordings, episodes):
    source = open_source(recordings, policy, **FEW)
    assert source.kind == "npz" and source.calls == 10 and not source.actions
    np.testing.assert_array_equal(
        source.episodes[0].observations[1]["images"][1], episodes[0].observations[1]["images"][1]
    )
    assert source.episodes[0].motion == pytest.approx(episodes[0].motion)
    one = open_source(recordings / "scene_0000103.npz", policy, **{**FEW, "calls": 2})
    assert [e.scene for e in one.episodes] == [103] and one.calls == 2
    assert one.digest != source.digest


def test_episodes_are_spread_over_what_there_is():
    assert spread_out(3, 5) == [0, 1, 2]
    assert spread_out(100, 3) == [0, 50, 99]  # 49.5 is rounded to even
    assert spread_out(7, 1) == [0]


def test_nothing_to_replay(policy, tmp_path, recordings):
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        open_source(tmp_path / "none", policy, **FEW)
    with pytest.raises(FileNotFoundError, match=r"holds neither \.npz files"):
        open_source(tmp_path, policy, **FEW)
    with pytest.raises(FileNotFoundError, match="there are some in"):
        open_source(recordings.parent, policy, **FEW)
    (tmp_path / "a.npz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="holds no observations"):
        open_source(tmp_path, policy, **FEW)
    with pytest.raises(ValueError, match="--cameras is for LeRobotDatasets"):
        open_source(recordings, policy, cameras=["front"], **FEW)


IMAGE = np.zeros((8, 8, 3), np.uint8)


def observation(cameras=2, state=(0.0,) * 8):
    proprio = None if state is None else np.array(state, np.float32)
    return {"images": [IMAGE] * cameras, "instruction": "pick up the cup", "proprio": proprio}


@pytest.mark.parametrize(
    ("seen", "words"),
    [
        ((), "has no moments"),
        ((observation(), observation(cameras=1)), "has 1 camera, the policy reads 2"),
        ((observation(state=[float("nan")] * 8),), "moment 0: the state holds NaN or infinite"),
        ((observation(), observation(state=[0.0] * 7)), r"a state of 8 numbers, .* shape \(7,\)"),
        ((observation(state=None),), "a state of 8 numbers, recorded is none"),
    ],
)
def test_what_does_not_fit_the_policy(policy, seen, words):
    policy = tiny_policy(proprio_dim=8)
    with pytest.raises(ValueError, match=words):
        check_fit(Source("npz", (Recorded(3, seen, None),)), policy)


def test_actions_of_another_robot(policy):
    source = Source("lerobot v3.0", (), (np.zeros((3, 14)),))
    with pytest.raises(ValueError, match="actions have 14 numbers, the policy's have 7"):
        check_fit(source, policy)


def test_recording_is_continued_and_belongs_to_its_weights(policy, tmp_path):
    opened = []

    def open_scene():
        opened.append(ToyScene())
        return opened[-1]

    suite = replace(toy_task(), open_scene=open_scene)
    made = record_source(policy, "toy", suite, tmp_path, episodes=2, calls=9)
    assert [one.scene for one in made.episodes] == [108, 109]  # the last ones of the suite
    again = record_source(policy, "toy", suite, tmp_path, episodes=2, calls=9)
    assert again.digest == made.digest and len(opened) == 1 and opened[0].closed
    with pytest.raises(ValueError, match="was recorded by other weights"):
        other = tiny_policy()
        next(other.parameters()).add_(1.0)
        record_source(other, "toy", suite, tmp_path, episodes=2, calls=9)


def test_statistics_go_into_every_observation():
    source = with_key(Source("npz", (Recorded(3, (observation(),) * 2, None),)), "toy")
    assert [seen["unnorm_key"] for seen in source.episodes[0].observations] == ["toy", "toy"]
    assert with_key(source, None) is source


def test_a_policy_that_knows_no_scene_cannot_be_recorded():
    assert suite_of("mini-oft", {}) == "robosuite_pickplace"
    assert suite_of("mine", {"suites": ["libero_goal"]}) == "libero_goal"
    with pytest.raises(ValueError, match="give --observations FOLDER"):
        suite_of("runs/mine", {})
