"""The episodes of runs, compared: Table 1, pairs of conditions, success by task."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from vla_pruner.episodes.condition import ALL_TOKENS, Condition
from vla_pruner.episodes.episode import Episode
from vla_pruner.episodes.motion import MEASURES, Change
from vla_pruner.measure.statistics import (
    Interval,
    PairedSuccess,
    difference_of_differences,
    paired_success,
)
from vla_pruner.reports.summary import ConditionRow, Summary, summarise
from vla_pruner.reports.timings import Timing, timings
from vla_pruner.runs.job import Setup
from vla_pruner.runs.store import Store


@dataclass(frozen=True, eq=False)
class Group:
    """One policy in one suite, under all its conditions.

    Args:
        setup: the policy and the suite.
        conditions: in the order they were asked for.
        episodes: finished ones.
        planned: number of episodes, the missing ones included.
        environments: stamps of what they were run on.
        timings: by name of the condition, what `vla-pruner latency` measured; maybe nothing.
        timed_on: stamp of that.
    """

    setup: Setup
    conditions: list[Condition]
    episodes: list[Episode]
    planned: int
    environments: list[dict[str, Any]]
    timings: Mapping[str, Timing] = field(default_factory=dict)
    timed_on: Mapping[str, Any] = field(default_factory=dict)

    @property
    def suite(self) -> str:
        """Its name, for tables."""
        flag = " (stand-in assets)" if self.setup.stand_in_assets else ""
        return self.setup.suite + flag

    @property
    def title(self) -> str:
        """Policy and suite, for headings."""
        return f"{self.setup.policy} in {self.suite}"

    def summary(self) -> Summary:
        """A row per condition, compared with all tokens."""
        return self._summary

    @cached_property
    def _summary(self) -> Summary:
        return summarise(
            self.episodes,
            self.conditions,
            planned=self.planned,
            settings=self.setup.as_dict(),
            environment={},
        )

    def solved(self) -> dict[str, dict[int, bool]]:
        """Success by condition and scene."""
        found: dict[str, dict[int, bool]] = {}
        for episode in self.episodes:
            found.setdefault(episode.condition, {})[episode.seed] = episode.success
        return found


def read_runs(folders: Sequence[str | Path], *, without: Collection[str] = ()) -> list[Group]:
    """The groups of several runs, in the order they were asked for.

    Args:
        folders: of the runs.
        without: names of conditions to leave out.

    Raises:
        FileNotFoundError, ValueError: a folder that holds no episodes.
        ValueError: two runs hold the same policy in the same suite, or none a condition that is
            to be left out.
    """
    groups: dict[tuple[str, str], Group] = {}
    there: set[str] = set()
    for folder in folders:
        with Store(folder) as store:
            there |= {item.condition.name for item in store.planned()}
        found = list(_groups(folder, without))
        if not found:
            raise ValueError(f"no episode has finished in {folder}")
        for group in found:
            key = group.setup.policy, group.setup.suite
            if key in groups:
                raise ValueError(
                    f"{folder} holds {key[0]} in {key[1]}, and so does another run; report them "
                    "apart, or run both into one folder"
                )
            groups[key] = group
    if unknown := [name for name in without if name not in there]:
        raise ValueError(
            f"no condition {', '.join(unknown)} to leave out; there are {', '.join(sorted(there))}"
        )
    return list(groups.values())


def _groups(folder: str | Path, without: Collection[str]) -> Iterator[Group]:
    with Store(folder) as store:
        planned, environments = store.planned(), store.environments()
        for setup in dict.fromkeys(item.setup for item in planned):
            items = [
                item
                for item in planned
                if item.setup == setup and item.condition.name not in without
            ]
            conditions = [item.condition for item in items]
            if episodes := store.episodes(setup, conditions):
                done = Counter(episode.condition for episode in episodes)
                planned_or_more = sum(max(i.episodes, done[i.condition.name]) for i in items)
                replays, timed_on = store.replays(setup)
                replays = [one for one in replays if one.condition not in without]
                yield Group(
                    setup,
                    conditions,
                    episodes,
                    planned_or_more,
                    environments,
                    timings(replays),
                    timed_on,
                )


@dataclass(frozen=True)
class Line:
    """One policy under one condition, over all suites.

    Args:
        policy: name.
        label: the condition, for people.
        rows: of each suite that it was run in.
        timings: of each suite in which it was timed apart.
        relative_accuracy: mean over suites of the success rate relative to all tokens, on the
            scenes that both finished; None: a suite without such scenes, or without success there.
        prefill_ratio, pruned_prefill_ratio: mean over suites of the prefill FLOPs relative to all
            tokens, over all calls and over those that drop tokens.
        speedup, pruned_speedup: the same of the speed-up; None: a suite has none.
    """

    policy: str
    label: str
    rows: dict[str, ConditionRow]
    timings: dict[str, Timing]
    relative_accuracy: float | None
    prefill_ratio: float
    pruned_prefill_ratio: float
    speedup: float | None
    pruned_speedup: float | None


def table_one(summaries: Mapping[Group, Summary]) -> list[Line]:
    """Table 1 of the paper: a line per policy and condition, a column per suite."""
    lines = []
    for policy in dict.fromkeys(group.setup.policy for group in summaries):
        own = [group for group in summaries if group.setup.policy == policy]
        for name, label in {c.name: c.label for group in own for c in group.conditions}.items():
            found = {
                group: row for group in own for row in summaries[group].rows if row.name == name
            }
            if found:
                lines.append(_line(policy, label, name, found, own))
    return lines


def _line(
    policy: str, label: str, name: str, found: Mapping[Group, ConditionRow], own: Sequence[Group]
) -> Line:
    rows = list(found.values())
    whole = len(found) == len(own)
    return Line(
        policy,
        label,
        {group.suite: row for group, row in found.items()},
        {group.suite: group.timings[name] for group in found if name in group.timings},
        mean_of(relative(group, name) for group in found) if whole else None,
        sum(row.prefill_ratio for row in rows) / len(rows),
        sum(row.pruned_prefill_ratio for row in rows) / len(rows),
        mean_of(row.all_calls.speedup for row in rows),
        mean_of(row.pruned_calls.speedup if row.pruned_calls else None for row in rows),
    )


def mean_of(values: Iterable[float | None]) -> float | None:
    """The mean; None if a value is missing."""
    known, number = 0.0, 0
    for value in values:
        if value is None:
            return None
        known, number = known + value, number + 1
    return known / number


def relative(group: Group, condition: str) -> float | None:
    """Success rate over that of all tokens, on the scenes that both finished; None: no such."""
    solved = group.solved()
    before, after = solved.get(ALL_TOKENS, {}), solved.get(condition, {})
    common = before.keys() & after.keys()
    full = sum(before[seed] for seed in common)
    return sum(after[seed] for seed in common) / full if full else None


def compare(group: Group, against: str) -> dict[str, PairedSuccess | None]:
    """Every condition but `against`, by label, on the scenes that both finished; None: no such."""
    solved = group.solved()
    before = solved.get(against, {})
    compared: dict[str, PairedSuccess | None] = {}
    for condition in group.conditions:
        if condition.name == against or condition.name not in solved:
            continue
        after = solved[condition.name]
        common = sorted(before.keys() & after.keys())
        compared[condition.label] = (
            paired_success([before[s] for s in common], [after[s] for s in common])
            if common
            else None
        )
    return compared


def per_task(group: Group) -> dict[str, list[tuple[int, int]]]:
    """Solved and finished episodes of each task, by the condition's label."""
    won: dict[tuple[str, int], list[bool]] = {}
    for episode in group.episodes:
        won.setdefault((episode.condition, episode.target), []).append(episode.success)
    tasks = range(len(group.setup.tasks))
    return {
        condition.label: [
            (sum(found), len(found))
            for found in (won.get((condition.name, task), []) for task in tasks)
        ]
        for condition in group.conditions
    }


def replay_rows(folders: Sequence[str | Path]) -> list[dict[str, Any]]:
    """Every call that `vla-pruner latency` timed, one row each, for CSV."""
    rows = []
    for folder in folders:
        with Store(folder) as store:
            for setup in dict.fromkeys(item.setup for item in store.planned()):
                for one in store.replays(setup)[0]:
                    for call, ms in enumerate(one.latency_ms):
                        rows.append(
                            {
                                "suite": setup.suite,
                                "policy": setup.policy,
                                "weights": setup.weights,
                                "condition": one.condition,
                                "scene": one.scene,
                                "round": one.round,
                                "call": call,
                                "latency_ms": ms,
                                "warm_up": one.warm_up[call],
                                "flops": one.flops[call] if one.flops else None,
                                "decoder_flops": (
                                    one.decoder_flops[call] if one.decoder_flops else None
                                ),
                            }
                        )
    return rows


# -- motion, delay, robustness -------------------------------------------------------------------


def motion_cells(row: ConditionRow) -> list[str]:
    """One row of the table of motion: scenes, then each of `MEASURES`."""
    if row.motion is None:
        return ["-"] * (1 + len(MEASURES))
    changes = row.motion.changes
    return [str(row.motion.scenes), *(_change(changes.get(name)) for name in MEASURES)]


def motion_header() -> list[str]:
    """Columns of the table of motion, behind the condition."""
    return ["scenes", *(f"{name}, {unit}" if unit else name for name, unit in MEASURES.values())]


def _change(change: Change | None) -> str:
    if change is None:
        return "-"
    if change.ratio is None:
        return f"{change.mean:.3g}"
    text = f"{change.mean:.3g} ({change.ratio:.2f}x"
    if change.interval is None:
        return text + ")"
    return f"{text}, {change.interval.low:.2f} to {change.interval.high:.2f})"


@dataclass(frozen=True)
class Robustness:
    """What pruning costs in a perturbed suite beyond what it costs in the untouched one.

    Args:
        policy, suite, condition: who, where (with the perturbation), and how.
        scenes: that all four cells finished.
        full, pruned: scenes solved on all tokens: untouched, perturbed; the same when pruned.
        difference: of the cost in success, perturbed minus untouched; below 0: pruning costs more
            there.
        interval: 95 %, see `difference_of_differences`.
    """

    policy: str
    suite: str
    condition: str
    scenes: int
    full: tuple[int, int]
    pruned: tuple[int, int]
    difference: float
    interval: Interval


def robustness(groups: Sequence[Group]) -> list[Robustness]:
    """Every condition of every perturbed suite whose untouched one is there, too."""
    found = []
    by_key = {(group.setup.policy, group.setup.suite): group for group in groups}
    for (policy, suite), group in by_key.items():
        base, _, changes = suite.partition("+")
        change, _, clock = changes.partition("+")
        untouched = by_key.get((policy, f"{base}+{clock}" if clock else base))
        if not change or change.startswith("live") or untouched is None:
            continue
        before, after = untouched.solved(), group.solved()
        for condition in group.conditions:
            four = [cells.get(n, {}) for cells in (before, after) for n in ("none", condition.name)]
            common = sorted(set.intersection(*(set(cell) for cell in four)))
            if condition.name == ALL_TOKENS or not common:
                continue
            solved = [[cell[seed] for seed in common] for cell in four]
            first, second = paired_success(*solved[:2]), paired_success(*solved[2:])
            full, pruned = (sum(solved[0]), sum(solved[2])), (sum(solved[1]), sum(solved[3]))
            found.append(
                Robustness(
                    policy,
                    group.suite,
                    condition.label,
                    len(common),
                    full,
                    pruned,
                    *difference_of_differences(first, second),
                )
            )
    return found


def delay_of(group: Group) -> float | None:
    """The latency in ms that was given to a suite for every call; None: no clock, or another."""
    clock = group.setup.clock
    if clock is None or clock.latencies is None or len(clock.latencies) != 1:
        return None
    return clock.latencies[0].pruned


def across_delays(
    groups: Sequence[Group], condition: str
) -> dict[tuple[float, float], PairedSuccess]:
    """A condition with a short latency against all tokens with one at least as long.

    Args:
        groups: one policy and one suite under several given latencies.
        condition: name.

    Returns:
        By latency of all tokens and of the condition in ms, on the scenes that both finished.
    """
    by_delay = {delay: group.solved() for group in groups if (delay := delay_of(group)) is not None}
    found = {}
    for full, before in sorted(by_delay.items()):
        for pruned, after in sorted(by_delay.items()):
            old, new = before.get(ALL_TOKENS, {}), after.get(condition, {})
            common = sorted(old.keys() & new.keys())
            if pruned <= full and common:
                found[full, pruned] = paired_success(
                    [old[s] for s in common], [new[s] for s in common]
                )
    return found
