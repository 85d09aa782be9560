"""Latency measured apart: the same observations for all, in turn, kept beside the episodes."""

import dataclasses
import sqlite3
from collections import Counter

import numpy as np
import pytest

from toy_task import ToyScene, rollout, save_policy, tiny_policy, toy_task
from vla_pruner.cli import main
from vla_pruner.commands.runs import latency
from vla_pruner.episodes.condition import Condition
from vla_pruner.episodes.observations import read_episode
from vla_pruner.reports.compare import read_runs
from vla_pruner.reports.document import to_markdown
from vla_pruner.reports.latency import cells as latency_cells
from vla_pruner.reports.report import blocks_of, rows_of
from vla_pruner.reports.timings import timings
from vla_pruner.runs import replay
from vla_pruner.runs.job import Setup
from vla_pruner.runs.replay import TimedReplay, measure, read_recorded, record, replay_once
from vla_pruner.runs.store import FILE, Store

NONE, HALF = map(Condition.parse, ["none", "vla-pruner@0.5"])
MOTION = Condition.parse("vla-adp@0.5")


def recorded(tmp_path, calls=99):
    policy, path = tiny_policy(), tmp_path / "a.npz"
    record(policy, ToyScene(), 102, 0, Setup.of("toy", policy, toy_task()), path)
    return read_recorded([path], calls)[0]


# -- the recording ---------------------------------------------------------------------------------


def test_what_is_recorded_is_what_the_policy_saw(tmp_path):
    policy, seen = tiny_policy(), []
    predict = policy.predict_action

    def watch(images, instruction, proprio=None):
        seen.append((images, instruction, proprio))
        return predict(images, instruction, proprio=proprio)

    policy.predict_action = watch
    setup = Setup.of("toy", policy, toy_task())
    rollout(policy, ToyScene(), 102, 0, control=setup.control, step_limit=12)
    episode = recorded(tmp_path)
    assert episode.scene == 102
    assert len(episode.observations) == len(seen) - 1 == 6
    for observation, (images, instruction, proprio) in zip(
        episode.observations, seen[1:], strict=True
    ):
        assert np.array_equal(observation["images"], images)
        assert np.array_equal(observation["proprio"], proprio)
        assert observation["instruction"] == instruction == "pick up the cup"
    assert episode.motion == pytest.approx([0.02 * 3**0.5] * 6)
    assert len(recorded(tmp_path, calls=4).observations) == 4
    assert read_episode(tmp_path / "a.npz")[1] == 102
    with pytest.raises(ValueError, match="from scene 102, too"):
        read_recorded([tmp_path / "a.npz", tmp_path / "a.npz"], 9)


# -- the replay ------------------------------------------------------------------------------------


def test_a_replay_gives_the_calls_of_the_episode_with_a_history_of_its_own(tmp_path):
    episode, policy = recorded(tmp_path), tiny_policy()
    kept = []
    predict = policy.predict_action

    def watch(**observation):
        actions = predict(**observation)
        kept.append(actions)
        return actions

    policy.predict_action = watch
    first, second = (replay_once(policy, HALF, episode, n) for n in (0, 1))
    assert first.warm_up == second.warm_up == (True, True, True, False, False, False)
    assert all(ms > 0 for ms in first.latency_ms) and first.peak_mb is None
    assert np.array_equal(kept[:6], kept[6:])
    assert replay_once(policy, NONE, episode, 0).warm_up == (False,) * 6


def test_conditions_take_turns_and_each_begins_a_round(tmp_path):
    episode, ticks = recorded(tmp_path), []
    other = dataclasses.replace(episode, scene=103)
    found = measure(tiny_policy(), [NONE, HALF], [episode, other], 3, lambda: ticks.append(1))
    none, half = NONE.name, HALF.name
    assert [(one.round, one.scene, one.condition) for one in found] == [
        *[(0, 102, none), (0, 102, half), (0, 103, none), (0, 103, half)],
        *[(1, 102, half), (1, 102, none), (1, 103, half), (1, 103, none)],
        *[(2, 102, none), (2, 102, half), (2, 103, none), (2, 103, half)],
    ]
    assert len(ticks) == 12


def test_a_method_that_decides_by_motion_is_told_it_or_refuses(tmp_path):
    episode = recorded(tmp_path)
    assert replay_once(tiny_policy(), MOTION, episode, 0).latency_ms
    with pytest.raises(ValueError, match="leave out --observations"):
        replay_once(tiny_policy(), MOTION, dataclasses.replace(episode, motion=None), 0)


# -- the numbers -----------------------------------------------------------------------------------


def made() -> list[TimedReplay]:
    """Two scenes of two calls, three rounds; the second round was disturbed for everybody."""
    found = []
    for number, slow in enumerate((1, 10, 1)):
        for scene in (1, 2):
            full, cut = (20.0 * slow, 30.0 * slow), (20.0 * slow, 10.0 * slow)
            found.append(TimedReplay("none", scene, number, full, (False, False), (90.0, 100.0)))
            found.append(TimedReplay("fastv@0.5", scene, number, cut, (True, False), (100.0, 60.0)))
    return found


def test_latency_is_the_mean_over_calls_of_their_median_round():
    none, cut = timings(made()).values()
    assert (none.every.latency_ms, none.every.calls, none.rounds) == (25.0, 4, 3)
    assert none.every.speedup is None and none.warm_up is None and none.pruned is None
    assert (cut.every.latency_ms, cut.warm_up.latency_ms, cut.pruned.latency_ms) == (15, 20, 10)
    assert (none.every.median_ms, none.every.p95_ms) == (30, 300)
    assert (cut.pruned.median_ms, cut.pruned.p95_ms) == (10, 100)
    assert cut.every.speedup == pytest.approx(25 / 15)
    assert cut.warm_up.speedup == pytest.approx(1)
    assert cut.pruned.speedup == pytest.approx(3)
    assert cut.pruned.interval.low == pytest.approx(3) == cut.pruned.interval.high
    assert (cut.every.peak_mb, cut.pruned.peak_mb, none.every.peak_mb) == (100, 60, 100)


def test_without_a_baseline_or_memory_there_is_no_speedup_and_no_peak():
    (cut,) = timings(
        [dataclasses.replace(one, peak_mb=None) for one in made() if one.condition != "none"]
    ).values()
    assert cut.pruned.speedup is None and cut.pruned.peak_mb is None


def test_one_round_has_no_interval():
    (_, cut) = timings([one for one in made() if one.round == 0]).values()
    assert cut.pruned.speedup == pytest.approx(3) and cut.pruned.interval is None
    assert latency_cells("half", cut)[2:6:3] == ["1.67x", "3.00x"]


def test_conditions_that_replayed_something_else_do_not_compare():
    with pytest.raises(ValueError, match="did not replay the same"):
        timings(made()[:-1])


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latency")
    policy = save_policy(folder / "policy")
    words = ["eval", "--policy", policy, "--suite", "toy_task:toy_task", "--episodes", "1"]
    words += ["--conditions", "none,vla-pruner@0.5", "--workers", "1", "--out", str(folder / "run")]
    assert main(words) == 0
    return folder / "run"


def replays(run) -> list[TimedReplay]:
    with Store(run) as store:
        return store.replays(store.planned()[0].setup)[0]


def test_the_command_records_replays_and_reports(run_folder, capsys, monkeypatch):
    assert "speed-up | of pruned calls |" in to_markdown(blocks_of(read_runs([run_folder])))
    words = ["latency", str(run_folder), "--rounds", "2", "--scenes", "2"]
    assert main(words) == 0
    found = replays(run_folder)
    assert Counter(one.condition for one in found) == {"none": 4, "vla-pruner@0.5": 4}
    assert sorted({one.scene for one in found}) == [100, 101]

    monkeypatch.setattr(replay, "record", None)  # Nothing is recorded again.
    assert main(words) == 0
    again = replays(run_folder)
    assert len(again) == len(found) and again != found

    groups = read_runs([run_folder])
    text = to_markdown(blocks_of(groups))
    header, _, none, half = text.partition("| policy |")[2].splitlines()[:4]
    assert header.endswith(
        "in pruned calls | latency ms | speed-up | warm-up calls ms | pruned calls ms | "
        "speed-up of pruned calls | peak memory | counted FLOPs, call | counted, decoder |"
    )
    timing = groups[0].timings["vla-pruner@0.5"]
    assert f"| {timing.every.latency_ms:.1f} | {timing.every.speedup:.2f}x (" in half
    assert f"| {timing.warm_up.latency_ms:.1f} | {timing.pruned.latency_ms:.1f} |" in half
    counted = timing.counted
    assert half.endswith(f"| - | {100 * counted.call:.1f} % | {100 * counted.decoder:.1f} % |")
    assert counted.pruned_decoder < counted.decoder
    assert groups[0].timings["none"].counted.call == 1
    assert "x (" not in none
    assert "replayed the same recorded observations, in turn, 2 times" in text
    assert "Measured with: date: " in text
    row = rows_of(groups)[1]
    assert row["replayed.pruned.speedup"] == timing.pruned.speedup
    assert capsys.readouterr().out


def test_observations_of_a_folder_need_no_scene(run_folder, tmp_path, monkeypatch):
    episode_folder = next(run_folder.glob("observations/*/*"))
    monkeypatch.setattr(latency, "open_suite", None)
    words = ["latency", str(run_folder), "--rounds", "1", "--calls", "5"]
    assert main([*words, "--observations", str(episode_folder)]) == 0
    assert {len(one.latency_ms) for one in replays(run_folder)} <= {4, 5}
    assert main([*words, "--observations", str(tmp_path)]) == 2


def test_an_interruption_keeps_what_was_measured_before(run_folder, monkeypatch):
    assert main(["latency", str(run_folder), "--rounds", "1"]) == 0
    before = replays(run_folder)

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(replay, "replay_once", interrupt)
    assert main(["latency", str(run_folder)]) == 130
    assert replays(run_folder) == before


def test_impossible_requests_say_why(run_folder, tmp_path, monkeypatch, capsys):
    assert main(["latency", str(tmp_path)]) == 2
    assert "holds no episodes.sqlite" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["latency", str(run_folder), "--rounds", "0"])
    assert "--rounds: 0 is no whole number of at least 1" in capsys.readouterr().err
    changed = tiny_policy()
    changed.projector.fc1.bias[0] += 1
    monkeypatch.setattr(latency, "load", lambda name, device: changed)
    assert main(["latency", str(run_folder)]) == 2
    assert "are not those of the run" in capsys.readouterr().err


def test_a_store_from_before_there_were_replays_is_read_and_extended(run_folder, tmp_path):
    old = tmp_path / FILE
    with sqlite3.connect(run_folder / FILE) as source, sqlite3.connect(old) as target:
        source.backup(target)
        target.execute("DROP TABLE replays")
    with Store(tmp_path) as store:
        setup = store.planned()[0].setup
        assert store.replays(setup) == ([], {})
    assert read_runs([tmp_path])[0].timings == {}
    with Store(tmp_path, write=True) as store:
        assert store.replays(setup) == ([], {})
