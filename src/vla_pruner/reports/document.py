"""A report as headings, sentences and tables, and written as Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Heading:
    """A heading; level 1 is the title."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    """A paragraph; a `notice` is set apart."""

    text: str
    notice: bool = False


@dataclass(frozen=True)
class Items:
    """A list."""

    items: Sequence[str]


@dataclass(frozen=True)
class Table:
    """Cells for people.

    Args:
        caption: what the table holds; LaTeX prints it, Markdown has a heading above.
        header: one name per column.
        rows: cells, row by row.
        shades: 0 to 1 for each cell behind the first column, for a heat map; None: no shade.
    """

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    shades: Sequence[Sequence[float | None]] | None = None


Block = Heading | Text | Items | Table


_TAG = re.compile(r"<(?=[a-zA-Z/!?])")


def _line(text: str) -> str:
    """A text of one line, in which nothing is a tag."""
    return _TAG.sub(r"\\<", " ".join(text.split()))


def to_markdown(blocks: Sequence[Block]) -> str:
    """The blocks as Markdown."""
    parts = []
    for block in blocks:
        match block:
            case Heading():
                parts.append(f"{'#' * block.level} {_line(block.text)}")
            case Text():
                parts.append(_TAG.sub(r"\\<", block.text))
            case Items():
                parts.append("\n".join(f"* {_line(item)}" for item in block.items))
            case Table():
                rows = [block.header, ["---"] * len(block.header), *block.rows]
                cells = [[_line(cell).replace("|", "\\|") for cell in row] for row in rows]
                parts.append("\n".join(f"| {' | '.join(row)} |" for row in cells))
    return "\n\n".join(parts) + "\n"
