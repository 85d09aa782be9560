"""Many episodes: paired, interleaved, resumable, in several processes."""

import json
import threading
from concurrent import futures

import pytest
from toy_task import CAMERAS, OBJECTS, STEP_LIMIT, ToyScene, save_policy, tiny_policy, toy_task

from vla_pruner.evaluation import rollouts
from vla_pruner.evaluation.episode import Call, Condition, Control, Episode
from vla_pruner.evaluation.rollouts import EpisodeLog, Setup, evaluate, fingerprint, run_paired

NONE, HALF, QUARTER = map(Condition.parse, ["none", "vla-pruner@0.5", "vla-pruner@0.25"])
CONTROL = Control(CAMERAS, execute=2, reads_state=True)
SETUP = Setup("toy", "abc", CONTROL, STEP_LIMIT, OBJECTS)


def episode(condition: Condition, seed: int) -> Episode:
    call = Call(0, 12.5, False, 60, 32, 16, 90, 100)
    return Episode(condition.name, seed, 0, "pick up the cup", True, 7, [call])


# -- the log --------------------------------------------------------------------------------------


def test_a_log_gives_back_what_was_written(tmp_path):
    written = [episode(NONE, 1), episode(HALF, 1)]
    log = EpisodeLog(tmp_path / "log.jsonl", SETUP)
    for one in written:
        log.append(one)
    again = EpisodeLog(tmp_path / "log.jsonl", SETUP)
    assert again.of([NONE, HALF], [1, 2]) == written


def test_a_line_that_was_cut_off_is_dropped_and_written_anew(tmp_path):
    path = tmp_path / "log.jsonl"
    log = EpisodeLog(path, SETUP)
    log.append(episode(NONE, 1))
    log.append(episode(HALF, 1))
    path.write_bytes(path.read_bytes()[:-20])
    log = EpisodeLog(path, SETUP)
    assert log.missing([NONE, HALF], [1]) == [(HALF, 1)]
    log.append(episode(HALF, 1))
    assert len(EpisodeLog(path, SETUP).episodes) == 2


def test_a_file_that_holds_only_half_a_first_line_is_started_anew(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"format":')
    EpisodeLog(path, SETUP).append(episode(NONE, 1))
    assert len(EpisodeLog(path, SETUP).episodes) == 1


def test_a_damaged_log_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "log.jsonl"
    EpisodeLog(path, SETUP)
    with path.open("a") as file:
        file.write("not json\n" + json.dumps(episode(NONE, 1).as_dict()) + "\n")
    before = path.read_bytes()
    with pytest.raises(ValueError, match="damaged"):
        EpisodeLog(path, SETUP)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (Setup("toy", "xyz", CONTROL, STEP_LIMIT, OBJECTS), "weights"),
        (Setup("toy", "abc", CONTROL, 99, OBJECTS), "step_limit"),
        (Setup("toy", "abc", Control(CAMERAS, 1, True), STEP_LIMIT, OBJECTS), "control"),
    ],
)
def test_episodes_of_another_setup_are_not_mixed(tmp_path, other, what):
    EpisodeLog(tmp_path / "log.jsonl", SETUP)
    with pytest.raises(ValueError, match=f"another {what}"):
        EpisodeLog(tmp_path / "log.jsonl", other)


def test_the_same_scene_runs_under_all_conditions_before_the_next(tmp_path):
    work = EpisodeLog(tmp_path / "log.jsonl", SETUP).missing([NONE, HALF, QUARTER], [7, 8, 9, 10])
    assert [seed for _, seed in work] == [7] * 3 + [8] * 3 + [9] * 3 + [10] * 3
    first = [work[index][0] for index in (0, 3, 6, 9)]
    assert first == [NONE, HALF, QUARTER, NONE]


def test_a_fingerprint_follows_the_weights():
    policy = tiny_policy()
    before = fingerprint(policy)
    assert before == fingerprint(tiny_policy())
    policy.projector.fc1.bias[0] += 1
    assert fingerprint(policy) != before


def test_held_out_scenes_are_counted_from_the_first():
    assert toy_task().held_out(2) == [100, 101]
    assert toy_task().held_out(2, first=8) == [108, 109]
    for episodes, first in [(0, 0), (11, 0), (2, 9), (1, -1)]:
        with pytest.raises(ValueError, match="there are 10 scenes"):
            toy_task().held_out(episodes, first)


# -- in one process -------------------------------------------------------------------------------


def test_every_condition_starts_from_the_same_states():
    scene, policy = ToyScene(), tiny_policy()
    work = [(NONE, 100), (HALF, 100), (HALF, 101), (NONE, 101)]
    done = list(run_paired(policy, scene, work, SETUP))
    assert [(one.condition, one.seed) for one in done] == [(c.name, seed) for c, seed in work]
    warm_up, measured = scene.resets[:2], scene.resets[2:]
    assert warm_up == [(100, 0), (100, 0)]
    assert measured == [(100, 0), (100, 0), (101, 1), (101, 1)]


def test_only_the_seeds_asked_for_are_recorded():
    work = [(NONE, 100), (NONE, 101)]
    done = run_paired(tiny_policy(), ToyScene(), work, SETUP, record=lambda seed: seed == 101)
    assert [one.recording is not None for one in done] == [False, True]


def test_a_policy_is_left_as_it_was_when_an_episode_fails():
    policy, scene = tiny_policy(), ToyScene()
    scene.step = lambda action: 1 / 0
    with pytest.raises(ZeroDivisionError):
        list(run_paired(policy, scene, [(HALF, 100)], SETUP))
    assert len(policy.language_model.model._forward_pre_hooks) == 0
    done = list(run_paired(policy, ToyScene(), [(HALF, 100)], SETUP))
    assert done[0].success


# -- in several -----------------------------------------------------------------------------------


def test_an_evaluation_is_written_and_continued(tmp_path):
    name, out = save_policy(tmp_path / "policy"), tmp_path / "out"
    options = {"out": out, "workers": 2, "task": toy_task()}
    summary = evaluate(name, conditions=["none", "vla-pruner@0.5"], episodes=3, **options)
    assert [(row.name, row.successes, row.episodes) for row in summary.rows] == [
        ("none", 2, 3),
        ("vla-pruner@0.5", 2, 3),
    ]
    lines = (out / "results.jsonl").read_text().splitlines()
    assert len(lines) == 1 + 6
    written = json.loads((out / "summary.json").read_text())
    assert written["complete"]
    assert written["settings"]["seeds"] == [100, 102]
    assert written["environment"]["threads"] == 1
    assert "2 of 3" in (out / "summary.md").read_text()

    again = evaluate(name, conditions=["vla-pruner@0.5"], episodes=2, **options)
    assert (out / "results.jsonl").read_text().splitlines() == lines
    assert [(row.name, row.successes, row.episodes) for row in again.rows] == [
        ("vla-pruner@0.5", 2, 2)
    ]


def test_after_ctrl_c_what_is_running_is_finished_and_the_rest_left_out(monkeypatch):
    begun, release = threading.Event(), threading.Event()
    ran = []

    def run(condition: Condition, seed: int) -> Episode:
        ran.append(seed)
        begun.set()
        assert release.wait(30)
        return episode(condition, seed)

    def interrupted_wait(*args, **kwargs):
        monkeypatch.setattr(rollouts, "wait", futures.wait)
        assert begun.wait(30)
        threading.Timer(0.2, release.set).start()
        raise KeyboardInterrupt

    monkeypatch.setattr(rollouts, "_run_in_worker", run)
    monkeypatch.setattr(rollouts, "wait", interrupted_wait)
    with futures.ThreadPoolExecutor(1) as pool:
        finished = list(rollouts._finished(pool, [(NONE, 1), (NONE, 2), (NONE, 3)]))
    assert [one.seed for one in finished] == ran
    assert len(ran) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"workers": 0}, "at least one process"),
        ({"conditions": ["none", "none"]}, "different conditions"),
        ({"conditions": []}, "different conditions"),
        ({"episodes": 0}, "there are 10 scenes"),
    ],
)
def test_impossible_evaluations_are_refused_before_anything_is_loaded(tmp_path, change, message):
    options = {"conditions": ["none"], "episodes": 1, "out": tmp_path, "task": toy_task()}
    with pytest.raises(ValueError, match=message):
        evaluate("nowhere", **{**options, **change})
    assert list(tmp_path.iterdir()) == []
