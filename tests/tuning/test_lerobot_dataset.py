"""LeRobotDatasets: what lerobot itself wrote (v3.0), what its layout says (v2.1), and damage."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pyarrow", reason="needs pip install 'vla-pruner[tune]'")
pytest.importorskip("av", reason="needs pip install 'vla-pruner[tune]'")
sys.path.insert(0, str(Path(__file__).parent))

from old_dataset import VIEWS, change_info, change_table, write_lines, write_old
from write_dataset import FPS, LENGTHS, TASKS, action_of, brightness, state_of

from toy_task import tiny_policy
from vla_pruner.tuning.lerobot_dataset import read_dataset
from vla_pruner.tuning.sources import open_source

NEW = Path(__file__).with_name("dataset-v3")
ALL = {"episodes": 9, "calls": 99, "stride": 1}
FIRST = Path("data/chunk-000/episode_000000.parquet")
LOSSY = 3  # of 255: what a video codec may change of a grey image


@pytest.fixture(scope="session")
def old(tmp_path_factory):
    return write_old(tmp_path_factory.mktemp("old") / "dataset")


@pytest.fixture
def broken(old, tmp_path):
    return Path(shutil.copytree(old, tmp_path / "dataset"))


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
@pytest.mark.parametrize("stride", [1, 3])
def test_every_frame_is_the_one_that_was_written(version, stride, old):
    source = read_dataset(NEW if version == "v3.0" else old, **{**ALL, "stride": stride})
    assert source.kind == f"lerobot {version}"
    assert [one.scene for one in source.episodes] == [0, 1, 2]
    for number, (episode, actions) in enumerate(zip(source.episodes, source.actions, strict=True)):
        frames = range(0, LENGTHS[number], stride)
        assert len(episode.observations) == len(frames)
        for place, frame in enumerate(frames):
            seen = episode.observations[place]
            assert seen["instruction"] == TASKS[number]
            np.testing.assert_allclose(seen["proprio"], state_of(number, frame), rtol=1e-6)
            np.testing.assert_allclose(actions[place], action_of(number, frame), atol=1e-6)
            for camera, image in enumerate(seen["images"]):
                assert image.dtype == np.uint8 and image.shape == (64, 64, 3)
                assert abs(image.mean() - brightness(number, frame, camera)) <= LOSSY


def test_some_episodes_some_frames_cameras_in_another_order(old):
    source = read_dataset(old, episodes=2, calls=3, stride=2, cameras=["hand", "front"])
    assert [one.scene for one in source.episodes] == [0, 2]
    assert [len(one.observations) for one in source.episodes] == [3, 3]
    views = source.episodes[1].observations[1]["images"]
    for view, camera in zip(views, (1, 0), strict=True):
        assert abs(view.mean() - brightness(2, 2, camera)) <= LOSSY
    said = read_dataset(old, **ALL, task="pour the tea")
    assert {o["instruction"] for e in said.episodes for o in e.observations} == {"pour the tea"}


def test_the_digest_follows_everything_that_is_shown(old):
    one = read_dataset(old, **ALL).digest
    assert one == read_dataset(old, **ALL).digest
    assert one != read_dataset(old, **ALL, task="pour the tea").digest
    assert one != read_dataset(old, **{**ALL, "stride": 2}).digest


def spoil_video(folder):
    (folder / "videos/chunk-000" / VIEWS[1] / "episode_000001.mp4").write_bytes(b"no video")


def swap_frames(folder):
    change_table(folder / FIRST, frame_index=[0, 2, 1, 3, 4, 5, 6])


def nan_state(folder):
    change_table(folder / FIRST, **{"observation.state": [[float("nan")] * 8] * 7})


def short_action(folder):
    change_table(folder / FIRST, action=[[0.0] * 6] * 7)


def cut_episode(folder):
    write_lines(folder / "meta/episodes.jsonl", [{"episode_index": 0, "length": 7}])


def long_episode(folder):
    rows = [{"episode_index": e, "length": n} for e, n in enumerate((7, 9, 5))]
    write_lines(folder / "meta/episodes.jsonl", rows)
    other = folder / "videos/chunk-000" / VIEWS[0]
    shutil.copy(other / "episode_000002.mp4", other / "episode_000000.mp4")


DAMAGE = {
    "version": (lambda f: change_info(f, codebase_version="v1.6"), "v2.1 and v3.0 are read here"),
    "no fps": (lambda f: change_info(f, fps=0), "is no rate of frames"),
    "other fps": (lambda f: change_info(f, fps=2 * FPS), "is not the one that was recorded"),
    "no camera": (lambda f: change_info(f, features={}), "has no camera"),
    "no info": (lambda f: (f / "meta/info.json").write_text("{"), "describes no LeRobotDataset"),
    "nothing recorded": (lambda f: change_info(f, total_episodes=0), "record some first"),
    "path leaves": (lambda f: change_info(f, data_path="../x.parquet"), "leaves the dataset"),
    "path nonsense": (lambda f: change_info(f, video_path="{nobody}"), "is not understood"),
    "no table": (lambda f: (f / FIRST).unlink(), "it is not there"),
    "no parquet": (lambda f: (f / FIRST).write_bytes(b"PAR1"), "is damaged"),
    "lost column": (lambda f: change_table(f / FIRST, timestamp=None), "lacks the columns timesta"),
    "order": (swap_frames, "not 0 to 6 in order"),
    "nan": (nan_state, "observation.state holds NaN or infinite"),
    "action": (short_action, r"action is not \(7,\) in every frame"),
    "tasks": (lambda f: write_lines(f / "meta/tasks.jsonl", []), "which meta/tasks does not name"),
    "interrupted": (cut_episode, "counts 3 episodes, meta/episodes has 1"),
    "no video": (lambda f: shutil.rmtree(f / "videos"), "a video that the dataset names"),
    "spoilt video": (spoil_video, "is no video that can be read"),
    "short video": (long_episode, "the video is shorter than its episodes"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(damage, broken):
    change, words = DAMAGE[damage]
    change(broken)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        read_dataset(broken, **ALL)


def test_a_video_at_another_rate_is_refused(tmp_path):
    folder = write_old(tmp_path / "dataset", video_fps=2 * FPS)
    with pytest.raises(ValueError, match="shows 20 frames a second"):
        read_dataset(folder, **ALL)


def test_a_camera_that_is_not_there_is_refused_with_those_that_are(old):
    with pytest.raises(ValueError, match=r"--cameras 'top': the dataset has observation\.images"):
        read_dataset(old, **ALL, cameras=["top"])


def test_what_the_policy_cannot_read_is_refused(old):
    options = {"episodes": 2, "calls": 4, "execute": 2}
    assert open_source(old, tiny_policy(), **options).calls == 7
    with pytest.raises(ValueError, match="has 1 camera, the policy reads 2"):
        open_source(old, tiny_policy(), cameras=["front"], **options)
    statistics = {"q01": [-1.0] * 8, "q99": [1.0] * 8, "mask": [True] * 8}
    wide = tiny_policy(
        action_dim=8, norm_stats={"toy": {"action": statistics, "proprio": statistics}}
    )
    with pytest.raises(ValueError, match="actions have 7 numbers, the policy's have 8"):
        open_source(old, wide, **options)
