"""The picture of a tuning: deviations with their intervals, where they lie, and latency."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from vla_pruner.episodes.condition import Condition
from vla_pruner.tuning.tune import Row, Tuning

matplotlib.use("Agg")

from matplotlib import pyplot

GOOD, BAD, GREY = "#2f855a", "#b83232", "#54616e"


def draw(tuning: Tuning, path: Path, title: str) -> None:
    """Write a PNG: deviation, its parts by dimension, and latency of every condition.

    Args:
        tuning: what was found.
        path: of the file.
        title: above it.
    """
    rows = [row for row in tuning.rows if row.condition.keep is not None]
    timed = all(row.latency is not None for row in tuning.rows)
    height = 1.8 + 0.36 * len(rows)
    figure, axes = pyplot.subplots(
        1, 3 if timed else 2, figsize=(13 if timed else 9, height), sharey=False
    )
    try:
        _deviations(axes[0], rows, tuning)
        _dimensions(axes[1], rows, tuning)
        if timed:
            _latencies(axes[2], list(tuning.rows))
        figure.suptitle(title, fontsize=11, x=0.01, ha="left", parse_math=False)  # a folder's name
        figure.tight_layout()
        figure.savefig(path, dpi=120)
    finally:
        pyplot.close(figure)


def _deviations(axis: Any, rows: list[Row], tuning: Tuning) -> None:
    for place, row in enumerate(rows):
        found, colour = row.deviation, GOOD if row.allowed else BAD
        low = found.mean if found.low is None else found.low
        high = found.mean if found.high is None else found.high
        axis.plot([low, high], [place, place], color=colour, linewidth=2)
        axis.plot(found.mean, place, "o", color=colour)
        axis.plot(found.p90, place, "|", color=GREY, markersize=11)
    axis.axvline(tuning.tolerance, color=GREY, linestyle="--", linewidth=1)
    axis.set_xlim(left=0)
    axis.set_xlabel("deviation, spreads of the action\n(mean, 95 %; bar: nine of ten calls)")
    _names(axis, [row.condition for row in rows])


def _dimensions(axis: Any, rows: list[Row], tuning: Tuning) -> None:
    values = np.array([row.deviation.by_dimension for row in rows])
    axis.imshow(values, aspect="auto", cmap="Oranges", vmin=0, vmax=max(values.max(), 1e-6))
    if values.size <= 200:
        for (place, dimension), value in np.ndenumerate(values):
            ink = "white" if value > 0.6 * values.max() else "black"
            axis.text(dimension, place, f"{value:.2f}", ha="center", va="center", size=7, color=ink)
    grippers = set(tuning.scale.gripper)
    axis.set_xticks(
        range(values.shape[1]),
        [f"{n}\ngripper" if n in grippers else str(n) for n in range(values.shape[1])],
    )
    axis.set_yticks([])
    axis.set_xlabel("mean deviation of each dimension, in its spread")


def _latencies(axis: Any, rows: list[Row]) -> None:
    for place, row in enumerate(rows):
        assert row.latency is not None
        colour = GREY if row.condition.keep is None else GOOD if row.allowed else BAD
        axis.plot([row.latency.p50_ms, row.latency.p99_ms], [place, place], color=colour)
        axis.plot(row.latency.p50_ms, place, "o", color=colour)
        if row.latency.warm_up_ms is not None:
            axis.plot(row.latency.warm_up_ms, place, "x", color=GREY)
    axis.set_xlim(left=0)
    axis.set_xlabel("whole call, ms\n(median to p99; cross: warm-up)")
    _names(axis, [row.condition for row in rows])


def _names(axis: Any, conditions: list[Condition]) -> None:
    labels = [condition.label for condition in conditions]
    axis.set_yticks(range(len(conditions)), labels, size=8, parse_math=False)
    axis.set_ylim(len(conditions) - 0.5, -0.5)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
