"""The scripted expert: it needs no memory, it succeeds, and it recovers."""

from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest

if find_spec("robosuite") is None:  # not importorskip: the scene picks the renderer on import
    pytest.skip("robosuite is missing: pip install 'vla-pruner[sim]'", allow_module_level=True)

from vla_pruner.reference import expert
from vla_pruner.scenes.pick_place import STEP_LIMIT, PickPlaceScene


@pytest.fixture(scope="module")
def scene():
    with PickPlaceScene() as scene:
        yield scene


def steps_to_success(scene, limit=STEP_LIMIT):
    """Steps the expert needs from here; `limit + 1` if it fails."""
    for step in range(1, limit + 1):
        scene.step(expert.act(scene.state()))
        if scene.success():
            return step
    return limit + 1


def test_it_solves_every_object(scene):
    steps = []
    for seed in range(500_000, 500_008):
        scene.reset(seed, target=seed % 4)
        steps.append(steps_to_success(scene))
    assert max(steps) <= 35


def test_its_action_depends_on_the_state_alone(scene):
    scene.reset(4, target=0)
    states, actions = [], []
    for _ in range(20):
        states.append(scene.state())
        actions.append(expert.act(states[-1]))
        scene.step(actions[-1])
    for state, action in reversed(list(zip(states, actions, strict=True))):
        np.testing.assert_array_equal(expert.act(state), action)


def test_actions_stay_in_the_unit_ball(scene):
    scene.reset(5, target=2)
    for _ in range(20):
        action = expert.act(scene.state())
        assert action.shape == (7,)
        assert np.linalg.norm(action[:3]) <= 1 + 1e-9
        assert np.linalg.norm(action[3:6]) <= 1 + 1e-9
        assert action[6] in (expert.OPEN, expert.CLOSE)
        scene.step(action)


@pytest.mark.slow
def test_it_recovers_from_a_shove_and_an_opened_gripper(scene):
    recovered = 0
    for seed in range(8):
        scene.reset(seed, target=seed % 4)
        rng = np.random.RandomState(seed)
        for _ in range(4 + seed):
            scene.step(expert.act(scene.state()))
        shove = rng.normal(size=3)
        shove[2] = abs(shove[2])
        shove /= np.linalg.norm(shove)
        for _ in range(2):
            scene.step(np.array([*shove, 0.0, 0.0, rng.uniform(-1, 1), expert.OPEN]))
        recovered += steps_to_success(scene) <= STEP_LIMIT
    assert recovered >= 7


def test_a_gripper_beside_the_object_rises_before_it_travels(scene):
    scene.reset(0, target=0)
    state = scene.state()
    low = np.array([0.02, -0.25, 0.84])
    action = expert.act(replace(state, eef_position=low, held=False))
    assert action[2] > 0.9
    assert np.linalg.norm(action[:2]) < 0.1


def test_a_placed_object_is_left_alone(scene):
    scene.reset(0, target=0)
    assert steps_to_success(scene) <= STEP_LIMIT
    for _ in range(4):
        scene.step(expert.act(scene.state()))
    action = expert.act(scene.state())
    assert np.linalg.norm(action[:3]) < 0.15
    assert action[6] == expert.OPEN
    assert scene.success()
