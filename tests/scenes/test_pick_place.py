"""The simulated scene: what a seed fixes, what an observation holds, what counts as success."""

from importlib.util import find_spec

import numpy as np
import pytest

if find_spec("robosuite") is None:  # not importorskip: the scene picks the renderer on import
    pytest.skip("robosuite is missing: pip install 'vla-pruner[sim]'", allow_module_level=True)

from vla_pruner.reference import expert
from vla_pruner.scenes.pick_place import (
    BIN_FLOOR_M,
    CAMERAS,
    EVALUATION_SEEDS,
    IMAGE_SIZE,
    OBJECT_NAMES,
    TRAINING_SEEDS,
    PickPlaceScene,
    instruction_for,
)

ACTION = np.array([0.3, -0.4, 0.2, 0.0, 0.0, 0.5, -1.0])


@pytest.fixture(scope="module")
def scene():
    with PickPlaceScene() as scene:
        yield scene


def test_a_seed_fixes_the_start_and_the_future_bit_for_bit(scene):
    def run():
        scene.reset(7, target=1)
        states = [scene.simulator_state()]
        for _ in range(3):
            scene.step(ACTION)
            states.append(scene.simulator_state())
        return np.stack(states)

    first = run()
    scene.reset(8, target=2)
    scene.step(-ACTION)
    np.random.seed(123)
    np.testing.assert_array_equal(first, run())


def test_a_fresh_process_state_does_not_matter(scene):
    scene.reset(11, target=0)
    with PickPlaceScene() as other:
        other.reset(11, target=0)
        np.testing.assert_array_equal(scene.simulator_state(), other.simulator_state())


def test_the_scene_does_not_give_the_target_away(scene):
    scene.reset(3, target=0)
    start = scene.simulator_state()
    scene.reset(3, target=3)
    np.testing.assert_array_equal(start, scene.simulator_state())


def test_resetting_leaves_the_global_random_generator_alone(scene):
    np.random.seed(5)
    expected = np.random.rand()
    np.random.seed(5)
    scene.reset(1, target=0)
    assert np.random.rand() == expected


def test_seeds_differ_and_objects_stand_apart_in_the_source_bin(scene):
    starts = []
    for seed in range(5):
        scene.reset(seed, target=0)
        positions = scene.object_positions()
        starts.append(positions)
        apart = np.linalg.norm(positions[:, None, :2] - positions[None, :, :2], axis=-1)
        assert apart[~np.eye(4, dtype=bool)].min() > 0.09
        assert np.all(positions[:, 1] < 0.0)
        for target in range(4):
            lowest = scene.state(target).vertices[:, 2].min()
            assert lowest == pytest.approx(BIN_FLOOR_M, abs=0.003)
    assert not np.allclose(starts[0], starts[1], atol=0.01)


def test_evaluation_seeds_are_never_training_seeds():
    assert not set(EVALUATION_SEEDS) & set(TRAINING_SEEDS)


def test_proprio_is_gripper_pose_plus_two_fingers(scene):
    proprio = scene.reset(0, target=0)["proprio"]
    assert proprio.shape == (8,) and proprio.dtype == np.float32
    np.testing.assert_allclose(proprio[:3], scene.state().eef_position, rtol=1e-6)
    assert np.linalg.norm(proprio[3:6]) == pytest.approx(np.pi, abs=0.2)
    assert np.abs(proprio[6:]).sum() == pytest.approx(scene.state().finger_opening, abs=1e-6)


def test_images_are_upright_and_the_projection_finds_the_objects(scene):
    scene.reset(2, target=3)
    images = scene.observe()
    assert set(images) == set(CAMERAS)
    for image in images.values():
        assert image.shape == (IMAGE_SIZE, IMAGE_SIZE, 3) and image.dtype == np.uint8
    column, row = scene.project(scene.object_positions()[3], "agentview")
    patch = images["agentview"][int(row) - 3 : int(row) + 4, int(column) - 3 : int(column) + 4]
    red, green, _ = patch.reshape(-1, 3).mean(axis=0)
    assert red > 1.5 * green, "the can is red; if it is not here, the image is flipped"
    near, far = scene.project(np.array([[0.02, -0.4, 0.82], [0.02, 0.4, 0.82]]), "agentview")
    assert near[1] > far[1]


def test_all_objects_are_in_view_at_the_start(scene):
    for seed in range(5):
        scene.reset(seed, target=0)
        pixels = scene.project(scene.object_positions(), "agentview")
        assert np.all((pixels > 10) & (pixels < IMAGE_SIZE - 10))


def test_a_full_action_moves_the_gripper_most_of_its_displacement(scene):
    scene.reset(0, target=0)
    before = scene.proprio()
    scene.step(np.array([0, 1.0, 0, 0, 0, 0, -1.0]))
    assert 0.05 < scene.proprio()[1] - before[1] < 0.12


def test_success_needs_the_named_object_in_its_bin_and_an_empty_gripper(scene):
    scene.reset(1, target=1)
    assert not scene.success()
    was_in_bin_but_held = False
    for _ in range(40):
        scene.step(expert.act(scene.state()))
        state = scene.state()
        was_in_bin_but_held |= state.held and state.object_in_bin()
        if scene.success():
            break
        assert not (state.object_in_bin() and state.gripper_clearance() > 0.05 and not state.held)
    assert was_in_bin_but_held
    assert scene.success()
    assert scene.state().gripper_clearance() > 0.05


def test_instructions_name_the_object():
    assert instruction_for(2) == "pick up the cereal box and place it in its bin"
    assert len({instruction_for(target, 3) for target in range(4)}) == len(OBJECT_NAMES)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda scene: scene.step(np.zeros(6)), "7 finite numbers"),
        (lambda scene: scene.step(np.full(7, np.nan)), "7 finite numbers"),
        (lambda scene: scene.reset(0, target=4), "names no object"),
        (lambda scene: scene.observe(("top",)), "choose from agentview, wrist"),
    ],
)
def test_mistakes_are_explained(scene, call, message):
    with pytest.raises(ValueError, match=message):
        call(scene)
