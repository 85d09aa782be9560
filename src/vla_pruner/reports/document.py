"""A report as headings, sentences, tables and plots, written as Markdown, HTML or LaTeX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;"
    "color:#1c2733;background:#fff}h1{font-size:1.6rem}h2{margin-top:2.4rem;font-size:1.2rem}"
    "table{border-collapse:collapse;font-size:.9rem}td,th{padding:.2rem .7rem;text-align:left;"
    "border-bottom:1px solid #8884}svg{width:100%;max-width:640px;font-size:11px}"
    "th[scope=row]{white-space:nowrap}svg text{fill:currentColor}"
    "img{max-width:100%;display:block;margin:.4rem 0}.legend span{margin-right:1rem;"
    "white-space:nowrap}"
    ".scroll{overflow-x:auto}.scroll td{white-space:nowrap}.notice{background:#fdf0d5;"
    "padding:.6rem}"
    "pre{white-space:pre-wrap}dt{font-weight:600}.square{font-size:.75rem}"
    ".square td{text-align:center}"
    "@media(prefers-color-scheme:dark){body{color:#dfe6ee;background:#12181f}"
    ".notice{background:#4a3710}}"
)


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
        caption: what the table holds; only LaTeX prints it, the others have a heading above.
        header: one name per column.
        rows: cells, row by row.
        shades: 0 to 1 for each cell behind the first column, for a heat map; None: no shade.
    """

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    shades: Sequence[Sequence[float | None]] | None = None


@dataclass(frozen=True)
class Plot:
    """An SVG figure; only HTML shows it."""

    svg: str


Block = Heading | Text | Items | Table | Plot


def to_markdown(blocks: Sequence[Block]) -> str:
    """The blocks as Markdown, without plots."""
    parts = []
    for block in blocks:
        match block:
            case Heading():
                parts.append(f"{'#' * block.level} {block.text}")
            case Text():
                parts.append(block.text)
            case Items():
                parts.append("\n".join(f"* {item}" for item in block.items))
            case Table():
                rows = [block.header, ["---"] * len(block.header), *block.rows]
                cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
                parts.append("\n".join(f"| {' | '.join(row)} |" for row in cells))
            case Plot():
                pass
    return "\n\n".join(parts) + "\n"


def to_html(blocks: Sequence[Block]) -> str:
    """The blocks as a page that loads nothing."""
    title = next((block.text for block in blocks if isinstance(block, Heading)), "")
    return html_page(title, "\n".join(_html(block) for block in blocks))


def html_page(title: str, body: str) -> str:
    """A page that loads nothing around `body`."""
    return (
        "<!doctype html><html lang='en'><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width'>"
        f"<title>{escape(title)}</title><style>{STYLE}</style>{body}</html>\n"
    )


def _html(block: Block) -> str:
    match block:
        case Heading():
            return f"<h{block.level}>{escape(block.text)}</h{block.level}>"
        case Text():
            return f"<p{' class=notice' if block.notice else ''}>{escape(block.text)}</p>"
        case Items():
            return f"<ul>{''.join(f'<li>{escape(item)}</li>' for item in block.items)}</ul>"
        case Plot():
            return block.svg
        case Table():
            head = "".join(f"<th scope='col'>{escape(cell)}</th>" for cell in block.header)
            rows = "".join(_html_row(block, number) for number in range(len(block.rows)))
            kind = " class='square'" if block.shades else ""
            return f"<div class='scroll'><table{kind}><tr>{head}</tr>{rows}</table></div>"


def _html_row(table: Table, number: int) -> str:
    first, *rest = table.rows[number]
    shades = table.shades[number] if table.shades else [None] * len(rest)
    cells = [f"<th scope='row'>{escape(first)}</th>"]
    for cell, shade in zip(rest, shades, strict=True):
        style = "" if shade is None else f" style='background:rgb(56 132 255/{shade:.2f})'"
        cells.append(f"<td{style}>{escape(cell)}</td>")
    return f"<tr>{''.join(cells)}</tr>"


_LATEX: Mapping[int, str] = str.maketrans(
    {
        **{sign: f"\\{sign}" for sign in "&%$#_{}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "|": r"\textbar{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
    }
)


def to_latex(blocks: Sequence[Block]) -> str:
    """The tables as LaTeX floats, for `\\input`; sentences become comments."""
    parts = []
    for block in blocks:
        match block:
            case Table():
                parts.append(_latex_table(block))
            case Heading() | Text():
                parts.append(f"% {block.text}")
            case Items():
                parts += [f"% {item}" for item in block.items]
            case Plot():
                pass
    return "\n".join(parts) + "\n"


def _latex_table(table: Table) -> str:
    rows = [" & ".join(cell.translate(_LATEX) for cell in row) + r" \\" for row in table.rows]
    head = " & ".join(cell.translate(_LATEX) for cell in table.header) + r" \\"
    columns = "l" + "r" * (len(table.header) - 1)
    lines = [
        r"\begin{table}[ht]",
        r"\centering\small",
        rf"\caption{{{table.caption.translate(_LATEX)}}}",
        rf"\begin{{tabular}}{{{columns}}}",
        r"\hline",
        head,
        r"\hline",
        *rows,
        r"\hline",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines)
