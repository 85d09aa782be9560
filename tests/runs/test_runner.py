"""Episodes in one process: the same initial states, warm-up apart, the policy left as it was."""

import dataclasses

import pytest

from toy_task import ToyScene, tiny_policy, toy_task
from vla_pruner.episodes.condition import Condition
from vla_pruner.runs.job import Job, Planned, Setup, fingerprint
from vla_pruner.runs.runner import EpisodeRunner

NONE, HALF = map(Condition.parse, ["none", "vla-pruner@0.5"])


def jobs(scene: ToyScene, *wanted: tuple[Condition, int], policy: str = "toy") -> list[Job]:
    suite = toy_task(scene)
    setup = Setup.of(policy, tiny_policy(), suite)
    plans = {c.name: Planned(setup, c, {}, None, 0, 9) for c in (NONE, HALF)}
    return [Job(plans[condition.name], suite, seed) for condition, seed in wanted]


def test_a_fingerprint_follows_the_weights():
    policy = tiny_policy()
    before = fingerprint(policy)
    assert before == fingerprint(tiny_policy())
    policy.projector.fc1.bias[0] += 1
    assert fingerprint(policy) != before


def test_a_setup_survives_json():
    setup = Setup.of("toy", tiny_policy(), toy_task())
    assert Setup.from_dict(setup.as_dict()) == setup


def test_scenes_are_counted_from_the_first():
    suite = toy_task()
    assert suite.held_out(2) == [100, 101]
    assert suite.held_out(2, first=8) == [108, 109]
    assert [(suite.task_of(s), suite.initial_state_of(s)) for s in (100, 101, 102)] == [
        (0, 0),
        (1, 0),
        (0, 1),
    ]
    for episodes, first in [(0, 0), (11, 0), (2, 9), (1, -1)]:
        with pytest.raises(ValueError, match="there are 10 scenes"):
            suite.held_out(episodes, first)


def test_every_condition_starts_from_the_same_states_and_warms_up_once():
    scene, runner = ToyScene(), EpisodeRunner(lambda name: tiny_policy())
    order = [(NONE, 100), (HALF, 100), (HALF, 101), (NONE, 101)]
    done = [runner.run(job) for job in jobs(scene, *order)]
    assert [(one.condition, one.seed) for one in done] == [(c.name, seed) for c, seed in order]
    warm_up, measured = [scene.resets[i] for i in (0, 2)], [scene.resets[i] for i in (1, 3, 4, 5)]
    assert warm_up == [(100, 0), (100, 0)]
    assert measured == [(100, 0), (100, 0), (101, 1), (101, 1)]


def test_the_same_episodes_run_twice_are_the_same_call_for_call():
    def run(order: list[tuple[Condition, int]]) -> dict:
        runner, done = EpisodeRunner(lambda name: tiny_policy()), {}
        for job in jobs(ToyScene(), *order):
            episode = runner.run(job)
            for call in episode.calls:
                call.latency_ms = 0.0
            done[episode.condition, episode.seed] = episode
        return done

    order = [(NONE, 100), (HALF, 100), (HALF, 101), (NONE, 101)]
    assert run(order) == run(order[::-1])


def test_what_is_open_stays_open_until_another_is_needed():
    opened, scene = [], ToyScene()

    def open_policy(name: str):
        opened.append(name)
        return tiny_policy()

    runner = EpisodeRunner(open_policy)
    for job in [*jobs(scene, (NONE, 100), (NONE, 101)), *jobs(scene, (NONE, 100), policy="other")]:
        runner.run(job)
    assert opened == ["toy", "other"]
    runner.close()
    assert scene.closed


def test_only_what_is_asked_for_is_recorded():
    runner = EpisodeRunner(lambda name: tiny_policy())
    first, second = jobs(ToyScene(), (NONE, 100), (NONE, 101))
    second = dataclasses.replace(second, record=True)
    assert runner.run(first).recording is None
    assert runner.run(second).recording is not None


def test_a_policy_is_left_as_it_was_when_an_episode_fails():
    policy, scene = tiny_policy(), ToyScene()
    step = scene.step
    scene.step = lambda action: 1 / 0
    runner, (job,) = EpisodeRunner(lambda name: policy), jobs(scene, (HALF, 100))
    with pytest.raises(ZeroDivisionError):
        runner.run(job)
    assert len(policy.language_model.model._forward_pre_hooks) == 0
    scene.step = step
    assert runner.run(job).success


def test_weights_that_changed_since_are_refused():
    changed = tiny_policy()
    changed.projector.fc1.bias[0] += 1
    runner, (job,) = EpisodeRunner(lambda name: changed), jobs(ToyScene(), (NONE, 100))
    with pytest.raises(ValueError, match="weights of toy are not those of the run"):
        runner.run(job)
