"""LIBERO's scene and recorder, in the real simulator."""

import os
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from vla_pruner.reference.libero.demonstrations import Pushes, lead, record, record_episode
from vla_pruner.reference.libero.scene import _import_libero
from vla_pruner.reference.libero.suites import FRAME_STRIDE, INSTRUCTIONS

CONFIG = Path(os.environ.get("LIBERO_CONFIG_PATH", Path.home() / ".libero")) / "config.yaml"
needs_libero = pytest.mark.skipif(
    find_spec("libero") is None or not CONFIG.exists(),
    reason="LIBERO is not installed, or has no config.yaml: `make libero` prepares it",
)


def test_a_missing_configuration_is_named_instead_of_asked_for(monkeypatch, tmp_path):
    monkeypatch.setenv("LIBERO_CONFIG_PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"no config.yaml in .*`make libero`"):
        _import_libero()


def test_pushes_come_in_bursts_to_half_of_the_seeds_and_leave_the_gripper_alone():
    action = np.array([0.9, 0, 0, 0, 0, 0, -1.0])
    shares = []
    for seed in range(40):
        pushes, again = Pushes(seed), Pushes(seed)
        results = [pushes(action) for _ in range(200)]
        pairs = zip(results, [again(action) for _ in range(200)], strict=True)
        assert all(np.array_equal(first[0], second[0]) for first, second in pairs)
        assert all(abs(pushed).max() <= 1 and pushed[6] == -1 for pushed, _ in results)
        assert all(told or np.array_equal(pushed, action) for pushed, told in results)
        shares.append(np.mean([told for _, told in results]))
    assert 10 <= np.count_nonzero(shares) <= 30
    assert max(shares) < 0.6


class Stage:
    """A scene that notes what it is told, and is solved after so many steps."""

    instruction = "put it there"

    def __init__(self, solved_after=10**6):
        self.told, self.solved_after = [], solved_after

    def observe(self):
        return {"agentview": np.zeros((2, 2, 3)), "wrist": np.ones((2, 2, 3))}

    def proprio(self):
        return np.arange(8.0)

    def step(self, action):
        self.told.append(action)

    def success(self):
        return len(self.told) >= self.solved_after


class Apprentice:
    """Answers with chunks of eight whose gripper is 0.3 open, then 0.3 closed."""

    def predict_action(self, images, instruction, proprio):
        assert [image.max() for image in images] == [0, 1]
        assert instruction == "put it there" and len(proprio) == 8
        actions = np.full((8, 7), 0.5)
        actions[:, 6] = [-0.3] * 4 + [0.3] * 4
        return actions


def test_a_policy_leads_for_whole_chunks_as_evaluations_execute_them():
    lengths = set()
    for seed in range(60):
        stage = Stage()
        lead(stage, Apprentice(), seed)
        lengths.add(len(stage.told))
        assert [action[6] for action in stage.told[:8]] == [-1.0] * 4 + [1.0] * 4
        assert all((action[:6] == 0.5).all() for action in stage.told)
    assert lengths <= set(range(8, 136, 8)) and {8, 128} <= lengths


def test_a_policy_that_solved_it_acts_no_more():
    stage = Stage(solved_after=3)
    lead(stage, Apprentice(), seed=0)
    assert len(stage.told) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"suite": "libero_90"}, "libero_spatial"),
        ({"tasks": [10]}, "no task 10"),
        ({"episodes": 0}, "at least one episode"),
    ],
)
def test_a_recording_that_cannot_be_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        record(tmp_path, **({"suite": "libero_object", "episodes": 1} | options))
    assert not list(tmp_path.iterdir())


def test_a_second_run_records_nothing_again(tmp_path, capsys):
    for task in (0, 1):
        (tmp_path / f"episode_libero_object_{task}_000000.{'npz' if task else 'failed'}").touch()
    assert record(tmp_path, "libero_object", 1, tasks=[0, 1], workers=1) == 1
    assert "0 to record" in capsys.readouterr().out


@pytest.fixture(scope="module")
def scene():
    from vla_pruner.reference.libero.scene import LiberoScene

    with LiberoScene("libero_object", 0) as scene:
        yield scene


@needs_libero
def test_a_seed_gives_its_own_placements_and_never_an_official_state(scene):
    def places():
        return np.stack([scene.position(name) for name in scene.names])

    assert scene.reset(3) == INSTRUCTIONS["libero_object"][0]
    first = places()
    scene.reset_official(0)
    official = places()
    scene.reset(3)
    np.testing.assert_array_equal(places(), first)
    assert np.abs(first - official).max() > 0.01


@needs_libero
def test_an_episode_shows_every_fourth_step_and_replays(scene):
    episode = record_episode(scene, seed=3)
    assert episode is not None
    steps = len(episode["action"])
    frames = -(-steps // FRAME_STRIDE)
    assert episode["proprio"].shape == (frames, 8)
    assert len(episode["agentview_offsets"]) == frames + 1
    assert not episode["reaching"].all() and episode["reaching"][0]
    scene.reset(3)
    for action in episode["executed"]:
        scene.step(action)
    assert scene.success()


@needs_libero
def test_the_expert_takes_over_from_where_a_policy_went(scene):
    class Left:
        def predict_action(self, images, instruction, proprio):
            return np.repeat([[0.0, 0.1, 0.0, 0.0, 0.0, 0.0, -1.0]], 8, axis=0)

    episode = record_episode(scene, seed=3, policy=Left())
    alone = record_episode(scene, seed=3)
    assert episode is not None and alone is not None
    assert episode["proprio"][0, 1] > alone["proprio"][0, 1] + 0.02
    assert not episode["perturbed"].any()


@needs_libero
def test_projection_finds_the_thing_that_was_moved(scene):
    scene.reset(0)
    before = scene.observe()["agentview"].astype(int)
    where = scene.project(scene.points("milk_1").mean(axis=0), "agentview")
    scene._env.sim.data.set_joint_qpos("milk_1_joint0", np.array([0, 0, -5, 1, 0, 0, 0]))
    scene._env.sim.forward()
    changed = np.abs(scene.observe()["agentview"].astype(int) - before).sum(-1) > 60
    rows, columns = np.nonzero(changed)
    np.testing.assert_allclose([columns.mean(), rows.mean()], where, atol=8)
