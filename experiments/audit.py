"""Recompute every figure of README.md and of pages of results from the rows in experiments/results.

    python experiments/audit.py            # exit code 1, and what differs, if a figure does
    python experiments/audit.py --write    # put the recomputed figures into the tables

A table that is checked has a line before it that names its rows, `<!-- rows: FILE [key=value] -->`
with `suites=` (default robosuite_pickplace), pooled over, and `family=`, where more was compared
than is printed. The first cell of a row holds a condition in backticks; `column` says what the
others hold. In an entry no other figure may stand that none of its tables holds. Statistics are
computed here with scipy, apart from the package's own.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from recompute import (
    BENCH,
    CLOCK,
    FULL,
    LATENCIES,
    MOTIONS,
    Counter4,
    Pairs,
    Source,
    bench,
    clock,
    extra,
    flops,
    holm,
    latency,
    mcnemar,
    motion,
    pairs_of,
    points,
    rate,
    solved,
)

ROOT = Path(__file__).parents[1]
PAGES = (
    ROOT / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("results", "realtime", "smol", "pi0", "pitfalls")),
)
MARK = re.compile(r"<!-- rows: (\S+)((?: \w+=\S+)*) -->")


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
        corrected = iter(holm([mcnemar(p.gained, p.lost) for p in found if p], source.family))
        return ["-" if p is None else points(p, next(corrected)) for p in found]
    if metric in MOTIONS:
        return [motion(source, name, MOTIONS[metric], suites) for name in names]
    if metric in CLOCK:
        return [clock([source.cell(name, s) for s in suites], metric) for name in names]
    if metric in LATENCIES:
        return [latency(source.file, name, LATENCIES[metric]) for name in names]
    if metric in BENCH:
        return [bench(source.file, name, metric) for name in names]
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


def robustness(source: Source, names: Sequence[str], conditions: Sequence[str]) -> list[list[str]]:
    """By perturbation: solved on all tokens, then for each condition solved, the difference, and
    what of it is beyond that of the untouched suite, on the scenes that all these cells finished.
    """
    base, everywhere = source.suites[0], [n for n in names if n not in ("untouched", "all five")]
    arms, table = [FULL, *conditions], []
    for name in names:
        before, after = [[Counter4() for _ in conditions] for _ in range(2)]
        for number, change in enumerate(everywhere if name == "all five" else [name]):
            suite = base if change == "untouched" else f"{base}+{change}"
            cells = {(s, c): solved(source.cell(c, s)) for s in (base, suite) for c in arms}
            common = sorted(set.intersection(*(set(cell) for cell in cells.values())))
            untouched = [(base, before)] if number == 0 else []  # The same scenes each time.
            for place, counters in [*untouched, (suite, after)]:
                for condition, counter in zip(conditions, counters, strict=True):
                    pair = (cells[place, arm] for arm in (FULL, condition))
                    counter.add(*([cell[s] for s in common] for cell in pair))
        row = [f"{after[0].full} of {after[0].pairs}"]
        for old, new in zip(before, after, strict=True):
            row += [f"{new.pruned} of {new.pairs}", points(new.of(), None)]
            row.append("-" if name == "untouched" else extra(old.of(), new.of()))
        table.append(row)
    return table


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
    r"|\d+(?:\.\d+)? ?%"
)
"""What a sentence may not say unless a table beside it does."""

SETTINGS = {"95 %", "100 %", "50 %", "25 %", "12.5 %", "6.25 %"}
"""Confidence and budgets, which are chosen and not measured."""

TOLD = ("the paper says", "column")
"""First words of tables that quote others, or say what a column holds."""


def measured(text: str) -> list[str]:
    """Figures in a text that somebody measured."""
    return [figure for figure in FIGURE.findall(text) if figure not in SETTINGS]


def audit(page: Path, write: bool = False) -> list[str]:
    """What differs on a page; with `write` the page is corrected instead."""
    lines = page.read_text("utf-8").splitlines()
    wrong: list[str] = []
    number, start, held, told = 0, 0, "", False
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
        if lines[number].startswith("|") and not lines[number - 1].startswith("|"):
            told = lines[number].strip("| ").startswith(TOLD)
        if lines[number].startswith("|") and not told and measured(lines[number]):
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
        for figure in measured(text)
        if figure.strip(" (") not in held
    ]


def _table(
    page: Path, mark: re.Match[str], lines: list[str], first: int, last: int, write: bool
) -> list[str]:
    options = dict(word.split("=", 1) for word in mark[2].split())
    suites = options.get("suites", "robosuite_pickplace").split(",")
    source = Source(mark[1], tuple(suites), int(options.get("family", 0)))
    header, *rows = [_cells(line) for line in lines[first:last]]
    body = rows[1:]
    labels = [_label(row[0]) for row in body]
    try:
        if "by" in options and options["by"] == "delay":
            made = by_delay(source, header[1:], labels)
        elif "by" in options:
            made = robustness(source, labels, options["by"].split(","))
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
                if measured(row[place]):
                    wrong.append(f"{page.name}:{first + 3 + number}: {row[place]!r} has no rows")
            elif not agree(row[place], value):
                where = f"{page.name}:{first + 3 + number}: {row[0]}, {header[place]}"
                wrong.append(f"{where}: printed {row[place]!r}, rows say {value!r}")
                row[place] = value
        if write:
            lines[first + 2 + number] = "| " + " | ".join(row) + " |"
    return [] if write and all("rows say" in text for text in wrong) else wrong


def _label(cell: str) -> str:
    """What stands in backticks, or all of it."""
    found = re.search(r"`([^`]+)`", cell)
    return found[1] if found else cell


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
