"""The page of `vla-pruner report`: dots, curves, every episode of each group, all tables."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from markupsafe import Markup

from vla_pruner.episodes.condition import ALL_TOKENS, Condition
from vla_pruner.pages.dots import Chart, budget_of, chart
from vla_pruner.pages.engine import download, render
from vla_pruner.pages.findings import overview
from vla_pruner.pages.plots import Point, curves, legend
from vla_pruner.reports.compare import Group
from vla_pruner.reports.document import Block, Table, Text
from vla_pruner.reports.summary import ConditionRow, Summary

Films = Mapping[tuple[str, int], str]
"""Addresses of films, by condition and scene."""

TITLE = "Success and cost of visual token pruning"
_NUMBER = re.compile(r"[-+±−]?(\d|$)")  # noqa: RUF001
_LINES = 8
"""More make a plot unreadable."""
_COST = "prefill FLOPs of pruned calls, relative to all tokens"


@dataclass(frozen=True)
class Section:
    """One policy in one suite, as the page shows it.

    Args:
        title: policy and suite.
        finding: what was found, as a heading, and what more there is to say of it.
        chart: the dot plot.
        plots: captions and curves, `legend` which line is which.
        episodes: see `_episodes`.
    """

    title: str
    finding: tuple[str, str]
    chart: Chart
    plots: list[tuple[str, Markup]]
    legend: Markup
    episodes: dict[str, Any]


def report_page(
    groups: Sequence[Group],
    blocks: Sequence[Block],
    *,
    films: Mapping[Group, Films] | None = None,
    files: Mapping[str, str] | None = None,
    watch: str = "vla-pruner watch RUN",
) -> str:
    """The page.

    Args:
        groups: what was run.
        blocks: the report as text and tables, all of which the page shows.
        films: by group; an episode may have none.
        files: contents of the files that it carries, by name.
        watch: how to make a film of an episode that has none.
    """
    summaries = [replace(group.summary(), apart=group.timings) for group in groups]
    sections = [
        _section(group, summary, (films or {}).get(group, {}))
        for group, summary in zip(groups, summaries, strict=True)
    ]
    notices = [block.text for block in blocks if isinstance(block, Text) and block.notice]
    conditions = list({c.name: c for group in groups for c in group.conditions}.values())
    return render(
        "report.html",
        title=TITLE,
        eyebrow=_eyebrow(groups),
        headline=TITLE if len(groups) > 1 else sections[0].finding[0],
        notices=notices,
        sections=sections,
        named=len(groups) > 1,
        first=next(shown(block) for block in blocks if isinstance(block, Table)),
        budgets=_budgets(conditions),
        methods=list(dict.fromkeys(c.method for c in conditions if c.keep is not None)),
        blocks=[shown(block) for block in blocks[1:] if not _notice(block)],
        files={name: download(text, _kind(name)) for name, text in (files or {}).items()},
        data={"groups": [one.episodes for one in sections], "watch": watch},
    )


def _section(group: Group, summary: Summary, films: Films) -> Section:
    plots, names = _curves(group, summary)
    return Section(
        group.title,
        overview(summary),
        chart(f"Success and speed of {group.title}", summary, group.conditions),
        plots,
        names,
        _episodes(group, films),
    )


def _eyebrow(groups: Sequence[Group]) -> str:
    dates = sorted(
        {str(one.get("date", ""))[:10] for group in groups for one in group.environments}
    )
    names = list(dict.fromkeys(group.title for group in groups))
    shown = names[0] if len(names) == 1 else f"{len(names)} policies and suites"
    return " · ".join(["VLA-Pruner report", shown, *(date for date in dates[-1:] if date)])


def _budgets(conditions: Sequence[Condition]) -> list[str]:
    """What can be kept, the larger first; numbers behind fractions."""
    found = {c.keep for c in conditions if c.keep is not None}
    ordered = sorted(found, key=lambda keep: (isinstance(keep, int), -keep))
    by_keep = {c.keep: budget_of(c) for c in conditions}
    return [by_keep[keep] for keep in ordered]


def _episodes(group: Group, films: Films) -> dict[str, Any]:
    """What the script draws every episode from: a list of numbers for each.

    An episode is scene, solved, steps, calls, calls that dropped tokens, task; and its film.
    """
    runs: dict[str, list[list[Any]]] = {}
    for episode in sorted(group.episodes, key=lambda one: one.seed):
        calls = episode.calls
        pruned = 0 if episode.condition == ALL_TOKENS else sum(not c.warm_up for c in calls)
        numbers = [episode.seed, int(episode.success), episode.steps, len(calls), pruned]
        film = films.get((episode.condition, episode.seed))
        tail = [episode.target, *([film] if film else [])]
        runs.setdefault(episode.condition, []).append([*numbers, *tail])
    return {
        "tasks": list(group.setup.tasks),
        "conditions": [
            {
                "name": one.name,
                "label": one.label,
                "method": one.method,
                "budget": budget_of(one),
                "runs": runs[one.name],
            }
            for one in group.conditions
            if one.name in runs
        ],
    }


def _curves(group: Group, summary: Summary) -> tuple[list[tuple[str, Markup]], Markup]:
    """Success and speed-up over the cost of pruned calls, a line per method (as Fig. 1 and 4).

    The speed-up is that measured apart, if any was. With more than `_LINES` lines, those of methods
    with options are left out.

    Returns:
        Captions with curves, and their legend.
    """
    success: dict[str, list[Point]] = {}
    speed: dict[str, list[Point]] = {}
    methods: dict[str, str] = {}
    full = next((row for row in summary.rows if row.name == ALL_TOKENS), None)
    for row, condition, name in _lines(group, summary):
        methods[name] = condition.method
        if full is not None and name not in success:
            interval = full.success_interval
            success[name] = [(1.0, full.success, interval.low, interval.high)]
        share, interval = row.pruned_prefill_ratio, row.success_interval
        success.setdefault(name, []).append((share, row.success, interval.low, interval.high))
        timing = group.timings.get(row.name)
        latency = timing.every if timing else None if group.timings else row.all_calls
        speedup, spread = (latency.speedup, latency.interval) if latency else (None, None)
        speed.setdefault(name, [])
        if speedup is not None:
            low, high = (spread.low, spread.high) if spread else (speedup, speedup)
            speed[name] = speed[name] or [(1.0, 1.0, 1.0, 1.0)]
            speed[name].append((share, speedup, low, high))
    found = []
    if success:
        level = full.success if full is not None else None
        plot = curves(success, x_label=_COST, keys=methods, reference=level)
        found.append(("Success", plot))
    if ends := [end for points in speed.values() for _, *ends in points for end in ends]:
        low, high = (
            min(math.floor(4 * min(ends)) / 4, 0.75),
            max(math.ceil(4 * max(ends)) / 4, 1.25),
        )
        plot = curves(speed, x_label=_COST, low=low, high=high, keys=methods, reference=1.0)
        found.append(("Speed-up of a call, warm-up included", plot))
    return found, legend(list(methods), list(methods.values()))


def _lines(group: Group, summary: Summary) -> list[tuple[ConditionRow, Condition, str]]:
    """The rows that curves go through, and which curve."""
    known = {condition.name: condition for condition in group.conditions}
    found = [
        (row, known[row.name], ":".join([known[row.name].method, *row.name.split(":")[1:]]))
        for row in summary.rows
        if row.name != ALL_TOKENS
    ]
    if len({name for *_, name in found}) > _LINES:
        found = [one for one in found if not one[1].options] or found
    return found


# -- blocks --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shown:
    """A block, and for a table the columns whose cells are numbers."""

    kind: str
    block: Block
    aligned: list[bool]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.block, name)


def shown(block: Block) -> Shown:
    """A block as the templates take it."""
    return Shown(type(block).__name__, block, aligned(block) if isinstance(block, Table) else [])


def aligned(table: Table) -> list[bool]:
    """Which columns hold numbers, and are written to the right."""
    columns = list(zip(*table.rows, strict=True)) if table.rows else [()] * len(table.header)
    return [bool(cells) and all(_NUMBER.match(cell) for cell in cells) for cells in columns]


def _notice(block: Block) -> bool:
    return isinstance(block, Text) and block.notice


def _kind(name: str) -> str:
    return "text/csv" if name.endswith(".csv") else "text/plain"
