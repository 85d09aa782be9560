"""The same recorded observations under every condition: what was answered, and how fast."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from vla_pruner.episodes.condition import Condition
from vla_pruner.episodes.policy_runner import Call, LocalPolicyRunner
from vla_pruner.measure.statistics import Interval, quantile, speedup_of
from vla_pruner.runs.replay import Recorded, TimedReplay, measure
from vla_pruner.tuning.deviation import Calls, Deviation, Scale, compare, summarise

Tick = Callable[[], None]


def _no_tick() -> None:
    """Nobody follows."""


@dataclass(frozen=True)
class Answers:
    """What a policy answered to an episode's observations under one condition.

    Args:
        actions: `[calls, chunk, dim]`, robot units.
        calls: what each cost.
    """

    actions: np.ndarray
    calls: tuple[Call, ...]

    @property
    def warm_up(self) -> np.ndarray:
        """Whether each call ran on all tokens under a pruning method `[calls]`."""
        return np.array([call.warm_up for call in self.calls])


def answer(
    policy: nn.Module, condition: Condition, episodes: Sequence[Recorded], tick: Tick = _no_tick
) -> list[Answers]:
    """Replay episodes under a condition, each with a history of its own.

    Call c of an episode draws the same noise under every condition.

    Args:
        policy: has `predict_action`.
        condition: what is done to it.
        episodes: observations in the order in which they were made.
        tick: called after each episode.

    Raises:
        ValueError: the method does not fit the policy, or decides by motion that was not recorded.
    """
    session = condition.attach(policy)
    try:
        return [_one(policy, session, condition, episode, tick) for episode in episodes]
    finally:
        if session is not None:
            session.remove()


def _one(
    policy: nn.Module, session: Any, condition: Condition, episode: Recorded, tick: Tick
) -> Answers:
    first = episode.observations[0]
    runner = LocalPolicyRunner(policy, session, arguments_of(first))
    if runner.wants_motion and episode.motion is None:
        raise ValueError(
            f"{condition.name} decides by how far the hand moved, which these observations do not "
            "tell; leave the method out, or record observations that have `motion`"
        )
    runner.begin(episode.scene)
    actions, calls = [], []
    for number, seen in enumerate(episode.observations):
        found = runner.act(seen["images"], seen["instruction"], seen.get("proprio"))
        actions.append(np.atleast_2d(found.actions))
        calls.append(found.call)
        if episode.motion is not None:
            runner.moved(episode.motion[number])
    runner.end()
    tick()
    return Answers(np.stack(actions), tuple(calls))


def arguments_of(observation: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `predict_action` beside images, instruction and state."""
    known = ("images", "instruction", "proprio")
    return {key: value for key, value in observation.items() if key not in known}


def deviation_of(
    episodes: Sequence[Recorded], full: Sequence[Answers], pruned: Sequence[Answers], scale: Scale
) -> tuple[Deviation, list[Calls]]:
    """How far the answers of a condition are from those on all tokens; together, and by call."""
    calls = [compare(a.actions, b.actions, scale) for a, b in zip(full, pruned, strict=True)]
    numbers = [episode.scene for episode in episodes]
    return summarise(numbers, calls, [one.warm_up for one in pruned], scale), calls


# -- latency, measured apart -----------------------------------------------------------------------


@dataclass(frozen=True)
class Latency:
    """Whole calls of a condition, images in, actions out, replayed in turn with all others.

    Args:
        p50_ms, p99_ms: of the calls that drop tokens (of all calls on all tokens).
        warm_up_ms: median of the calls that do not; None: there are none.
        speedup: median call on all tokens over median call here, warm-up included.
        interval: of the speed-up, 95 %; None: a single episode and round.
        count: calls behind p50 and p99.
    """

    p50_ms: float
    p99_ms: float
    warm_up_ms: float | None
    speedup: float
    interval: Interval | None
    count: int


def time_calls(
    policy: nn.Module,
    conditions: Sequence[Condition],
    episodes: Sequence[Recorded],
    rounds: int,
    tick: Tick = _no_tick,
) -> dict[str, Latency]:
    """Latency of every condition by name; the first one is the baseline, all tokens.

    Args:
        policy: under all conditions the same one.
        conditions: the first is compared with.
        episodes: what is replayed, `rounds` times.
        tick: called after each replay.
    """
    timed = measure(policy, conditions, episodes, rounds, tick)
    found: dict[str, list[TimedReplay]] = {condition.name: [] for condition in conditions}
    for replay in timed:
        found[replay.condition].append(replay)
    baseline = [one.latency_ms for one in found[conditions[0].name]]
    return {name: _latency(replays, baseline) for name, replays in found.items()}


def _latency(replays: Sequence[TimedReplay], baseline: Sequence[Sequence[float]]) -> Latency:
    warm = [ms for r in replays for ms, is_warm in _pairs(r) if is_warm]
    pruned = [ms for r in replays for ms, is_warm in _pairs(r) if not is_warm] or warm
    speedup, interval = speedup_of(baseline, [one.latency_ms for one in replays])
    return Latency(
        p50_ms=quantile(pruned, 0.5),
        p99_ms=quantile(pruned, 0.99),
        warm_up_ms=quantile(warm, 0.5) if warm else None,
        speedup=speedup,
        interval=interval,
        count=len(pruned),
    )


def _pairs(replay: TimedReplay) -> list[tuple[float, bool]]:
    return list(zip(replay.latency_ms, replay.warm_up, strict=True))
