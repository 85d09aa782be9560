"""A report as LaTeX floats for `\\input`: booktabs, a caption and a label each, never too wide."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from vla_pruner.episodes.condition import ALL_TOKENS, Condition
from vla_pruner.reports.compare import Group
from vla_pruner.reports.document import Block, Heading, Items, Table, Text
from vla_pruner.reports.latency import pace
from vla_pruner.reports.summary import ConditionRow, Summary

HEAD = r"""% Preamble: \usepackage{booktabs,graphicx}
% A table wider than its column, or longer than a page, is scaled down to it.
\providecommand{\vlaprunerfit}[1]{\sbox0{#1}%
  \ifdim\wd0>\linewidth\sbox0{\resizebox{\linewidth}{!}{\usebox0}}\fi
  \ifdim\dimexpr\ht0+\dp0\relax>.85\textheight
    \sbox0{\resizebox*{!}{.85\textheight}{\usebox0}}\fi
  \usebox0}"""

_SIGNS: Mapping[int, str] = str.maketrans(
    {
        **{sign: f"\\{sign}" for sign in "&%$#_{}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "|": r"\textbar{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "−": "$-$",  # noqa: RUF001
        "±": r"$\pm$",
        "³": "$^3$",
        "×": r"$\times$",  # noqa: RUF001
    }
)
"""What means something to LaTeX, and what its oldest encoding lacks."""
_QUOTE = {ord('"'): "''"}
_LIGATURE = re.compile(r"(?<=-)(?=-)|(?<=[?!])(?=`)|(?<=,)(?=,)")
_UNKNOWN = re.compile(r"[^\x20-\x7eÀ-ÖØ-öø-ÿ±³×−]|[ÐÞðþ]")  # noqa: RUF001


def escape(text: str) -> str:
    """Text that LaTeX prints as it is; signs that not every font has, by their number.

    A cell may begin with `[` or `*`, which the end of the row before would take for its own.
    """
    plain = _UNKNOWN.sub(lambda sign: f"(U+{ord(sign[0]):04X})", " ".join(text.split()))
    escaped = _LIGATURE.sub("\0", plain).translate(_QUOTE).translate(_SIGNS).replace("\0", "{}")
    return "{}" + escaped if escaped.startswith(("[", "*")) else escaped


def to_latex(groups: Sequence[Group], blocks: Sequence[Block]) -> str:
    """The paper's tables: one of a column's width for each group, then every table of the report.

    Args:
        groups: what was run.
        blocks: the report; sentences become comments.
    """
    parts = [HEAD]
    for number, group in enumerate(groups):
        parts.append(group_table(group, _label(group.title, number)))
    for number, block in enumerate(blocks, start=len(groups)):
        match block:
            case Table():
                parts.append(_wide(block, _label(block.caption, number)))
            case Heading() | Text():
                parts.append(f"% {_comment(block.text)}")
            case Items():
                parts += [f"% {_comment(item)}" for item in block.items]
    return "\n".join(parts) + "\n"


def group_table(group: Group, label: str) -> str:
    """Success and speed of one policy in one suite: grouped by budget, the best of each in bold.

    Success in percent; speed-up of all calls, and of those that drop tokens.

    Args:
        group: policy and suite.
        label: for `\\ref`.
    """
    summary = Summary(**{**vars(group.summary()), "apart": group.timings})
    conditions = {condition.name: condition for condition in group.conditions}
    head = ["Method", r"Success (\%)", "Difference", "Speed-up", "pruned calls"]
    lines = [" & ".join(head) + r" \\", r"\midrule"]
    full = [row for row in summary.rows if row.name == ALL_TOKENS]
    lines += [_line("all tokens", _values(summary, row), []) for row in full]
    for title, rows in by_budget(summary.rows, conditions).items():
        values = [_values(summary, row) for row in rows]
        best = [_best(values, column) for column in range(4)]
        if rows is not summary.rows and (full or lines[-1] != r"\midrule"):
            lines.append(r"\midrule")
        lines.append(rf"\multicolumn{{5}}{{l}}{{\itshape {escape(title)}}} \\")
        for number, row in enumerate(rows):
            condition = conditions[row.name]
            name = ", ".join([condition.method, *condition.label.split(", ", 2)[2:]])
            bold = [column for column in range(4) if number in best[column]]
            lines.append(_line(escape(name), values[number], bold))
    episodes = sorted({row.episodes for row in summary.rows})
    counts = str(episodes[0]) if len(episodes) == 1 else f"{episodes[0]} to {episodes[-1]}"
    caption = (
        f"{group.title}: success over {counts} episodes, difference from all tokens on the same "
        "scenes in points, and speed-up of a call, warm-up calls included and of pruned calls "
        "alone. Best of each budget in bold."
    )
    return _float("table", caption, label, "lrrrr", lines)


def by_budget(
    rows: Sequence[ConditionRow], conditions: Mapping[str, Condition]
) -> dict[str, list[ConditionRow]]:
    """Rows that drop tokens, by what they keep; the larger budget first."""
    kept = {row.name: conditions[row.name].keep for row in rows}
    pruned = [row for row in rows if kept[row.name] is not None]
    found: dict[str, list[ConditionRow]] = {}
    for row in sorted(pruned, key=lambda row: _size(kept[row.name])):
        keep = kept[row.name]
        share = f"{100 * keep:g} %" if isinstance(keep, float) else str(keep)
        found.setdefault(f"{share} of {row.visual} visual tokens", []).append(row)
    return found


def _size(keep: float | int | None) -> tuple[bool, float]:
    return isinstance(keep, int), -(keep or 0)


def _values(summary: Summary, row: ConditionRow) -> list[tuple[str, float | None]]:
    """Cells behind the name, each with the number that the best one is found by."""
    speed = pace(summary, row)
    gap = None if row.difference is None else f"{100 * row.difference:+.0f}"
    return [
        (f"{100 * row.success:.1f}", row.success),
        ("" if gap is None else f"${gap}$", row.difference),
        _times(speed.speedup),
        _times(speed.pruned_speedup),
    ]


def _times(value: float | None) -> tuple[str, float | None]:
    return ("", None) if value is None else (rf"{value:.2f}$\times$", value)


def _best(rows: Sequence[Sequence[tuple[str, float | None]]], column: int) -> set[int]:
    """Which rows are best as printed; none where there is nothing to choose from.

    Differences are in bold nowhere: they say what success says.
    """
    values = {number: row[column] for number, row in enumerate(rows) if row[column][1] is not None}
    if column == 1 or len(values) < 2:
        return set()
    top = max(values.values(), key=lambda cell: cell[1] or 0.0)
    return {number for number, cell in values.items() if cell[0] == top[0]}


def _line(name: str, values: Sequence[tuple[str, float | None]], bold: Sequence[int]) -> str:
    cells = [
        rf"\textbf{{{text}}}" if column in bold else text for column, (text, _) in enumerate(values)
    ]
    return " & ".join([name, *cells]) + r" \\"


def _wide(table: Table, label: str) -> str:
    """A table of the report over both columns, cell for cell."""
    lines = [
        " & ".join(escape(cell) for cell in table.header) + r" \\",
        r"\midrule",
        *(" & ".join(escape(cell) for cell in row) + r" \\" for row in table.rows),
    ]
    return _float("table*", table.caption, label, "l" + "r" * (len(table.header) - 1), lines)


def _float(kind: str, caption: str, label: str, columns: str, lines: Sequence[str]) -> str:
    return "\n".join(
        [
            rf"\begin{{{kind}}}[t]",
            r"\centering\small",
            rf"\caption{{{escape(caption)}}}",
            rf"\label{{{label}}}",
            rf"\vlaprunerfit{{\begin{{tabular}}{{@{{}}{columns}@{{}}}}",
            r"\toprule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}}",
            rf"\end{{{kind}}}",
        ]
    )


def _label(text: str, number: int) -> str:
    """A label of letters, digits and hyphens that no other table of the file has."""
    words = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:48].rstrip("-")
    return f"tab:{words}-{number + 1}"


def _comment(text: str) -> str:
    return " ".join(text.split())
