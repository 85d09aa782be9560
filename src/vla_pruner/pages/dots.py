"""Rows of a dot plot: success and speed of every condition, side by side, grouped by budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vla_pruner.episodes.condition import ALL_TOKENS, Condition
from vla_pruner.measure.statistics import Interval
from vla_pruner.pages.findings import is_worse
from vla_pruner.reports.latency import Pace, pace
from vla_pruner.reports.summary import ConditionRow, Summary, percent


@dataclass(frozen=True)
class Mark:
    """A value and the ends of its interval, as percent of an axis; None: it has no interval."""

    at: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Tick:
    """A number on an axis, and where it stands, in percent."""

    at: float
    text: str


@dataclass(frozen=True)
class Axis:
    """What a column of dots is drawn on; `reference` is where all tokens stand, in percent."""

    name: str
    low: float
    high: float
    ticks: tuple[Tick, ...]
    reference: float | None = None

    def mark(self, value: float, interval: Interval | None = None) -> Mark:
        """Where a value stands."""
        ends = (interval.low, interval.high) if interval else (None, None)
        return Mark(*(None if one is None else self.place(one) for one in (value, *ends)))  # type: ignore[arg-type]

    def place(self, value: float) -> float:
        """A value as percent of the axis; what lies outside stands at its end."""
        share = (value - self.low) / (self.high - self.low)
        return round(100 * min(1.0, max(0.0, share)), 2)


@dataclass(frozen=True)
class Row:
    """One condition, written out.

    Args:
        name: of the condition.
        method: what it can be chosen by.
        title, detail: method and options, and what they leave of tokens and FLOPs.
        standing: "all", "worse" (than all tokens, see `findings.is_worse`) or "".
        order: number of the row, as it was asked for.
        rate, speed: marks; `pruned_speed` is a place on the axis of `speed`.
        solved, solved_interval, gap, gap_interval, times, pruned_times, ms, pruned_ms: texts.
    """

    name: str
    method: str
    title: str
    detail: str
    standing: str
    order: int
    rate: Mark
    speed: Mark | None
    pruned_speed: float | None
    solved: str
    solved_interval: str
    gap: str
    gap_interval: str
    times: str
    pruned_times: str
    ms: str
    pruned_ms: str


@dataclass(frozen=True)
class Budget:
    """Rows that keep as much; all tokens have no title."""

    key: str
    title: str
    rows: list[Row]


@dataclass(frozen=True)
class Chart:
    """A dot plot. `worse` tells whether a row is."""

    caption: str
    success: Axis
    speed: Axis
    budgets: list[Budget]

    @property
    def worse(self) -> bool:
        """Whether a condition solves fewer scenes than all tokens, see `is_worse`."""
        return any(row.standing == "worse" for budget in self.budgets for row in budget.rows)


def chart(caption: str, summary: Summary, conditions: Sequence[Condition]) -> Chart:
    """The dot plot of one policy in one suite.

    Args:
        caption: what it shows, for those who cannot see it.
        summary: its rows; with `apart`, speed is that.
        conditions: of the rows.
    """
    known = {condition.name: condition for condition in conditions}
    paces = {row.name: pace(summary, row) for row in summary.rows}
    full = next((row for row in summary.rows if row.name == ALL_TOKENS), None)
    speed = _speed_axis(list(paces.values()))
    success = Axis(
        "Success",
        0.0,
        1.0,
        (Tick(0, "0"), Tick(50, "50"), Tick(100, "100 %")),
        round(100 * full.success, 2) if full else None,
    )
    budgets: dict[str, Budget] = {}
    for order, row in enumerate(summary.rows):
        condition = known[row.name]
        key = budget_of(condition)
        title = "" if condition.keep is None else _budget_title(key, condition, row)
        found = budgets.setdefault(key, Budget(key, title, []))
        found.rows.append(_row(row, condition, order, paces[row.name], success, speed))
    order_of = {key: _size(known[budget.rows[0].name]) for key, budget in budgets.items()}
    ordered = sorted(budgets.values(), key=lambda budget: order_of[budget.key])
    return Chart(caption, success, speed, ordered)


def budget_of(condition: Condition) -> str:
    """What a condition keeps, for people: "25 %" or "64 tokens"."""
    if condition.keep is None:
        return "all"
    if isinstance(condition.keep, float):
        return f"{100 * condition.keep:g} %"
    return f"{condition.keep} tokens"


def _size(condition: Condition) -> tuple[int, float]:
    """All tokens first, then fractions, then numbers; the larger before the smaller."""
    if condition.keep is None:
        return 0, 0.0
    return (1 if isinstance(condition.keep, float) else 2), -condition.keep


def _budget_title(key: str, condition: Condition, row: ConditionRow) -> str:
    if isinstance(condition.keep, float):
        return f"{key} of {row.visual} visual tokens"
    return f"{key} of {row.visual}"


def _row(
    row: ConditionRow, condition: Condition, order: int, speed: Pace, rates: Axis, speeds: Axis
) -> Row:
    full = row.name == ALL_TOKENS
    interval, gap = row.success_interval, row.difference_interval
    options = condition.label.split(", ", 2)[2:]
    detail = f"{row.visual_kept} tokens, {percent(row.pruned_prefill_ratio)} of the FLOPs"
    return Row(
        name=row.name,
        method=condition.method,
        title="all tokens" if full else ", ".join([condition.method, *options]),
        detail=f"{row.visual} visual tokens" if full else detail,
        standing="all" if full else "worse" if is_worse(row) else "",
        order=order,
        rate=rates.mark(row.success, interval),
        speed=None if speed.speedup is None else speeds.mark(speed.speedup, speed.interval),
        pruned_speed=(None if speed.pruned_speedup is None else speeds.place(speed.pruned_speedup)),
        solved=f"{row.successes} of {row.episodes}",
        solved_interval=f"{percent(interval.low)} to {percent(interval.high)}",
        gap="" if row.difference is None else f"{points(row.difference)} points",
        gap_interval="" if gap is None else f"{points(gap.low)} to {points(gap.high)}",
        times="" if speed.speedup is None else f"{speed.speedup:.2f}x",
        pruned_times=_pruned(speed.speedup, speed.pruned_speedup, "{:.2f}x"),
        ms=f"{speed.median_ms:.1f}",
        pruned_ms=_pruned(speed.median_ms, speed.pruned_ms, "{:.1f}"),
    )


def _pruned(every: float | None, pruned: float | None, form: str) -> str:
    """What pruned calls alone give, where that differs."""
    if pruned is None or (every is not None and form.format(every) == form.format(pruned)):
        return ""
    return f"pruned {form.format(pruned)}"


def points(share: float) -> str:
    """A difference of shares in points, with its sign."""
    value = round(100 * share)
    return f"{'−' if value < 0 else '+' if value > 0 else '±'}{abs(value)}"  # noqa: RUF001


def _speed_axis(paces: Sequence[Pace]) -> Axis:
    """From the slowest to the fastest, in quarters, with 1 on it and some room."""
    values = [1.0]
    for one in paces:
        if one.speedup is not None:
            values.append(one.speedup)
        if one.pruned_speedup is not None:
            values.append(one.pruned_speedup)
        if one.interval is not None:
            values += [one.interval.low, one.interval.high]
    low = max(0.0, math.floor(min(values) * 4 - 1e-9) / 4)
    high = math.ceil(max(values) * 4 + 1e-9) / 4
    low, high = (low, high) if high > low else (low - 0.25, high + 0.25)
    axis = Axis("Speed-up", low, high, ())
    unit = axis.place(1.0)
    ends = [Tick(0.0, f"{low:g}"), Tick(unit, "1"), Tick(100.0, f"{high:g}x")]
    ticks = [tick for tick in ends if tick.text == "1" or abs(tick.at - unit) > 24]
    return Axis("Speed-up", low, high, tuple(ticks), unit)
