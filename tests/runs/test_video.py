"""Videos: a frame per step, dropped patches dimmed, written once, never at the cost of episodes."""

import dataclasses
import sys

import numpy as np
import pytest

from toy_task import ToyScene, save_policy, tiny_policy, toy_task
from vla_pruner.episodes.condition import Condition
from vla_pruner.runs import execute, video
from vla_pruner.runs.execute import run_cells
from vla_pruner.runs.job import Job, Planned, Setup
from vla_pruner.runs.matrix import Cell
from vla_pruner.runs.processes import Processes
from vla_pruner.runs.runner import EpisodeRunner
from vla_pruner.runs.store import Store

ffmpeg = pytest.importorskip(
    "imageio_ffmpeg", reason="no encoder is installed: pip install 'vla-pruner[sim]'"
)
NONE, HALF = map(Condition.parse, ["none", "vla-pruner@0.5"])


def recorded(condition: Condition) -> dict:
    """Scene 102 (not solved, 12 steps, 6 calls) as a recording."""
    suite = toy_task(ToyScene())
    setup = Setup.of("toy", tiny_policy(), suite)
    job = Job(Planned(setup, condition, {}, None, 0, 9), suite, 102, record=True)
    return EpisodeRunner(lambda name: tiny_policy()).run(job).recording


def decoded(path) -> tuple[dict, list[np.ndarray]]:
    reader = ffmpeg.read_frames(str(path))
    meta = next(reader)
    width, height = meta["size"]
    return meta, [np.frombuffer(data, np.uint8).reshape(height, width, 3) for data in reader]


def test_dropped_patches_are_dark_and_kept_ones_are_as_they_were():
    plain, cut = recorded(NONE), recorded(HALF)
    assert cut["grids"] == [4, 4]
    full = [*video.frames({**cut, "calls": plain["calls"]})]
    seen = [*video.frames(cut)]
    assert len(seen) == cut["frames"] == 13
    side, width = seen[0].shape[0], seen[0].shape[1]
    assert width == 2 * side >= 512 and side % 2 == 0
    starts = [call["step"] for call in cut["calls"]]
    for number, (before, after) in enumerate(zip(full, seen, strict=True)):
        call = cut["calls"][max(i for i, start in enumerate(starts) if start <= number)]
        for token, reason in enumerate(call["kept"]):
            camera, cell = divmod(token, 16)
            y, x = ((np.array(divmod(cell, 4)) + 0.5) * side / 4).astype(int)
            pixel = (y, x + camera * side)
            wanted = before[pixel] if reason != "0" else 0.22 * before[pixel] + 0.78 * video._SHADE
            assert np.allclose(after[pixel], wanted, atol=0.51)
    assert any("0" in call["kept"] for call in cut["calls"])


def test_a_video_plays_at_the_speed_of_the_scene(tmp_path):
    recording = recorded(HALF)
    video.write_video(tmp_path / "a" / "b.mp4", recording, hz=5)
    meta, pictures = decoded(tmp_path / "a" / "b.mp4")
    assert meta["codec"] == "h264" and meta["fps"] == 5
    wanted = [*video.frames(recording)]
    assert len(pictures) == len(wanted)
    errors = [np.abs(p.astype(float) - w).mean() for p, w in zip(pictures, wanted, strict=True)]
    assert max(errors) < 8
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.mp4"]


def test_a_video_that_cannot_be_written_is_an_error_that_says_where(tmp_path, monkeypatch):
    monkeypatch.setattr(video, "encoder", lambda: "false")
    with pytest.raises(OSError, match=r"cannot write .*b\.mp4"):
        video.write_video(tmp_path / "b.mp4", recorded(NONE), hz=5)
    assert not [*tmp_path.iterdir()]


def test_the_first_episodes_of_each_condition_are_filmed_once(tmp_path, monkeypatch):
    policy = save_policy(tmp_path / "policy")
    cells = [Cell(policy, "toy_task:toy_task", condition, 3) for condition in (NONE, HALF)]
    out = tmp_path / "out"
    written = []

    def write(path, recording, hz):
        written.append(path.relative_to(out / "videos").parts[2:])
        path.parent.mkdir(parents=True, exist_ok=True)
        video.write_video(path, recording, hz)

    monkeypatch.setattr(execute, "write_video", write)
    assert run_cells(cells, out, Processes(1), videos=2)
    wanted = [(c.name, f"{seed}.mp4") for c in (NONE, HALF) for seed in (100, 101)]
    assert sorted(written) == wanted
    assert len([*out.glob("videos/*/policy-*/*/*.mp4")]) == 4
    assert run_cells(cells, out, Processes(1), videos=3)
    assert len(written) == 4, "a finished episode was run again for its video"
    with Store(out) as store:
        assert len(store.finished(store.planned()[0].setup)) == 6


def test_policies_of_one_name_and_conditions_with_options_have_their_own_folders(tmp_path):
    setup = Setup.of("runs/toy", tiny_policy(), toy_task())
    windows = [Condition.parse(f"vla-pruner@0.5:window={n}") for n in (1, 2)]
    jobs = [Job(Planned(setup, one, {}, None, 0, 9), toy_task(), 100) for one in windows]
    other = dataclasses.replace(setup, policy="elsewhere/toy", weights="abc")
    jobs.append(Job(Planned(other, windows[0], {}, None, 0, 9), toy_task(), 100))
    paths = [video.video_path(tmp_path, one.setup, one.condition.name, one.seed) for one in jobs]
    assert len(set(paths)) == 3
    assert paths[0].parent.name == "vla-pruner@0.5_window=1"
    assert all(path.relative_to(tmp_path).parts[0] == "videos" for path in paths)


def test_a_missing_encoder_is_said_before_the_first_episode(tmp_path, monkeypatch, capsys):
    from vla_pruner.cli import main

    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    words = ["eval", "--suite", "toy_task:toy_task", "--out", str(tmp_path / "out"), "--video", "1"]
    assert main(words) == 1
    assert "pip install 'vla-pruner[sim]'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*words[:-1], "-1"])
    assert "--video: -1" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
