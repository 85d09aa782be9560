"""Figures from rows: rates, paired differences, motion, latency; apart from the package, in scipy.

See audit.py, which compares them with what the pages print.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from scipy import optimize, stats

RESULTS = Path(__file__).parent / "results"
FULL = "none"

Row = dict[str, str]
Cell = dict[int, Row]
"""Episodes of one condition in one suite, by scene."""


# -- rows ------------------------------------------------------------------------------------------


@cache
def read(name: str) -> tuple[Row, ...]:
    """The rows of a file of experiments/results."""
    with (RESULTS / name).open(encoding="utf-8") as file:
        return tuple(csv.DictReader(file))


@dataclass(frozen=True)
class Source:
    """Where a table's figures come from: a file, and suites of it.

    `family` is the number of comparisons that were made, where not all are printed.
    """

    file: str
    suites: tuple[str, ...] = ("robosuite_pickplace",)
    family: int = 0

    def cell(self, condition: str, suite: str) -> Cell:
        """Episodes by scene."""
        found = {
            int(row["seed"]): row
            for row in read(self.file)
            if (row.get("suite", suite), row.get("condition") or row["mistake"])
            == (suite, condition)
        }
        if not found:
            raise LookupError(f"{self.file} holds no row of {condition} in {suite}")
        return found


def solved(cell: Cell) -> dict[int, bool]:
    return {seed: row["success"] == "True" for seed, row in cell.items()}


# -- statistics, with scipy ------------------------------------------------------------------------


def wilson(successes: int, episodes: int) -> tuple[float, float]:
    interval = stats.binomtest(successes, episodes).proportion_ci(0.95, method="wilson")
    return interval.low, interval.high


def mcnemar(gained: int, lost: int) -> float:
    if gained + lost == 0:
        return 1.0
    return float(stats.binomtest(gained, gained + lost, 0.5).pvalue)


def tango(gained: int, lost: int, pairs: int) -> tuple[float, float]:
    """Score interval of a paired difference; the nuisance rate by maximising the likelihood."""

    def score(delta: float) -> float:
        low, high = max(0.0, -delta), (1 - delta) / 2

        def likelihood(rate: float) -> float:  # of "only before", to be minimised
            parts = (
                (gained, rate + delta),
                (lost, rate),
                (pairs - gained - lost, 1 - 2 * rate - delta),
            )
            return -sum(n * np.log(max(p, 1e-300)) for n, p in parts if n)

        rate = optimize.minimize_scalar(
            likelihood, bounds=(low, high), method="bounded", options={"xatol": 1e-12}
        ).x
        variance = pairs * (2 * rate + delta - delta**2)
        return (gained - lost - pairs * delta) / np.sqrt(max(variance, 1e-12))

    z, middle = stats.norm.ppf(0.975), (gained - lost) / pairs
    edge = 1 - 1e-9
    low = -1.0 if score(-edge) < z else optimize.brentq(lambda d: score(d) - z, -edge, middle)
    high = 1.0 if score(edge) > -z else optimize.brentq(lambda d: score(d) + z, middle, edge)
    return low, high


def holm(p_values: Sequence[float], family: int = 0) -> list[float]:
    """Corrected for all comparisons of the family, of which these are printed."""
    order, count = np.argsort(p_values), max(family, len(p_values))
    steps = [min(1.0, (count - rank) * p_values[i]) for rank, i in enumerate(order)]
    corrected = np.empty(len(p_values))
    corrected[order] = np.maximum.accumulate(steps)
    return corrected.tolist()


def bootstrap(before: np.ndarray, after: np.ndarray) -> tuple[float, float]:
    """Interval of the ratio of two means, over pairs."""

    def ratio(new: np.ndarray, old: np.ndarray, axis: int) -> np.ndarray:
        return new.mean(axis=axis) / old.mean(axis=axis)

    found = stats.bootstrap(
        (after, before), ratio, paired=True, method="percentile", n_resamples=4999, rng=0
    )
    return found.confidence_interval.low, found.confidence_interval.high


# -- what a column holds ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Pairs:
    gained: int
    lost: int
    pairs: int

    @property
    def difference(self) -> float:
        return (self.gained - self.lost) / self.pairs


def pairs_of(source: Source, before: str, after: str, suites: Sequence[str]) -> Pairs:
    """The same scenes under two conditions, summed over suites."""
    gained = lost = count = 0
    for suite in suites:
        old, new = solved(source.cell(before, suite)), solved(source.cell(after, suite))
        common = old.keys() & new.keys()
        gained += sum(new[s] and not old[s] for s in common)
        lost += sum(old[s] and not new[s] for s in common)
        count += len(common)
    return Pairs(gained, lost, count)


def points(found: Pairs, corrected: float | None) -> str:
    """`+6 (-2 to +16), p = 0.25, Holm 0.5`."""
    low, high = tango(found.gained, found.lost, found.pairs)
    p = mcnemar(found.gained, found.lost)
    text = f"{_signed(found.difference)} ({_signed(low)} to {_signed(high)}), p = {p:.2g}"
    return (
        text
        if corrected is None or f"{corrected:.2g}" == f"{p:.2g}"
        else f"{text}, Holm {corrected:.2g}"
    )


def _signed(share: float) -> str:
    value = round(100 * share)
    return "0" if value == 0 else f"{value:+d}"


def rate(cells: Sequence[Cell]) -> str:
    """`46 of 50 (81-97 %)`, over suites together."""
    found = [value for cell in cells for value in solved(cell).values()]
    low, high = wilson(sum(found), len(found))
    return f"{sum(found)} of {len(found)} ({100 * low:.0f}-{100 * high:.0f} %)"


def flops(cells: Sequence[Cell]) -> str:
    """Prefill FLOPs by formula, of all tokens on the same calls."""
    rows = [row for cell in cells for row in cell.values()]
    sums = [sum(int(row[name]) for row in rows) for name in ("prefill_macs", "full_macs")]
    return f"{100 * sums[0] / sums[1]:.0f} %"


def motion(source: Source, condition: str, name: str, suites: Sequence[str]) -> str:
    """`4.12 (1.03x, 0.98 to 1.07)` on scenes that both solved; all tokens: `4.01`."""
    old, new = [], []
    for suite in suites:
        before, after = source.cell(FULL, suite), source.cell(condition, suite)
        for seed in sorted(before.keys() & after.keys()):
            if before[seed]["success"] == after[seed]["success"] == "True":
                old.append(float(before[seed][name]))
                new.append(float(after[seed][name]))
    if condition == FULL:
        return f"{np.mean(new):.3g}"
    low, high = bootstrap(np.array(old), np.array(new))
    return f"{np.mean(new):.3g} ({np.mean(new) / np.mean(old):.2f}x, {low:.2f} to {high:.2f})"


MOTIONS = {
    "time, s": "seconds",
    "hand path, m": "hand_path",
    "joint path, rad": "joint_path",
    "hand jerk, m/s³": "hand_jerk",
    "joint jerk, rad/s³": "joint_jerk",
    "action rate": "action_rate",
    "gripper switches": "gripper_switches",
}


# -- latency: rows are calls -----------------------------------------------------------------------


def table_of(file: str, condition: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Latencies `[rounds, calls]`, and per call whether it warmed up and its FLOPs `[calls, 2]`."""
    rows = [row for row in read(file) if row["condition"] == condition]
    if not rows:
        raise LookupError(f"{file} holds no row of {condition}")
    rounds = sorted({int(row["round"]) for row in rows})
    key = {(int(r["round"]), int(r["scene"]), int(r["call"])): r for r in rows}
    calls = sorted({k[1:] for k in key})
    ms = np.array([[float(key[r, *c]["latency_ms"]) for c in calls] for r in rounds])
    first = [key[rounds[0], *c] for c in calls]
    warm = np.array([row["warm_up"] == "True" for row in first])
    counted = np.array([[float(row["flops"]), float(row["decoder_flops"])] for row in first])
    return ms, warm, counted


def mean_ms(ms: np.ndarray) -> np.ndarray:
    """Mean over calls of each call's median over rounds; rounds are the second last axis."""
    return np.median(ms, axis=-2).mean(axis=-1)


def latency(file: str, condition: str, column: str) -> str:
    ms, warm, counted = table_of(file, condition)
    full, _, all_counted = table_of(file, FULL)
    pruned = condition != FULL
    chosen = ~warm if "pruned" in column else np.ones_like(warm)
    if column.endswith("ms"):
        return f"{mean_ms(ms[:, chosen]):.1f}" if pruned or "pruned" not in column else "-"
    if not pruned:
        return "-" if "speed-up" in column else "100 %"
    if "speed-up" in column:
        return speed_up(full[:, chosen], ms[:, chosen])
    which = 0 if "call" in column else 1
    return f"{100 * counted[chosen, which].sum() / all_counted[chosen, which].sum():.1f} %"


def speed_up(before: np.ndarray, after: np.ndarray) -> str:
    """Ratio of what is printed, and its bootstrap interval; rounds are drawn in pairs."""
    drawn = np.random.default_rng(1).integers(len(before), size=(4999, len(before)))
    ratios = mean_ms(before[drawn]) / mean_ms(after[drawn])
    low, high = np.quantile(ratios, (0.025, 0.975))
    return f"{mean_ms(before) / mean_ms(after):.2f}x ({low:.2f} to {high:.2f})"


CLOCK = ("stood still", "age of an action, ms", "answer, ms", "late answers")
"""Columns about an arm that does not wait."""


def clock(cells: Sequence[Cell], column: str) -> str:
    """Of ticks after the first action; medians of the episodes' medians; `12 of 430`."""
    rows = [row for cell in cells for row in cell.values()]
    total = {
        n: sum(int(r[n]) for r in rows) for n in ("ticks", "before", "held", "late", "answers")
    }
    if column == "stood still":
        return f"{100 * total['held'] / (total['ticks'] - total['before']):.1f} %"
    if column == "late answers":
        return f"{total['late']} of {total['answers']}"
    name = "age_ms" if column.startswith("age") else "answer_ms"
    return f"{np.median([float(row[name]) for row in rows if row[name]]):.0f}"


def bench(file: str, variant: str, column: str) -> str:
    """What `vla-pruner bench` printed, and the ratio of the medians that it printed."""
    rows = {row["variant"]: row for row in read(file)}
    row, full = rows[variant], rows["full"]
    median, low, high = (row[f"prefill_{name}_ms"] for name in ("median", "lower", "upper"))
    if column == "ratio":
        return f"{float(full['prefill_median_ms']) / float(median):.2f}x"
    return {
        "prefill, ms": median,
        "quartiles, ms": f"{low} to {high}",
        "FLOPs, ratio": f"{float(row['flops_ratio']):.2f}x",
    }[column]


BENCH = ("prefill, ms", "quartiles, ms", "ratio", "FLOPs, ratio")
LATENCIES = {
    "latency, ms": "every ms",
    "speed-up": "every speed-up",
    "pruned calls, ms": "pruned ms",
    "speed-up of pruned calls": "pruned speed-up",
    "counted FLOPs, call": "call",
    "counted FLOPs, decoder": "decoder",
    "decoder, pruned calls": "pruned decoder",
}


class Counter4:
    """Pairs, summed."""

    def __init__(self) -> None:
        self.full = self.pruned = self.gained = self.lost = self.pairs = 0

    def add(self, old: Sequence[bool], new: Sequence[bool]) -> None:
        self.full, self.pruned = self.full + sum(old), self.pruned + sum(new)
        self.gained += sum(b and not a for a, b in zip(old, new, strict=True))
        self.lost += sum(a and not b for a, b in zip(old, new, strict=True))
        self.pairs += len(old)

    def of(self) -> Pairs:
        return Pairs(self.gained, self.lost, self.pairs)


def extra(first: Pairs, second: Pairs) -> str:
    """Difference of differences with its MOVER interval."""
    one, two = (tango(p.gained, p.lost, p.pairs) for p in (first, second))
    middle = second.difference - first.difference
    low = np.hypot(second.difference - two[0], one[1] - first.difference)
    high = np.hypot(two[1] - second.difference, first.difference - one[0])
    return f"{_signed(middle)} ({_signed(middle - low)} to {_signed(middle + high)})"
