"""Latency in tables for people: what was measured apart, and how fast a condition is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vla_pruner.episodes.condition import ALL_TOKENS
from vla_pruner.measure.statistics import Interval, ratio_of_means
from vla_pruner.reports.summary import (
    COST_NOTES,
    SUCCESS_NOTES,
    ConditionRow,
    Summary,
    speedup_text,
)
from vla_pruner.reports.summary import NOTES as LOOP_NOTES
from vla_pruner.reports.timings import Counted, Timing

COLUMNS = (
    "condition",
    "latency ms",
    "speed-up",
    "warm-up calls ms",
    "pruned calls ms",
    "speed-up, pruned calls",
    "peak memory",
    "in pruned calls",
    "counted FLOPs, call",
    "counted, decoder",
    "in pruned calls, decoder",
)

NOTES = (
    "Latency measured apart: each condition replayed the same recorded observations, in turn, "
    "{rounds} times, in one process; a call is timed from images to actions, after the device has "
    "finished what came before, and until it has finished. Latency: mean over the {calls} calls of "
    "the recorded episodes (a call is the median of its rounds), the calls in which a method still "
    "runs on all tokens included; these are also shown as warm-up calls. Speed-up: all tokens over "
    "this row on the same calls, 95 % bootstrap interval over rounds. Peak memory: largest that "
    "was allocated on the GPU, weights included; not measured on a CPU. Counted FLOPs: operations "
    "that torch ran, counted in a pass of its own, relative to all tokens on the same calls: whole "
    "calls, and the decoder in them with scores and search; the formula knows neither."
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
        *counted_cells(timing.counted),
    ]


def counted_cells(counted: Counted | None) -> list[str]:
    """Counted operations: of a call, of the decoder, of the decoder in pruned calls."""
    if counted is None:
        return ["-"] * 3
    return [
        share_text(counted.call),
        share_text(counted.decoder),
        "-" if counted.pruned_decoder is None else share_text(counted.pruned_decoder),
    ]


def share_text(share: float) -> str:
    """0.305 as "30.5 %"."""
    return f"{100 * share:.1f} %"


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


def pace(summary: Summary, row: ConditionRow) -> Pace:
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


@dataclass(frozen=True)
class WholeEpisodes:
    """How many times less time the policy takes from the first call of an episode to the last.

    Args:
        speedup: of all tokens over this, warm-up calls included; `interval` 95 %, None of one.
        scenes: that both solved, and that were compared; None: calls of one episode, replayed.
    """

    speedup: float
    interval: Interval | None
    scenes: int | None


def whole_episodes(summary: Summary, row: ConditionRow) -> WholeEpisodes | None:
    """The policy's time in whole episodes, against all tokens; None: nothing to compare.

    In the closed loop these are sums over the calls of an episode, and more calls count against a
    condition; the interval is drawn over scenes. Replays have the same calls under all conditions.
    """
    timing = summary.apart.get(row.name)
    if timing is not None:
        every = timing.every
        return None if every.speedup is None else WholeEpisodes(every.speedup, every.interval, None)
    spent: dict[str, dict[int, float]] = {row.name: {}, ALL_TOKENS: {}}
    for episode in summary.episodes:
        if episode.condition in spent and episode.success:
            spent[episode.condition][episode.seed] = sum(c.latency_ms for c in episode.calls)
    before, after = spent[ALL_TOKENS], spent[row.name]
    common = sorted(before.keys() & after.keys())
    if row.name == ALL_TOKENS or not common:
        return None
    ratio, interval = ratio_of_means([after[s] for s in common], [before[s] for s in common])
    return WholeEpisodes(ratio, interval, len(common))


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
