"""`vla-pruner report`: tables from the episodes of one or more runs."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vla_pruner.evaluation.episode import ALL_TOKENS, Condition, Episode
from vla_pruner.evaluation.rollouts import Setup
from vla_pruner.evaluation.store import Store
from vla_pruner.evaluation.summary import (
    COLUMNS,
    NOTES,
    Row,
    Summary,
    cells,
    percent,
    summarise,
    write_text,
)


@dataclass(frozen=True)
class Group:
    """One policy in one suite, under all its conditions."""

    setup: Setup
    conditions: list[Condition]
    episodes: list[Episode]
    planned: int
    environments: list[dict[str, Any]]

    @property
    def suite(self) -> str:
        """Its name, for tables."""
        flag = " (stand-in assets)" if self.setup.stand_in_assets else ""
        return self.setup.suite + flag

    def summary(self, against: str = ALL_TOKENS) -> Summary:
        """Its rows; differences and speed-ups are to the condition called `against`."""
        return summarise(
            self.episodes,
            self.conditions,
            planned=self.planned,
            settings=self.setup.as_dict(),
            environment={},
            against=against,
        )


def read_runs(folders: Sequence[str | Path]) -> list[Group]:
    """The groups of several runs, in the order they were asked for.

    Raises:
        FileNotFoundError, ValueError: a folder that holds no episodes.
        ValueError: two runs hold the same policy in the same suite.
    """
    groups: dict[tuple[str, str], Group] = {}
    for folder in folders:
        found = list(_groups(folder))
        if not any(group.episodes for group in found):
            raise ValueError(f"no episode has finished in {folder}")
        for group in found:
            key = group.setup.policy, group.setup.suite
            if key in groups:
                raise ValueError(
                    f"{folder} holds {key[0]} in {key[1]}, and so does another run; report them "
                    "apart, or run both into one folder"
                )
            groups[key] = group
    return list(groups.values())


def _groups(folder: str | Path) -> Iterator[Group]:
    with Store(folder) as store:
        planned = store.planned()
        environments = store.environments()
        for setup in dict.fromkeys(item.setup for item in planned):
            items = [item for item in planned if item.setup == setup]
            conditions = [item.condition for item in items]
            yield Group(
                setup,
                conditions,
                store.episodes(setup, conditions),
                sum(item.episodes for item in items),
                environments,
            )


# -- Table 1 -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """One policy under one condition, over all suites.

    Args:
        policy: name.
        label: the condition, for people.
        rows: of each suite that it was run in.
        relative_accuracy: mean over suites of the success rate relative to all tokens, on the
            scenes that both finished; None: a suite without such scenes or without success.
    """

    policy: str
    label: str
    rows: dict[str, Row]
    relative_accuracy: float | None


def table_one(groups: Sequence[Group]) -> list[Line]:
    """Table 1 of the paper: a line per policy and condition, a column per suite."""
    lines = []
    for policy in dict.fromkeys(group.setup.policy for group in groups):
        own = [group for group in groups if group.setup.policy == policy]
        rows = {group.suite: {row.name: row for row in group.summary().rows} for group in own}
        for condition in dict.fromkeys(c for group in own for c in group.conditions):
            present = {
                suite: by_name[condition.name]
                for suite, by_name in rows.items()
                if condition.name in by_name
            }
            if present:
                relative = [_relative(group, condition) for group in own if group.suite in present]
                whole = len(present) == len(own) and None not in relative
                mean = sum(r for r in relative if r is not None) / len(relative) if whole else None
                lines.append(Line(policy, condition.label, present, mean))
    return lines


def _relative(group: Group, condition: Condition) -> float | None:
    """Success rate relative to all tokens, on the scenes that both finished."""
    solved: dict[str, dict[int, bool]] = {}
    for episode in group.episodes:
        solved.setdefault(episode.condition, {})[episode.seed] = episode.success
    before, after = solved.get(ALL_TOKENS, {}), solved.get(condition.name, {})
    common = before.keys() & after.keys()
    full = sum(before[seed] for seed in common)
    return sum(after[seed] for seed in common) / full if full else None


# -- Markdown ------------------------------------------------------------------------------------

DEFINITIONS = (
    "Success: share of finished episodes that were solved within the step limit. Relative "
    "accuracy: mean over suites of the success rate divided by that of all tokens, on the scenes "
    "that both finished. Visual tokens, FLOPs and latencies are of the first suite named."
)


def markdown(groups: Sequence[Group], against: str | None = None) -> str:
    """The whole report.

    Args:
        groups: what was run.
        against: also compare every condition with this one, pair by pair.
    """
    suites = list(dict.fromkeys(group.suite for group in groups))
    missing = [(g.planned - len(g.episodes), g) for g in groups if len(g.episodes) < g.planned]
    lines = ["# Success and cost", ""]
    for number, group in missing:
        lines += [f"Partial: {group.setup.policy} in {group.suite} misses {number} episodes.", ""]
    header = ["policy", "tokens", *suites, "relative accuracy", "prefill FLOPs", "speed-up"]
    lines += _table(header, [_line_cells(line, suites) for line in table_one(groups)])
    lines += ["", DEFINITIONS]
    for group in groups:
        lines += ["", f"## {group.setup.policy} in {group.suite}", ""]
        lines += _table(COLUMNS, [cells(row) for row in group.summary().rows])
        if against and any(c.name == against for c in group.conditions):
            lines += ["", f"### Against {against}", ""]
            columns = [COLUMNS[0], COLUMNS[1], COLUMNS[3], "solved by this / that alone"]
            lines += _table(columns, _pairs(group, against))
        lines += ["", "### Tasks", "", *_table(*_per_task(group))]
    lines += ["", NOTES, "", "## Measured with", ""]
    for facts in [group.setup.as_dict() for group in groups]:
        lines += ["* " + ", ".join(f"{name}: {value}" for name, value in facts.items())]
    for facts in _distinct([e for group in groups for e in group.environments]):
        lines += ["* " + ", ".join(f"{n}: {v}" for n, v in facts.items() if v is not None)]
    return "\n".join(lines) + "\n"


def _line_cells(line: Line, suites: Sequence[str]) -> list[str]:
    first = next(iter(line.rows.values()))
    success = [
        f"{percent(line.rows[s].success)} ({line.rows[s].successes} of {line.rows[s].episodes})"
        if s in line.rows
        else "-"
        for s in suites
    ]
    relative = "-" if line.relative_accuracy is None else percent(line.relative_accuracy)
    speedup = first.all_calls.speedup
    return [
        line.policy,
        line.label,
        *success,
        relative,
        percent(first.prefill_ratio),
        "-" if speedup is None else f"{speedup:.2f}x",
    ]


def _pairs(group: Group, against: str) -> list[list[str]]:
    return [
        [
            values[0],
            values[1],
            values[3],
            "-" if row.pairs is None else f"{row.gained} / {row.lost}",
        ]
        for row in group.summary(against).rows
        for values in [cells(row)]
    ]


def _per_task(group: Group) -> tuple[list[str], list[list[str]]]:
    """Solved episodes per task and condition."""
    solved: dict[tuple[int, str], list[bool]] = {}
    for episode in group.episodes:
        solved.setdefault((episode.target, episode.condition), []).append(episode.success)
    rows = [
        [
            task,
            *(
                f"{sum(found)} of {len(found)}" if (found := solved.get((number, c.name))) else "-"
                for c in group.conditions
            ),
        ]
        for number, task in enumerate(group.setup.tasks)
    ]
    return ["task", *(condition.label for condition in group.conditions)], rows


def _distinct(stamps: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Stamps that differ in more than their date."""
    return list({str({**facts, "date": None}): facts for facts in stamps}.values())


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows)]


# -- the command ---------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `vla-pruner report`."""
    parser.add_argument("runs", nargs="+", type=Path, help="folders that eval or sweep wrote to")
    parser.add_argument("--against", help="also compare with this condition, e.g. vla-pruner@0.25")
    parser.add_argument("--out", type=Path, help="folder for report.md; default: the first run")


def run(args: argparse.Namespace) -> int:
    """Write the report and print it."""
    against = Condition.parse(args.against).name if args.against else None
    groups = read_runs(args.runs)
    if against and not any(c.name == against for group in groups for c in group.conditions):
        names = dict.fromkeys(c.name for group in groups for c in group.conditions)
        raise ValueError(f"--against {against}: the runs hold {', '.join(names)}")
    text = markdown(groups, against)
    path = (args.out or args.runs[0]) / "report.md"
    write_text(path, text)
    print(text)
    print(f"Report: {path}")
    return 0
