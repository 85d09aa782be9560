"""From episodes to one row of numbers per condition: JSON, CSV, Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from vla_pruner.episodes.condition import ALL_TOKENS, Condition
from vla_pruner.episodes.episode import Episode
from vla_pruner.episodes.motion import MotionRow, compare_motion
from vla_pruner.episodes.policy_runner import Call
from vla_pruner.measure.statistics import (
    Interval,
    holm,
    median,
    paired_success,
    quantile,
    speedup_of,
    wilson,
)
from vla_pruner.reports.files import flat, to_csv
from vla_pruner.reports.timings import Timing


@dataclass(frozen=True)
class Latency:
    """Latency of a set of calls, in ms, and how much faster the baseline's median makes it.

    `speedup` is the median of the baseline over the median of this, on the scenes that both
    finished, None without a baseline; `interval` its 95 % bootstrap interval, None of one scene.
    """

    median_ms: float
    p95_ms: float
    calls: int
    speedup: float | None
    interval: Interval | None


@dataclass(frozen=True)
class LiveRow:
    """What came of time that did not wait, see `vla_pruner.scenes.clock`.

    Args:
        delay: mean steps from an observation until the actions that answer it, over calls;
            `delay_max` the longest.
        held: mean steps of an episode in which the robot held still; `held_share` of all steps.
    """

    delay: float
    delay_max: int
    held: float
    held_share: float


@dataclass(frozen=True)
class ConditionRow:
    """One condition. Intervals are 95 %.

    Args:
        name, label: the condition, for programs and for people.
        episodes, successes: finished episodes.
        success: success rate in [0, 1], `success_interval` its Wilson interval.
        gained, lost, pairs: scenes that only this condition or only the baseline solved, out of the
            scenes that both finished; None for the baseline.
        difference: success rate minus the baseline's on these scenes, `difference_interval` its
            score interval, `p_value` of the exact test, `p_holm` corrected for the rows beside it.
        steps: median number of steps of the successful episodes.
        all_calls: latency of every call of the policy.
        pruned_calls: latency of the calls that dropped tokens; None for the baseline.
        prefill_macs: mean cost of a prefill by formula, over all calls; `prefill_ratio` of it to
            the same calls on all tokens; `pruned_prefill_ratio` over the calls that drop tokens.
        visual: visual tokens of a call, `visual_kept` those that stay in calls that drop tokens.
        warm_up_calls: share of calls that ran on all tokens: an episode had just begun, or the
            method asked for a full step.
        motion: how the robot moved, on the scenes that this and the baseline solved; None: nothing
            was measured, or there is no such scene.
        live: None: the scene waited for the policy.
    """

    name: str
    label: str
    episodes: int
    successes: int
    success: float
    success_interval: Interval
    gained: int | None
    lost: int | None
    pairs: int | None
    difference: float | None
    difference_interval: Interval | None
    p_value: float | None
    steps: float | None
    all_calls: Latency
    pruned_calls: Latency | None
    prefill_macs: float
    prefill_ratio: float
    pruned_prefill_ratio: float
    visual: int
    visual_kept: int
    warm_up_calls: float
    p_holm: float | None = None
    motion: MotionRow | None = None
    live: LiveRow | None = None


@dataclass(frozen=True)
class Summary:
    """Rows, the episodes they were made from, and what they were measured on.

    Conditions without a finished episode have no row. `apart` is the timing of every condition on
    the same observations, empty where there was none.
    """

    rows: list[ConditionRow]
    episodes: list[Episode]
    planned: int
    settings: dict[str, Any]
    environment: dict[str, Any]
    apart: Mapping[str, Timing] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether every planned episode has finished."""
        return len(self.episodes) == self.planned

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "complete": self.complete,
            "planned_episodes": self.planned,
            "settings": self.settings,
            "environment": self.environment,
            "rows": [asdict(row) for row in self.rows],
            "measured_apart": {name: asdict(timing) for name, timing in self.apart.items()},
            "episodes": [episode.as_dict() for episode in self.episodes],
        }


def summarise(
    episodes: Sequence[Episode],
    conditions: Sequence[Condition],
    *,
    planned: int,
    settings: Mapping[str, Any],
    environment: Mapping[str, Any],
    apart: Mapping[str, Timing] | None = None,
) -> Summary:
    """Compare the conditions with each other; differences and speed-ups are against "none".

    Args:
        episodes: finished episodes, in any order.
        conditions: the rows, in order.
        planned: how many episodes were to be run.
        settings, environment: kept with the numbers.
        apart: see `Summary`.
    """
    by_name: dict[str, dict[int, Episode]] = {condition.name: {} for condition in conditions}
    for episode in episodes:
        by_name[episode.condition][episode.seed] = episode
    baseline = by_name.get(ALL_TOKENS, {})
    rows = [
        _row(condition, by_name[condition.name], baseline)
        for condition in conditions
        if by_name[condition.name]
    ]
    corrected = iter(holm([row.p_value for row in rows if row.p_value is not None]))
    rows = [row if row.p_value is None else replace(row, p_holm=next(corrected)) for row in rows]
    return Summary(rows, list(episodes), planned, dict(settings), dict(environment), apart or {})


def _row(
    condition: Condition, runs: dict[int, Episode], baseline: dict[int, Episode]
) -> ConditionRow:
    pruning = condition.name != ALL_TOKENS
    common = [seed for seed in runs if seed in baseline] if pruning else []
    pairs = None
    if common:
        pairs = paired_success(
            [baseline[seed].success for seed in common], [runs[seed].success for seed in common]
        )
    calls = [call for episode in runs.values() for call in episode.calls]
    pruned = [call for call in calls if pruning and not call.warm_up]
    solved = [episode.steps for episode in runs.values() if episode.success]
    return ConditionRow(
        name=condition.name,
        label=condition.label,
        episodes=len(runs),
        successes=len(solved),
        success=len(solved) / len(runs),
        success_interval=wilson(len(solved), len(runs)),
        gained=pairs.gained if pairs else None,
        lost=pairs.lost if pairs else None,
        pairs=pairs.pairs if pairs else None,
        difference=pairs.difference if pairs else None,
        difference_interval=pairs.interval() if pairs else None,
        p_value=pairs.p_value() if pairs else None,
        steps=median(solved) if solved else None,
        all_calls=_latency(runs, baseline, common),
        pruned_calls=_latency(runs, baseline, common, pruned_only=True) if pruned else None,
        prefill_macs=sum(call.prefill_macs for call in calls) / len(calls),
        prefill_ratio=_prefill_ratio(calls),
        pruned_prefill_ratio=_prefill_ratio(pruned or calls),
        visual=calls[0].visual,
        visual_kept=min(call.visual_kept for call in calls),
        warm_up_calls=sum(call.warm_up for call in calls) / len(calls),
        motion=_motion(runs, baseline if pruning else None),
        live=_live(list(runs.values())),
    )


def _motion(runs: dict[int, Episode], baseline: dict[int, Episode] | None) -> MotionRow | None:
    solved = {
        seed: one.motion for seed, one in runs.items() if one.success and one.motion is not None
    }
    if baseline is None:
        return compare_motion(list(solved.values()))
    pairs = [
        (motion, before)
        for seed, motion in solved.items()
        if seed in baseline
        and baseline[seed].success
        and (before := baseline[seed].motion) is not None
    ]
    return compare_motion([after for after, _ in pairs], [before for _, before in pairs])


def _live(episodes: Sequence[Episode]) -> LiveRow | None:
    held = [episode.held for episode in episodes if episode.held is not None]
    if len(held) < len(episodes):
        return None
    delays = [call.delay for episode in episodes for call in episode.calls]
    steps = sum(episode.steps for episode in episodes)
    return LiveRow(sum(delays) / len(delays), max(delays), sum(held) / len(held), sum(held) / steps)


def _prefill_ratio(calls: Sequence[Call]) -> float:
    return sum(call.prefill_macs for call in calls) / sum(call.full_macs for call in calls)


def _latency(
    runs: dict[int, Episode],
    baseline: dict[int, Episode],
    common: Sequence[int],
    *,
    pruned_only: bool = False,
) -> Latency:
    def latencies(episode: Episode) -> list[float]:
        return [c.latency_ms for c in episode.calls if not (pruned_only and c.warm_up)]

    everything = [value for episode in runs.values() for value in latencies(episode)]
    speedup, interval = None, None
    # An episode that was solved during warm-up has no pruned call to compare.
    usable = [seed for seed in common if latencies(runs[seed])]
    if usable:
        before = [[call.latency_ms for call in baseline[seed].calls] for seed in usable]
        after = [latencies(runs[seed]) for seed in usable]
        speedup, interval = speedup_of(before, after)
    return Latency(
        median(everything), quantile(everything, 0.95), len(everything), speedup, interval
    )


# -- tables --------------------------------------------------------------------------------------

COLUMNS = (
    "condition",
    "success",
    "95 %",
    "difference",
    "visual tokens",
    "prefill FLOPs",
    "latency ms, median",
    "p95",
    "speed-up",
    "pruned calls ms, median",
    "speed-up, pruned calls",
)


def cells(row: ConditionRow) -> tuple[str, ...]:
    """One row of a table for people, in the order of `COLUMNS`."""
    pruned = row.pruned_calls
    return (
        row.label,
        f"{row.successes} of {row.episodes}",
        f"{percent(row.success_interval.low)} to {percent(row.success_interval.high)}",
        _difference(row),
        f"{row.visual_kept} of {row.visual}",
        f"{percent(row.prefill_ratio)} ({giga(row.prefill_macs)})",
        f"{row.all_calls.median_ms:.1f}",
        f"{row.all_calls.p95_ms:.1f}",
        speedup_text(row.all_calls.speedup, row.all_calls.interval),
        f"{pruned.median_ms:.1f}" if pruned else "-",
        speedup_text(pruned.speedup, pruned.interval) if pruned else "-",
    )


def percent(share: float) -> str:
    """0.305 as "30 %"; below 1 % a digit more."""
    return f"{100 * share:.0f} %" if share >= 0.01 or share == 0 else f"{100 * share:.1f} %"


def giga(macs: float) -> str:
    """Multiply-accumulates as "1.23 G"."""
    return f"{macs / 1e9:.3g} G"


def _difference(row: ConditionRow) -> str:
    if row.difference is None or row.difference_interval is None or row.p_value is None:
        return "-"
    return difference_text(row.difference, row.difference_interval, row.p_value, row.p_holm)


def difference_text(
    difference: float, interval: Interval, p_value: float, corrected: float | None = None
) -> str:
    """Difference of success rates in points, with its interval and the exact test.

    The p-value corrected for the rows beside it is printed where it differs.
    """
    low, high = 100 * interval.low, 100 * interval.high
    text = f"{100 * difference:+.0f} points ({low:+.0f} to {high:+.0f}), p = {p_value:.2g}"
    if corrected is None or f"{corrected:.2g}" == f"{p_value:.2g}":
        return text
    return f"{text} (Holm {corrected:.2g})"


def speedup_text(speedup: float | None, interval: Interval | None) -> str:
    """Speed-up with its interval."""
    if speedup is None:
        return "-"
    if interval is None:
        return f"{speedup:.2f}x"
    return f"{speedup:.2f}x ({interval.low:.2f} to {interval.high:.2f})"


SUCCESS_NOTES = (
    "Intervals: 95 %; success by Wilson, difference on the same scenes by Tango with the exact "
    "McNemar test, its p in brackets corrected for the rows of a table (Holm), "
)
COST_NOTES = (
    "Latency: one whole call of the policy, images in, actions out. Prefill FLOPs: "
    "multiply-accumulates of the decoder by formula, mean over all calls; visual tokens: what "
    "stays in calls that drop tokens. The first calls of an episode run on all tokens; pruned "
    "calls leave them out."
)
NOTES = (
    f"{SUCCESS_NOTES}speed-up (ratio of the medians on the scenes that both finished) by bootstrap "
    f"over scenes. {COST_NOTES}"
)


def rows_csv(summary: Summary) -> str:
    """One line per condition; nested values become columns such as `all_calls.median_ms`."""
    return to_csv(
        [
            flat_row(row) | flat(asdict(summary.apart[row.name]), "apart.")
            if row.name in summary.apart
            else flat_row(row)
            for row in summary.rows
        ]
    )


def episodes_csv(summary: Summary) -> str:
    """One line per episode."""
    return to_csv([episode_row(episode) for episode in summary.episodes])


def episode_row(episode: Episode) -> dict[str, Any]:
    """An episode with sums over its calls, and their median latency."""
    calls = episode.calls
    return {
        "condition": episode.condition,
        "seed": episode.seed,
        "target": episode.target,
        "instruction": episode.instruction,
        "success": episode.success,
        "steps": episode.steps,
        "calls": len(calls),
        "warm_up_calls": sum(call.warm_up for call in calls),
        "visual": max(call.visual for call in calls),
        "visual_kept": min(call.visual_kept for call in calls),
        "prefill_macs": sum(call.prefill_macs for call in calls),
        "full_macs": sum(call.full_macs for call in calls),
        "median_ms": median([call.latency_ms for call in calls]),
        "pruned_median_ms": median([call.latency_ms for call in calls if not call.warm_up]),
        "delay": max(call.delay for call in calls),
        "held": episode.held,
        **(episode.motion or {}),
    }


def flat_row(row: ConditionRow) -> dict[str, Any]:
    """Every number of a row; nested values become entries such as `all_calls.median_ms`."""
    return flat(asdict(row))
