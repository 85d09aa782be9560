"""Latency of conditions on the same observations, replayed in turn: what was measured, summarised.

A *replay* is one pass of a policy under one condition over the recorded observations of an episode,
history and warm-up included. Every condition replays every episode in every round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vla_pruner.evaluation.episode import ALL_TOKENS
from vla_pruner.evaluation.statistics import Interval, median, quantile
from vla_pruner.evaluation.summary import COST_NOTES, SUCCESS_NOTES, Row, Summary, speedup_text
from vla_pruner.evaluation.summary import NOTES as LOOP_NOTES

_DRAWS = 1000


@dataclass(frozen=True)
class Replay:
    """One pass over the observations of an episode.

    Args:
        condition: name.
        scene: number of the recorded episode.
        round: which repetition.
        latency_ms: of each call of the policy.
        warm_up: whether a call ran on all tokens under a pruning method.
        peak_mb: largest memory that was allocated during a call, weights included; None: unknown.
    """

    condition: str
    scene: int
    round: int
    latency_ms: tuple[float, ...]
    warm_up: tuple[bool, ...]
    peak_mb: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Speed:
    """Latency of some calls in ms: the mean over calls of each call's median over rounds.

    `median_ms` and `p95_ms` are those of all calls in all rounds. `speedup` is the latency of all
    tokens on the same observations over this one, `interval` its 95 % bootstrap interval over
    rounds; None without a baseline. `peak_mb` is the largest memory; None: unknown.
    """

    latency_ms: float
    median_ms: float
    p95_ms: float
    calls: int
    speedup: float | None
    interval: Interval | None
    peak_mb: float | None


@dataclass(frozen=True)
class Timing:
    """What one condition took.

    Args:
        every: all calls, warm-up included.
        warm_up: the calls of a pruning method that ran on all tokens; None: there are none.
        pruned: the calls that dropped tokens; None: there are none.
        rounds: repetitions.
    """

    every: Speed
    warm_up: Speed | None
    pruned: Speed | None
    rounds: int


def timings(replays: Sequence[Replay]) -> dict[str, Timing]:
    """The timing of every condition, by name.

    Raises:
        ValueError: conditions that did not replay the same calls equally often.
    """
    by_name: dict[str, list[Replay]] = {}
    for replay in replays:
        by_name.setdefault(replay.condition, []).append(replay)
    lengths = [
        sorted((one.round, one.scene, len(one.latency_ms)) for one in own)
        for own in by_name.values()
    ]
    if any(length != lengths[0] for length in lengths):
        raise ValueError("the conditions did not replay the same observations equally often")
    tables = {name: _table(own) for name, own in by_name.items()}
    baseline = tables.get(ALL_TOKENS)
    return {name: _timing(own, tables[name], baseline) for name, own in by_name.items()}


def _timing(own: Sequence[Replay], table: np.ndarray, baseline: np.ndarray | None) -> Timing:
    first = sorted((one for one in own if one.round == own[0].round), key=lambda one: one.scene)
    warm_up = np.array([flag for one in first for flag in one.warm_up])
    pruning = own[0].condition != ALL_TOKENS
    peaks = _peaks(own)

    def speed(chosen: np.ndarray) -> Speed | None:
        if not chosen.any():
            return None
        mine = table[:, chosen]
        speedup, interval = None, None
        if pruning and baseline is not None:
            speedup, interval = _speedup(baseline[:, chosen], mine)
        peak = None if peaks is None else float(peaks[chosen].max())
        return Speed(
            latency_ms=_latency(mine),
            median_ms=median(mine.ravel().tolist()),
            p95_ms=quantile(mine.ravel().tolist(), 0.95),
            calls=int(chosen.sum()),
            speedup=speedup,
            interval=interval,
            peak_mb=peak,
        )

    every = speed(np.ones_like(warm_up))
    assert every is not None
    if not pruning:
        return Timing(every, None, None, len(table))
    return Timing(every, speed(warm_up), speed(~warm_up), len(table))


def _table(own: Sequence[Replay]) -> np.ndarray:
    """Latencies `[rounds, calls]`, the calls of all scenes one after the other."""
    rounds = _by_round(own)
    return np.array([[ms for one in each for ms in one.latency_ms] for each in rounds])


def _peaks(own: Sequence[Replay]) -> np.ndarray | None:
    """Largest memory of each call over the rounds `[calls]`."""
    rounds = [[one.peak_mb for one in each] for each in _by_round(own)]
    if any(peak is None for each in rounds for peak in each):
        return None
    return np.array([[mb for peak in each for mb in peak or ()] for each in rounds]).max(axis=0)


def _by_round(own: Sequence[Replay]) -> list[list[Replay]]:
    rounds: dict[int, list[Replay]] = {}
    for one in sorted(own, key=lambda one: (one.round, one.scene)):
        rounds.setdefault(one.round, []).append(one)
    return list(rounds.values())


def _latency(table: np.ndarray) -> float:
    return float(np.median(table, axis=0).mean())


def _speedup(before: np.ndarray, after: np.ndarray) -> tuple[float, Interval]:
    """Rounds are drawn in pairs: what slowed the machine in a round slowed both."""
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(_DRAWS):
        rounds = rng.integers(len(before), size=len(before))
        drawn.append(_latency(before[rounds]) / _latency(after[rounds]))
    return _latency(before) / _latency(after), Interval(
        quantile(drawn, 0.025), quantile(drawn, 0.975)
    )


# -- tables --------------------------------------------------------------------------------------

COLUMNS = (
    "condition",
    "latency ms",
    "speed-up",
    "warm-up calls ms",
    "pruned calls ms",
    "speed-up, pruned calls",
    "peak memory",
    "in pruned calls",
)

NOTES = (
    "Latency measured apart: each condition replayed the same recorded observations, in turn, "
    "{rounds} times, in one process; a call is timed from images to actions, after the device has "
    "finished what came before, and until it has finished. Latency: mean over the {calls} calls of "
    "the recorded episodes (a call is the median of its rounds), the calls in which a method still "
    "runs on all tokens included; these are also shown as warm-up calls. Speed-up: all tokens over "
    "this row on the same calls, 95 % bootstrap interval over rounds. Peak memory: largest that "
    "was allocated on the GPU, weights included; not measured on a CPU."
)


def cells(label: str, timing: Timing) -> list[str]:
    """One row of a table for people, in the order of `COLUMNS`."""
    every, warm_up, pruned = timing.every, timing.warm_up, timing.pruned
    return [
        label,
        f"{every.latency_ms:.1f}",
        speedup_text(every.speedup, every.interval),
        f"{warm_up.latency_ms:.1f}" if warm_up else "-",
        f"{pruned.latency_ms:.1f}" if pruned else "-",
        speedup_text(pruned.speedup, pruned.interval) if pruned else "-",
        memory_text(every.peak_mb),
        memory_text(pruned.peak_mb if pruned else None),
    ]


def notes(found: Mapping[str, Timing]) -> str:
    """How the timings of one policy in one suite were measured."""
    one = next(iter(found.values()))
    return NOTES.format(rounds=one.rounds, calls=one.every.calls)


@dataclass(frozen=True)
class Pace:
    """How fast a condition is: measured apart where it was, in the closed loop otherwise.

    Latency in ms, speed-up over all tokens.
    """

    median_ms: float
    p95_ms: float
    pruned_ms: float | None
    speedup: float | None
    interval: Interval | None
    pruned_speedup: float | None


def pace(summary: Summary, row: Row) -> Pace:
    """What a short report says of one condition's speed."""
    timing = summary.apart.get(row.name)
    if timing is None:
        every, some = row.all_calls, row.pruned_calls
        return Pace(
            every.median_ms,
            every.p95_ms,
            some.median_ms if some else None,
            every.speedup,
            every.interval,
            some.speedup if some else None,
        )
    pruned = timing.pruned
    return Pace(
        timing.every.median_ms,
        timing.every.p95_ms,
        pruned.median_ms if pruned else None,
        timing.every.speedup,
        timing.every.interval,
        pruned.speedup if pruned else None,
    )


def pace_notes(summary: Summary) -> str:
    """How the numbers of a short report were obtained."""
    if not summary.apart:
        return LOOP_NOTES
    one = next(iter(summary.apart.values()))
    return (
        f"{SUCCESS_NOTES}speed-up by bootstrap over rounds. Latency and speed-up were measured "
        f"after the episodes: each condition replayed the {one.every.calls} calls of the first "
        f"scene in turn, {one.rounds} times; speed-up compares the mean over these calls of each "
        f"one's median. {COST_NOTES}"
    )


def memory_text(peak_mb: float | None) -> str:
    """Memory in MiB."""
    return "-" if peak_mb is None else f"{peak_mb:.0f} MiB"
