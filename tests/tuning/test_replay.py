"""Replays give what a policy would have answered in that episode, at that call."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import vla_pruner as vp
from toy_task import tiny_policy
from vla_pruner.episodes.condition import Condition
from vla_pruner.runs.replay import TimedReplay
from vla_pruner.tuning import replay as module
from vla_pruner.tuning.deviation import Scale
from vla_pruner.tuning.replay import answer, deviation_of, time_calls
from vla_pruner.tuning.tune import BASELINE

QUARTER = Condition.parse("vla-pruner@0.25:window=1:layer=1")


def test_answers_are_those_of_the_policy_called_by_hand_in_order(policy, episodes):
    found = answer(policy, QUARTER, episodes)
    with vp.prune(policy, "vla-pruner", keep=0.25, window=1, layer=1) as session:
        for one, episode in zip(found, episodes, strict=True):
            session.reset()
            for number, seen in enumerate(episode.observations):
                by_hand = policy.predict_action(**seen)
                np.testing.assert_array_equal(one.actions[number], by_hand)
    assert [len(one.calls) for one in found] == [len(e.observations) for e in episodes]
    assert [one.warm_up.tolist()[:3] for one in found] == [[True, False, False]] * 2


def test_order_and_history_matter_and_episodes_do_not_leak(policy, episodes):
    """With another order the history is another, so the answers to the same moments differ."""
    long = max(episodes, key=lambda one: len(one.observations))
    seen = long.observations
    forward = answer(policy, QUARTER, [long])[0].actions
    swapped = (seen[0], *reversed(seen[1:]))
    backward = answer(policy, QUARTER, [replace(long, observations=swapped)])[0].actions
    back = np.concatenate([backward[:1], backward[:0:-1]])
    np.testing.assert_array_equal(forward[0], back[0])
    assert np.abs(forward[2:] - back[2:]).max() > 1e-6
    alone = answer(policy, QUARTER, [episodes[1]])[0].actions
    np.testing.assert_array_equal(alone, answer(policy, QUARTER, episodes)[1].actions)


def test_all_tokens_deviate_by_nothing_and_a_budget_of_all_by_nothing(policy, episodes):
    full = answer(policy, BASELINE, episodes)
    scale = Scale.of([one.actions for one in full], execute=2)
    for condition in (BASELINE, Condition.parse("fastv@1.0:layer=1")):
        found, _ = deviation_of(episodes, full, answer(policy, condition, episodes), scale)
        assert (found.mean, found.worst, found.flips, found.chunk) == (0, 0, 0, 0)
    found, calls = deviation_of(episodes, full, answer(policy, QUARTER, episodes), scale)
    assert found.mean > 0 and found.warm_up == pytest.approx(2 / found.calls)
    assert all(one.moved[0] == 0 for one in calls)  # the warm-up runs on all tokens


def test_a_policy_that_draws_noise_draws_the_same_again(policy, episodes):
    noisy = tiny_policy()
    certain = noisy.predict_action

    def predict_action(images, instruction, proprio=None):
        action = certain(images, instruction, proprio)
        return action + torch.randn(action.shape).numpy()

    noisy.predict_action = predict_action
    first, second = (answer(noisy, BASELINE, episodes) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one.actions, other.actions)
    quiet = answer(policy, BASELINE, episodes)
    assert np.abs(first[0].actions - quiet[0].actions).mean() > 0.3
    assert np.abs(first[0].actions[0] - first[0].actions[1]).max() > 0


def test_motion_is_told_to_methods_that_decide_by_it_and_missed_where_it_is_not(policy, episodes):
    adp = Condition.parse("vla-adp@0.5:layer=1")
    assert answer(policy, adp, episodes)[0].actions.shape[-1] == 7
    with pytest.raises(ValueError, match="which these observations do not tell"):
        answer(policy, adp, [replace(one, motion=None) for one in episodes])


def test_latency_is_of_calls_that_drop_tokens_and_the_speedup_of_all(policy, episodes, monkeypatch):
    def measure(policy, conditions, given, rounds, tick):
        warm = (True, False, False)
        return [
            TimedReplay(c.name, e.scene, r, (8.0, ms, ms + r), warm if ms < 8 else (False,) * 3)
            for r in range(rounds)
            for e in given
            for c, ms in zip(conditions, (8.0, 2.0), strict=True)
        ]

    monkeypatch.setattr(module, "measure", measure)
    found = time_calls(policy, [BASELINE, QUARTER], episodes, 2)
    assert found["none"].speedup == 1 and found["none"].warm_up_ms is None
    pruned = found[QUARTER.name]
    assert (pruned.warm_up_ms, pruned.count) == (8.0, 8)
    assert pruned.p50_ms == 2.0 and 2.0 < pruned.p99_ms <= 3.0
    assert pruned.speedup == pytest.approx(8 / 2.5)
