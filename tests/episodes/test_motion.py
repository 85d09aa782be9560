"""Motion of an episode: measures that can be worked out by hand, in the units that they claim."""

import json

import numpy as np
import pytest

from toy_task import CAMERAS, ToyScene, tiny_policy
from vla_pruner.episodes.control import Control
from vla_pruner.episodes.episode import run_episode
from vla_pruner.episodes.motion import (
    MEASURES,
    Motion,
    MotionMeter,
    compare_motion,
    gripper_switches,
    mean_action_rate,
    mean_jerk,
    path_length,
)
from vla_pruner.episodes.policy_runner import LocalPolicyRunner

CONTROL = Control(CAMERAS, execute=2, reads_state=True)


@pytest.mark.parametrize("hz", [1.0, 5.0, 20.0])
def test_jerk_of_a_cubic_is_its_third_derivative_whatever_the_rate(hz):
    time = np.arange(12) / hz
    points = np.stack([time**3, 2 * time**3 - time, np.ones_like(time)], axis=1)
    assert mean_jerk(points, hz) == pytest.approx(np.hypot(6, 12), rel=1e-6)
    assert mean_jerk(points[:, 2:], hz) == pytest.approx(0, abs=1e-9)


def test_jerk_has_the_dimension_of_a_third_derivative():
    points = np.random.default_rng(0).normal(size=(20, 3))
    once = mean_jerk(points, 5.0)
    assert mean_jerk(10 * points, 5.0) == pytest.approx(10 * once)
    assert mean_jerk(points, 10.0) == pytest.approx(8 * once)
    assert mean_jerk(points[:3], 5.0) is None


def test_paths_rates_and_switches():
    corner = np.array([[0, 0, 0], [3, 4, 0], [3, 4, 12]], dtype=float)
    assert path_length(corner) == pytest.approx(17)
    assert path_length(corner[:1]) == 0
    assert mean_action_rate(np.array([[0.0, 0], [3, 4], [3, 4]])) == pytest.approx(2.5)
    assert mean_action_rate(corner[:1]) is None
    closing = np.array([-1, -0.5, 0, 0.2, 1, 0, -1])[:, None]
    assert gripper_switches(closing) == 2


def test_an_episode_is_measured_in_simulated_time():
    scene, meter = ToyScene(), MotionMeter(hz=5)
    episode = run_episode(
        LocalPolicyRunner(tiny_policy()),
        scene,
        100,
        1,
        control=CONTROL,
        step_limit=12,
        subscribers=[meter],
    )
    motion = meter.finish()
    assert episode.steps == 7
    assert motion.seconds == pytest.approx(7 / 5)
    assert motion.hand_path == pytest.approx(7 * 0.01 * 3**0.5, rel=1e-5)
    assert motion.hand_jerk == pytest.approx(0, abs=1e-3)
    assert (motion.joint_path, motion.joint_jerk) == (None, None)
    actions = np.stack(scene.actions)
    assert motion.action_rate == pytest.approx(mean_action_rate(actions))
    assert Motion.from_dict(json.loads(json.dumps(motion.as_dict()))) == motion


def test_a_scene_that_tells_its_pose_is_asked_for_nothing_else():
    class Posed(ToyScene):
        def pose(self):
            moved = float(len(self.actions))
            return np.array([moved, 0, 0]), np.array([0, 2 * moved])

    meter = MotionMeter(hz=5)
    options = {"control": CONTROL, "step_limit": 4, "subscribers": [meter]}
    run_episode(LocalPolicyRunner(tiny_policy()), Posed(), 102, 1, **options)
    motion = meter.finish()
    assert (motion.hand_path, motion.joint_path) == (pytest.approx(4), pytest.approx(8))


def values(**changes) -> dict:
    return {name: 1.0 for name in MEASURES} | changes


def test_two_arms_are_compared_on_pairs_and_the_ratio_is_that_of_what_is_printed():
    before = [values(hand_jerk=2.0), values(hand_jerk=4.0), values(hand_jerk=3.0)]
    after = [values(hand_jerk=4.0), values(hand_jerk=8.0), values(hand_jerk=6.0)]
    row = compare_motion(after, before)
    assert row.scenes == 3
    jerk = row.changes["hand_jerk"]
    assert (jerk.before, jerk.mean, jerk.ratio) == (3.0, 6.0, 2.0)
    assert (jerk.interval.low, jerk.interval.high) == (pytest.approx(2), pytest.approx(2))


def test_what_cannot_be_compared_is_left_out():
    assert compare_motion([]) is None
    row = compare_motion([values(joint_path=None)], [values(gripper_switches=0)])
    assert "joint_path" not in row.changes
    assert row.changes["gripper_switches"].ratio is None
    assert row.changes["seconds"].interval is None  # of one scene
