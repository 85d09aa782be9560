"""Latency of conditions that replayed the same observations: medians, speed-ups, intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from vla_pruner.episodes.condition import ALL_TOKENS
from vla_pruner.measure.statistics import Interval, median, quantile
from vla_pruner.runs.replay import TimedReplay

_DRAWS = 1000


@dataclass(frozen=True)
class Speed:
    """Latency of some calls in ms: the mean over calls of each call's median over rounds.

    `median_ms` and `p95_ms` are those of all calls in all rounds. `speedup` is the latency of all
    tokens on the same observations over this one, None without a baseline; `interval` its 95 %
    bootstrap interval over rounds, None of one round. `peak_mb` is the largest
    memory; None: unknown.
    """

    latency_ms: float
    median_ms: float
    p95_ms: float
    calls: int
    speedup: float | None
    interval: Interval | None
    peak_mb: float | None


@dataclass(frozen=True)
class Counted:
    """Floating-point operations that were counted, of all tokens on the same calls = 1.

    Args:
        call: of whole calls, those on all tokens included.
        decoder: of the decoder in them, scores and search included.
        pruned_call, pruned_decoder: the same over calls that dropped tokens; None: there are none.
    """

    call: float
    decoder: float
    pruned_call: float | None
    pruned_decoder: float | None


@dataclass(frozen=True)
class Timing:
    """What one condition took.

    Args:
        every: all calls, warm-up included.
        warm_up: the calls of a pruning method that ran on all tokens; None: there are none.
        pruned: the calls that dropped tokens; None: there are none.
        rounds: repetitions.
        counted: operations, where they were counted.
    """

    every: Speed
    warm_up: Speed | None
    pruned: Speed | None
    rounds: int
    counted: Counted | None = None


def timings(replays: Sequence[TimedReplay]) -> dict[str, Timing]:
    """The timing of every condition, by name.

    Raises:
        ValueError: conditions that did not replay the same calls equally often.
    """
    by_name: dict[str, list[TimedReplay]] = {}
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
    full = by_name.get(ALL_TOKENS)
    return {
        name: replace(_timing(own, tables[name], baseline), counted=_counted(own, full))
        for name, own in by_name.items()
    }


def _counted(own: Sequence[TimedReplay], full: Sequence[TimedReplay] | None) -> Counted | None:
    """Sums over the calls of all scenes, in the round in which they were counted."""
    mine, before = _counts(own), _counts(full or ())
    if len(mine) == 0 or len(mine) != len(before):
        return None
    pruned = ~np.array([w for one in sorted(own, key=_scene) if one.flops for w in one.warm_up])
    call, decoder = mine.sum(axis=0) / before.sum(axis=0)
    if own[0].condition == ALL_TOKENS or not pruned.any():
        return Counted(call, decoder, None, None)
    return Counted(call, decoder, *(mine[pruned].sum(axis=0) / before[pruned].sum(axis=0)))


def _counts(own: Sequence[TimedReplay]) -> np.ndarray:
    """Operations `[calls, 2]` of calls and of the decoder in them, scene by scene."""
    pairs = [
        pair
        for one in sorted(own, key=_scene)
        for pair in zip(one.flops or (), one.decoder_flops or (), strict=True)
    ]
    return np.array(pairs, dtype=np.float64).reshape(-1, 2)


def _scene(replay: TimedReplay) -> int:
    return replay.scene


def _timing(own: Sequence[TimedReplay], table: np.ndarray, baseline: np.ndarray | None) -> Timing:
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


def _table(own: Sequence[TimedReplay]) -> np.ndarray:
    """Latencies `[rounds, calls]`, the calls of all scenes one after the other."""
    rounds = _by_round(own)
    return np.array([[ms for one in each for ms in one.latency_ms] for each in rounds])


def _peaks(own: Sequence[TimedReplay]) -> np.ndarray | None:
    """Largest memory of each call over the rounds `[calls]`."""
    rounds = [[one.peak_mb for one in each] for each in _by_round(own)]
    if any(peak is None for each in rounds for peak in each):
        return None
    return np.array([[mb for peak in each for mb in peak or ()] for each in rounds]).max(axis=0)


def _by_round(own: Sequence[TimedReplay]) -> list[list[TimedReplay]]:
    rounds: dict[int, list[TimedReplay]] = {}
    for one in sorted(own, key=lambda one: (one.round, one.scene)):
        rounds.setdefault(one.round, []).append(one)
    return list(rounds.values())


def _latency(table: np.ndarray) -> float:
    return float(np.median(table, axis=0).mean())


def _speedup(before: np.ndarray, after: np.ndarray) -> tuple[float, Interval | None]:
    """Rounds are drawn in pairs: what slowed the machine slowed both. One has no interval."""
    if len(before) == 1:
        return _latency(before) / _latency(after), None
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(_DRAWS):
        rounds = rng.integers(len(before), size=len(before))
        drawn.append(_latency(before[rounds]) / _latency(after[rounds]))
    return _latency(before) / _latency(after), Interval(
        quantile(drawn, 0.025), quantile(drawn, 0.975)
    )
