"""The report of one or more runs: which tables and notes it has, and their numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from vla_pruner.episodes.condition import ALL_TOKENS
from vla_pruner.measure.statistics import PairedSuccess, holm
from vla_pruner.reports import latency
from vla_pruner.reports.compare import (
    Group,
    Line,
    across_delays,
    compare,
    delay_of,
    mean_of,
    motion_cells,
    motion_header,
    per_task,
    robustness,
    table_one,
)
from vla_pruner.reports.document import (
    Block,
    Heading,
    Items,
    Table,
    Text,
)
from vla_pruner.reports.files import flat
from vla_pruner.reports.summary import (
    COLUMNS,
    NOTES,
    ConditionRow,
    Latency,
    cells,
    difference_text,
    episode_row,
    flat_row,
    percent,
    speedup_text,
)
from vla_pruner.reports.timings import Speed, Timing

DEFINITIONS = (
    "Success: share of the finished episodes that were solved within the step limit of the suite. "
    "Relative accuracy: mean over suites of the success rate divided by that of all tokens, on "
    "the scenes that both finished. Prefill FLOPs: multiply-accumulates of the language model's "
    "prefill by formula, gated FFN (Eq. 11 and 12 of the paper), relative to all tokens. Pruned "
    "calls leave out the first calls of an episode, which run on all tokens; all other figures "
    "include them. Cost is a mean over suites. Counted FLOPs: what torch ran, scores included. "
)
IN_THE_LOOP = (
    "Speed-up: median latency of a call with all tokens over that of this row. Latency is that of "
    "calls in the closed loop, with the other processes of the run at work: it compares within a "
    "run alone; `vla-pruner latency RUN` measures it apart."
)
APART = (
    "Latency, speed-up and memory (the largest over suites) were measured apart, on recorded "
    "observations that every condition replayed in turn; the tables of each suite say how. A row "
    "that was not measured so has none."
)
MOTION = (
    "Motion in simulated time, means over the scenes that both this condition and all tokens "
    "solved (all tokens: that it solved); in brackets the ratio to all tokens on the same scenes, "
    "with its 95 % bootstrap interval over scenes. Jerk: mean norm of the third difference of "
    "positions times the cube of the control rate. Action rate: mean norm of the change of a "
    "command from step to step."
)
LIVE = (
    "The scene did not wait for the policy: a call's actions came so many steps late. Held: steps "
    "in which nothing was there to carry out, and the robot held still. Effective rate: steps with "
    "an action of the policy, per second."
)
ROBUST = (
    "Solved on all tokens and pruned, in the untouched and in the perturbed suite, on the scenes "
    "that all four finished. Extra cost: what pruning changes in points there, minus what it "
    "changes in the untouched suite; below 0, pruning costs robustness. 95 % interval from those "
    "of the two differences (MOVER)."
)
ACROSS = (
    "Pruned with a short latency against all tokens with one at least as long, on the same scenes: "
    "difference in points (95 %), exact p. Where a machine makes calls of these two lengths, that "
    "is what pruning gains."
)
STAND_IN = (
    "Stand-in assets: some objects of this suite look other than in the published one. Success "
    "rates compare within this report, not with published ones."
)


def blocks_of(groups: Sequence[Group], against: str | None = None) -> list[Block]:
    """The whole report.

    Args:
        groups: what was run.
        against: name of a condition that all others are also compared with, pair by pair.
    """
    summaries = {group: group.summary() for group in groups}
    blocks: list[Block] = [Heading("Success and cost of visual token pruning", 1)]
    for group, summary in summaries.items():
        if not summary.complete:
            missing = summary.planned - len(summary.episodes)
            blocks.append(
                Text(f"Partial: {missing} episodes of {group.title} are missing.", notice=True)
            )
    if any(group.setup.stand_in_assets for group in groups):
        blocks.append(Text(STAND_IN, notice=True))
    suites = list(dict.fromkeys(group.suite for group in groups))
    apart = any(group.timings for group in groups)
    blocks.append(_table_one(table_one(summaries), suites, apart))
    blocks.append(Text(DEFINITIONS + (APART if apart else IN_THE_LOOP)))
    for group, summary in summaries.items():
        rows = [[*cells(row)] for row in summary.rows]
        blocks += [Heading(group.title), Table(group.title, COLUMNS, rows)]
        if group.timings:
            blocks += _timings(group)
        blocks += [*_motion(group, summary.rows), *_live(group, summary.rows)]
        if against and any(condition.name == against for condition in group.conditions):
            blocks += [
                Heading(f"Against {against}", 3),
                _pairs(f"{group.title}: against {against}", compare(group, against)),
            ]
        blocks += [Heading("By task: episodes solved", 3), _tasks(group)]
    blocks += [*_robustness(groups), *_across(groups)]
    blocks += [Text(NOTES), Heading("Measured with"), Items(list(_facts(groups)))]
    return blocks


def _table_one(lines: Sequence[Line], suites: Sequence[str], apart: bool) -> Table:
    header = ["policy", "tokens", *suites, "relative accuracy", "prefill FLOPs"]
    header += ["in pruned calls", *(APART_COLUMNS if apart else ("speed-up", "of pruned calls"))]
    return Table(
        "Success per suite, and cost, of every policy with all and with few visual tokens",
        header,
        [
            [
                line.policy,
                line.label,
                *(_success(line.rows.get(suite)) for suite in suites),
                "-" if line.relative_accuracy is None else percent(line.relative_accuracy),
                percent(line.prefill_ratio),
                percent(line.pruned_prefill_ratio),
                *(_cost_apart(line) if apart else _cost_in_the_loop(line)),
            ]
            for line in lines
        ],
    )


def _cost_in_the_loop(line: Line) -> list[str]:
    rows = line.rows.values()
    return [
        _speedup(line.speedup, [row.all_calls for row in rows]),
        _speedup(line.pruned_speedup, [row.pruned_calls for row in rows]),
    ]


APART_COLUMNS = (
    "latency ms",
    "speed-up",
    "warm-up calls ms",
    "pruned calls ms",
    "speed-up of pruned calls",
    "peak memory",
    "counted FLOPs, call",
    "counted, decoder",
)


def _cost_apart(line: Line) -> list[str]:
    """What was measured apart, if it was in every suite of the line."""
    found = list(line.timings.values())
    if len(found) < len(line.rows):
        return ["-"] * len(APART_COLUMNS)
    every, pruned = [one.every for one in found], [one.pruned for one in found]
    known = [speed.peak_mb for speed in every if speed.peak_mb is not None]
    return [
        _milliseconds(every),
        _speedup_apart(every),
        _milliseconds([one.warm_up for one in found]),
        _milliseconds(pruned),
        _speedup_apart(pruned),
        latency.memory_text(max(known) if len(known) == len(found) else None),
        _counted(one.counted.call if one.counted else None for one in found),
        _counted(one.counted.decoder if one.counted else None for one in found),
    ]


def _counted(shares: Iterator[float | None]) -> str:
    mean = mean_of(shares)
    return "-" if mean is None else latency.share_text(mean)


def _milliseconds(speeds: Sequence[Speed | None]) -> str:
    mean = mean_of(speed.latency_ms if speed else None for speed in speeds)
    return "-" if mean is None else f"{mean:.1f}"


def _speedup_apart(speeds: Sequence[Speed | None]) -> str:
    """The ratio of the latencies that are printed: means over suites."""
    before = mean_of(s.latency_ms * s.speedup if s and s.speedup else None for s in speeds)
    after = mean_of(speed.latency_ms if speed else None for speed in speeds)
    return _speedup(before / after if before and after else None, speeds)


def _speedup(mean: float | None, latencies: Sequence[Latency | Speed | None]) -> str:
    """Over suites; of a single suite with its interval."""
    if mean is None:
        return "-"
    only = latencies[0] if len(latencies) == 1 else None
    return f"{mean:.2f}x" if only is None else speedup_text(only.speedup, only.interval)


def _timings(group: Group) -> list[Block]:
    """What was measured apart."""
    labels = {condition.name: condition.label for condition in group.conditions}
    rows = [
        latency.cells(labels[name], group.timings[name]) for name in labels if name in group.timings
    ]
    said = (f"{name}: {value}" for name, value in group.timed_on.items() if value is not None)
    return [
        Heading("Latency on replayed observations", 3),
        Table(f"{group.title}: latency on replayed observations", latency.COLUMNS, rows),
        Text(f"{latency.notes(group.timings)} Measured with: {', '.join(said)}."),
    ]


def _success(row: ConditionRow | None) -> str:
    return "-" if row is None else f"{100 * row.success:.1f} % ({row.successes} of {row.episodes})"


def _pairs(caption: str, compared: Mapping[str, PairedSuccess | None]) -> Table:
    header = ["condition", "scenes of both", "only this solved", "only that solved", "difference"]
    corrected = _corrected(compared.values())
    rows = [
        [label, "-", "-", "-", "-"]
        if pairs is None
        else [
            label,
            str(pairs.pairs),
            str(pairs.gained),
            str(pairs.lost),
            _difference(pairs, corrected[pairs]),
        ]
        for label, pairs in compared.items()
    ]
    return Table(caption, header, rows)


def _corrected(compared: Iterable[PairedSuccess | None]) -> dict[PairedSuccess, float]:
    """P-values of a table, corrected for its being several."""
    found = [pairs for pairs in compared if pairs is not None]
    return dict(zip(found, holm([pairs.p_value() for pairs in found]), strict=True))


def _difference(pairs: PairedSuccess, corrected: float) -> str:
    return difference_text(pairs.difference, pairs.interval(), pairs.p_value(), corrected)


def _motion(group: Group, rows: Sequence[ConditionRow]) -> list[Block]:
    if all(row.motion is None for row in rows):
        return []
    header = ["condition", *motion_header()]
    table = [[row.label, *motion_cells(row)] for row in rows]
    return [
        Heading("Motion, on scenes that both solved", 3),
        Table(f"{group.title}: motion, on scenes that both solved", header, table),
        Text(MOTION),
    ]


def _live(group: Group, rows: Sequence[ConditionRow]) -> list[Block]:
    clock = group.setup.clock
    if clock is None:
        return []
    header = ["condition", "delay, steps", "longest", "held, steps", "of all", "effective rate"]
    table = [
        [
            row.label,
            f"{row.live.delay:.2f}",
            str(row.live.delay_max),
            f"{row.live.held:.1f}",
            percent(row.live.held_share),
            f"{clock.hz * (1 - row.live.held_share):.2f} of {clock.hz:g} Hz",
        ]
        for row in rows
        if row.live is not None
    ]
    return [
        Heading("Against the clock", 3),
        Table(f"{group.title}: against the clock", header, table),
        Text(LIVE),
    ]


def _robustness(groups: Sequence[Group]) -> list[Block]:
    found = robustness(groups)
    if not found:
        return []
    header = ["policy", "suite", "condition", "scenes", "all tokens", "pruned", "extra cost"]
    table = [
        [
            one.policy,
            one.suite,
            one.condition,
            str(one.scenes),
            *(f"{a} to {b}" for a, b in (one.full, one.pruned)),
            f"{100 * one.difference:+.0f} points "
            f"({100 * one.interval.low:+.0f} to {100 * one.interval.high:+.0f})",
        ]
        for one in found
    ]
    caption = "Robustness: solved in the untouched and in the perturbed suite"
    return [Heading("Robustness"), Table(caption, header, table), Text(ROBUST)]


def _across(groups: Sequence[Group]) -> list[Block]:
    blocks: list[Block] = []
    alike: dict[tuple[str, str], list[Group]] = {}
    for group in groups:
        if delay_of(group) is not None:
            suite = group.setup.suite.partition("+live")[0]
            alike.setdefault((group.setup.policy, suite), []).append(group)
    for (policy, suite), own in alike.items():
        names = {c.name: c.label for group in own for c in group.conditions}
        for name in (name for name in names if name != ALL_TOKENS):
            pairs = across_delays(own, name)
            columns = sorted({pruned for _, pruned in pairs})
            if len(columns) < 2:
                continue
            corrected = _corrected(pairs.values())
            header = ["all tokens", *(f"{ms:g} ms pruned" for ms in columns)]
            table = [
                [
                    f"{full:g} ms",
                    *(
                        _difference(found, corrected[found]) if found else ""
                        for found in (pairs.get((full, ms)) for ms in columns)
                    ),
                ]
                for full in sorted({full for full, _ in pairs})
            ]
            caption = f"{policy} in {suite}: {names[name]} against all tokens, by latency"
            blocks += [Heading(caption, 3), Table(caption, header, table)]
    return [Heading("Success against delay"), *blocks, Text(ACROSS)] if blocks else []


def _tasks(group: Group) -> Table:
    rows, shades = [], []
    for label, solved in per_task(group).items():
        rows.append([label, *("-" if not total else f"{won} of {total}" for won, total in solved)])
        shades.append([won / total if total else None for won, total in solved])
    header = ["condition", *group.setup.tasks]
    return Table(f"{group.title}: episodes solved, by task", header, rows, shades)


def _facts(groups: Sequence[Group]) -> Iterator[str]:
    for group in groups:
        setup, control = group.setup, group.setup.control
        yield (
            f"{group.title}: weights {setup.weights}, cameras {', '.join(control.cameras)}, "
            f"{control.execute} actions per call, at most {setup.step_limit} steps"
        )
    stamps = [stamp for group in groups for stamp in group.environments]
    distinct = {str({**stamp, "date": None}): stamp for stamp in stamps}
    for stamp in distinct.values():
        yield ", ".join(f"{name}: {value}" for name, value in stamp.items() if value is not None)


def rows_of(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Every number of every condition, one flat row each, for CSV."""
    return [
        {
            "suite": group.setup.suite,
            "policy": group.setup.policy,
            "stand_in_assets": group.setup.stand_in_assets,
            **flat_row(row),
            **_flat_timing(group.timings.get(row.name)),
        }
        for group in groups
        for row in group.summary().rows
    ]


def _flat_timing(timing: Timing | None) -> dict[str, Any]:
    return {} if timing is None else flat(asdict(timing), "replayed.")


def episode_rows_of(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """All episodes, by policy, suite, condition and scene."""
    rows = [
        {
            "suite": group.setup.suite,
            "policy": group.setup.policy,
            "weights": group.setup.weights,
            **episode_row(episode),
        }
        for group in groups
        for episode in group.episodes
    ]
    return sorted(rows, key=lambda r: (r["policy"], r["suite"], r["condition"], r["seed"]))
