"""Recompute every figure of README.md and docs/results.md from the rows in experiments/results.

    python experiments/audit.py            # exit code 1, and what differs, if a figure does
    python experiments/audit.py --write    # put the recomputed figures into the tables

A table that is checked has a line before it that names its rows, `<!-- rows: FILE [key=value] -->`
with `suite=` (default robosuite_pickplace) and, where the pages say it otherwise, `suites=` to pool
over. The first cell of a row is a condition in backticks; `column` says what each holds.
Between two such lines no other figure may stand that none of the tables holds. Statistics are
computed here with scipy, apart from the package's own.
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from scipy import optimize, stats

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "experiments" / "results"
PAGES = (ROOT / "README.md", ROOT / "docs" / "results.md")
MARK = re.compile(r"<!-- rows: (\S+)((?: \w+=\S+)*) -->")
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
    """Where a table's figures come from: a file, and suites of it."""

    file: str
    suites: tuple[str, ...] = ("robosuite_pickplace",)

    def cell(self, condition: str, suite: str) -> Cell:
        """Episodes by scene."""
        found = {
            int(row["seed"]): row
            for row in read(self.file)
            if (row["suite"], row["condition"]) == (suite, condition)
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


def holm(p_values: Sequence[float]) -> list[float]:
    order, count = np.argsort(p_values), len(p_values)
    steps = [min(1.0, (count - rank) * p_values[i]) for rank, i in enumerate(order)]
    corrected = np.empty(count)
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


LATENCIES = {
    "latency, ms": "every ms",
    "speed-up": "every speed-up",
    "pruned calls, ms": "pruned ms",
    "speed-up of pruned calls": "pruned speed-up",
    "counted FLOPs, call": "call",
    "counted FLOPs, decoder": "decoder",
    "decoder, pruned calls": "pruned decoder",
}


# -- tables ----------------------------------------------------------------------------------------


def column(source: Source, header: str, names: Sequence[str]) -> list[str | None]:
    """What a column holds for these conditions; None: it is not a figure of ours."""
    metric, _, rest = header.removesuffix(", pooled").partition(" in ")
    suites = tuple(rest.split("+live")[0].split(",")) if rest and "+live" not in rest else ()
    suites = (rest,) if "+live" in rest else suites
    if rest.startswith("mini-"):
        source, suites = Source(f"{rest}.csv"), ()
    suites = tuple(ALIASES.get(name, name) for name in suites) or source.suites
    if metric == "solved":
        return [rate([source.cell(name, s) for s in suites]) for name in names]
    if metric == "prefill FLOPs":
        return [flops([source.cell(name, s) for s in suites]) for name in names]
    if metric == "difference" or metric.startswith("against "):
        other = FULL if metric == "difference" else metric.removeprefix("against ").strip("`")
        budget = "@" not in other and other != FULL  # a method: with as many tokens
        others = [f"{other}@{name.partition('@')[2]}" if budget else other for name in names]
        found = [
            None if name in (against, FULL) else pairs_of(source, against, name, suites)
            for name, against in zip(names, others, strict=True)
        ]
        corrected = iter(holm([mcnemar(p.gained, p.lost) for p in found if p]))
        return ["-" if p is None else points(p, next(corrected)) for p in found]
    if metric in MOTIONS:
        return [motion(source, name, MOTIONS[metric], suites) for name in names]
    if metric in LATENCIES:
        return [latency(source.file, name, LATENCIES[metric]) for name in names]
    return [None] * len(names)


ALIASES = {
    "Object": "libero_object",
    "Spatial": "libero_spatial",
    "Goal": "libero_goal",
    "LIBERO-10": "libero_10",
}


def by_delay(source: Source, header: Sequence[str], labels: Sequence[str]) -> list[list[str]]:
    """Rows: latency of all tokens; columns: that of the condition, `vla-pruner@0.25 at 200 ms`."""
    table, found = [], []
    for label in labels:
        cells: list[str | Pairs] = []
        for title in header:
            words = title.split(" at ")
            if title == "all tokens":
                cells.append(rate([source.cell(FULL, _live(source, label))]))
                continue
            old = solved(source.cell(FULL, _live(source, label)))
            new = solved(source.cell(words[0].strip("`"), _live(source, words[1])))
            common = old.keys() & new.keys()
            cells.append(
                Pairs(
                    sum(new[s] and not old[s] for s in common),
                    sum(old[s] and not new[s] for s in common),
                    len(common),
                )
            )
        table.append(cells)
        found += [cell for cell in cells if isinstance(cell, Pairs)]
    corrected = iter(holm([mcnemar(p.gained, p.lost) for p in found]))
    return [[c if isinstance(c, str) else points(c, next(corrected)) for c in row] for row in table]


def _live(source: Source, label: str) -> str:
    ms = label.strip("` ").removesuffix(" ms")
    return source.suites[0] if ms == "0" else f"{source.suites[0]}+live5:{ms}ms:ahead"


def robustness(source: Source, names: Sequence[str], condition: str) -> list[list[str]]:
    """By perturbation: solved on all tokens and pruned, the difference, and what is beyond that of
    the untouched suite, on the scenes that all four cells finished."""
    base, table = source.suites[0], []
    everywhere = [name for name in names if name != "all five"]
    for name in names:
        changes = everywhere[1:] if name == "all five" else [name]
        before, after = Counter4(), Counter4()
        for change in changes:
            suite = base if change == "untouched" else f"{base}+{change}"
            cells = [solved(source.cell(c, s)) for s in (base, suite) for c in (FULL, condition)]
            common = sorted(set.intersection(*(set(cell) for cell in cells)))
            before.add([cells[0][s] for s in common], [cells[1][s] for s in common])
            after.add([cells[2][s] for s in common], [cells[3][s] for s in common])
        row = [f"{after.full} of {after.pairs}", f"{after.pruned} of {after.pairs}"]
        row.append(points(after.of(), None))
        row.append("-" if name == "untouched" else extra(before.of(), after.of()))
        table.append(row)
    return table


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


# -- pages -----------------------------------------------------------------------------------------

BOOTSTRAP = re.compile(r"^(\S+ )?\(?(\d+\.\d\d)x[ ,]+\(?(\d+\.\d\d) to (\d+\.\d\d)\)$")
"""Intervals that are drawn: their last digit may differ."""


def agree(printed: str, computed: str) -> bool:
    one, other = BOOTSTRAP.match(printed), BOOTSTRAP.match(computed)
    if one is None or other is None:
        return printed == computed
    ends = zip(one.groups()[2:], other.groups()[2:], strict=True)
    near = all(abs(float(a) - float(b)) <= 0.011 + 0.02 * float(b) for a, b in ends)
    return one.groups()[:2] == other.groups()[:2] and near


FIGURE = re.compile(
    r"\d+ of \d+|[+-]\d+ (?:points|\()|\d+(?:\.\d+)?x\b|\d+(?:\.\d+)? ms\b|p = [\d.e-]+"
)
"""What a sentence may not say unless a table beside it does."""


def audit(page: Path, write: bool = False) -> list[str]:
    """What differs on a page; with `write` the page is corrected instead."""
    lines = page.read_text("utf-8").splitlines()
    wrong: list[str] = []
    number, start, held = 0, 0, ""
    while number < len(lines):
        if lines[number].startswith("## "):
            wrong += _sentences(page, lines[start:number], held)
            start, held = number, ""
        if (mark := MARK.search(lines[number])) is not None:
            first = number + 1
            while first < len(lines) and not lines[first].startswith("|"):
                first += 1
            last = first
            while last < len(lines) and lines[last].startswith("|"):
                last += 1
            wrong += _table(page, mark, lines, first, last, write)
            held += "\n".join(lines[first:last])
            number = last
            continue
        if lines[number].startswith("|") and FIGURE.search(lines[number]):
            wrong.append(f"{page.name}:{number + 1}: figures of a table that names no rows")
        number += 1
    wrong += _sentences(page, lines[start:], held)
    if write:
        page.write_text("\n".join(lines) + "\n", "utf-8")
    return wrong


def _sentences(page: Path, lines: Sequence[str], held: str) -> list[str]:
    """Figures of an entry's sentences that its tables do not hold."""
    text = "\n".join(line for line in lines if not line.startswith("|"))
    text = re.sub(r"```.*?```|`[^`]*`|<!--.*?-->", " ", text, flags=re.S)
    text = " ".join(text.split())
    return [
        f"{page.name}: {figure!r} stands in no table of {lines[0]!r}"
        for figure in FIGURE.findall(text)
        if figure.strip(" (") not in held
    ]


def _table(
    page: Path, mark: re.Match[str], lines: list[str], first: int, last: int, write: bool
) -> list[str]:
    options = dict(word.split("=", 1) for word in mark[2].split())
    suites = options.get("suites", options.get("suite", "robosuite_pickplace")).split(",")
    source = Source(mark[1], tuple(suites))
    header, *rows = [_cells(line) for line in lines[first:last]]
    body = rows[1:]
    labels = [row[0].strip("`") for row in body]
    try:
        if "by" in options and options["by"] == "delay":
            made = by_delay(source, header[1:], labels)
        elif "by" in options:
            made = robustness(source, labels, options["by"])
        else:
            titles = [title.replace("`", "") for title in header[1:]]
            columns = [column(source, title, labels) for title in titles]
            made = [list(row) for row in zip(*columns, strict=True)]
    except LookupError as error:
        return [f"{page.name}:{first + 1}: {error}"]
    wrong = []
    for number, (row, computed) in enumerate(zip(body, made, strict=True)):
        for place, value in enumerate(computed, start=1):
            if value is None:
                if FIGURE.search(row[place]):
                    wrong.append(f"{page.name}:{first + 3 + number}: {row[place]!r} has no rows")
            elif not agree(row[place], value):
                where = f"{page.name}:{first + 3 + number}: {row[0]}, {header[place]}"
                wrong.append(f"{where}: printed {row[place]!r}, rows say {value!r}")
                row[place] = value
        if write:
            lines[first + 2 + number] = "| " + " | ".join(row) + " |"
    return [] if write and all("rows say" in text for text in wrong) else wrong


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def main(words: Sequence[str]) -> int:
    """Audit pages; print what differs."""
    write = "--write" in words
    pages = [Path(word) for word in words if word != "--write"] or list(PAGES)
    wrong = [text for page in pages for text in audit(page, write)]
    print("\n".join(wrong) or f"{len(pages)} pages: every figure is that of its rows")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
