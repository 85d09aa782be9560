"""From traces to tables: overlaps per step, forecast errors, agreement."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from vla_pruner.analysis.measures import (
    distance,
    forecasts,
    jaccard,
    overlap,
    pool_ratio,
    top_sets,
)
from vla_pruner.analysis.record import Trace
from vla_pruner.pruning.budget import Budget
from vla_pruner.pruning.history import HistorySpec

Rows = list[dict[str, Any]]

PREDICTORS: Mapping[str, HistorySpec] = {
    "last step": HistorySpec(window=1),
    **{
        f"window w={window} gamma={gamma:g}": HistorySpec(window=window, gamma=gamma)
        for window in (2, 3, 5, 8)
        for gamma in (0.6, 0.8, 1.0)
    },
    **{f"EMA alpha={a:g}": HistorySpec(kind="ema", alpha=a) for a in (0.3, 0.5, 0.8)},
}
"""Memories that see every token at every step."""

PAPER = HistorySpec()
"""The paper's memory, for |C_dual| / |C_vl|."""


STEP_MEASURES = (
    "prefill_action",
    "consecutive",
    "pool_ratio",
    "prefill_visual",
    "action_visual",
)
"""Columns of `step_rows` that `overlap_rows` averages."""


def budget(keep: float | int, trace: Trace) -> int:
    """Tokens that `keep` leaves of a trace's."""
    return sum(Budget(keep).resolve((trace.action.shape[1],)))


def step_rows(traces: Iterable[Trace], keeps: Sequence[float | int]) -> Rows:
    """One row per call and budget: overlap of prefill and action, of consecutive actions, pool;
    and the share of their attention that prefill and action rows give to visual tokens.

    `consecutive` and `pool_ratio` are None where there is no step before to look back on; in a
    step that follows fewer than w, the pool uses those there are.
    """
    rows: Rows = []
    for trace in traces:
        forecast = forecasts(trace.action, PAPER)
        for keep in keeps:
            k = budget(keep, trace)
            prefill, action = top_sets(trace.semantic, k), top_sets(trace.action, k)
            within = overlap(prefill, action)
            between = [None, *overlap(action[1:], action[:-1]).tolist()]
            pool = [None, *pool_ratio(trace.semantic[1:], forecast[1:], k).tolist()]
            rows += [
                {
                    "seed": trace.seed,
                    "call": call,
                    "step": int(step),
                    "keep": keep,
                    "k": k,
                    "prefill_action": float(within[call]),
                    "consecutive": between[call],
                    "pool_ratio": pool[call],
                    "prefill_visual": float(trace.semantic[call].sum()),
                    "action_visual": float(trace.action[call].sum()),
                }
                for call, step in enumerate(trace.steps)
            ]
    return rows


def overlap_rows(steps: Rows) -> Rows:
    """Means of `step_rows` over episodes, one row per budget and measure."""
    rows: Rows = []
    for keep in dict.fromkeys(row["keep"] for row in steps):
        for measure in STEP_MEASURES:
            by_episode: dict[int, list[float]] = {}
            for row in steps:
                if row["keep"] == keep and row[measure] is not None:
                    by_episode.setdefault(row["seed"], []).append(row[measure])
            rows.append({"keep": keep, "measure": measure, **_over(by_episode)})
    return rows


def forecast_rows(traces: Sequence[Trace], keeps: Sequence[float | int]) -> Rows:
    """One row per predictor and budget: how far its forecasts are from what actions looked at.

    `missed` is the share of the k best observed tokens that are not among the k best of the
    forecast; `distance` the total variation. All predictors are compared at the same calls: those
    that every replayed method pruned, and that have a call before them. Replays remember only what
    they could see.
    """
    rows: Rows = []
    for keep in keeps:
        missed: dict[str, dict[int, list[float]]] = {}
        apart: dict[str, dict[int, list[float]]] = {}
        for trace in traces:
            k = budget(keep, trace)
            shown = top_sets(trace.action, k)
            predicted = {name: forecasts(trace.action, s) for name, s in PREDICTORS.items()}
            usable = np.arange(len(trace.steps)) > 0
            for name, replay in trace.replays.items():
                if replay.forecast is not None and name.endswith(f"@{keep}"):
                    predicted[name] = replay.forecast
                    usable &= ~replay.full
            if not usable.any():
                continue
            for name, scores in predicted.items():
                best = top_sets(scores[usable], k)
                missed.setdefault(name, {})[trace.seed] = list(1 - overlap(best, shown[usable]))
                far = distance(scores[usable], trace.action[usable])
                apart.setdefault(name, {})[trace.seed] = list(far)
        rows += [
            {
                "keep": keep,
                "predictor": name.removesuffix(f"@{keep}"),
                **_over(missed[name], "missed"),
                "distance": _over(apart[name])["mean"],
            }
            for name in missed
        ]
    return rows


def agreement_rows(traces: Sequence[Trace], keeps: Sequence[float | int]) -> Rows:
    """Jaccard index of the sets that two methods keep, over the calls that both prune."""
    rows: Rows = []
    for keep in keeps:
        names = [n for n in (traces[0].replays if traces else {}) if n.endswith(f"@{keep}")]
        for first, second in combinations(names, 2):
            by_episode: dict[int, list[float]] = {}
            for trace in traces:
                a, b = trace.replays[first], trace.replays[second]
                both = ~(a.full | b.full)
                if both.any():
                    by_episode[trace.seed] = list(jaccard(a.kept[both], b.kept[both]))
            if by_episode:
                pair = {"a": first.removesuffix(f"@{keep}"), "b": second.removesuffix(f"@{keep}")}
                rows.append({"keep": keep, **pair, **_over(by_episode)})
    return rows


def _over(by_episode: Mapping[int, Sequence[float]], name: str = "mean") -> dict[str, Any]:
    """Mean over all calls, the lowest and highest mean of an episode, and how many there were."""
    means = [float(np.mean(values)) for values in by_episode.values()]
    calls = [value for values in by_episode.values() for value in values]
    if not calls:
        return {name: None, "lowest": None, "highest": None, "episodes": 0, "calls": 0}
    return {
        name: float(np.mean(calls)),
        "lowest": min(means),
        "highest": max(means),
        "episodes": len(means),
        "calls": len(calls),
    }
