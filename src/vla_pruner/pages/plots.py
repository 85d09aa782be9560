"""Line plots by matplotlib, as SVG that takes its colours and its font from the page around it."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from vla_pruner.pages.colours import SERIES

Point = tuple[float, float, float, float]
"""x, y, and the lower and upper end of y's interval."""

_DASHES: tuple[Any, ...] = ("-", (0, (4, 2)), (0, (1, 1.5)))
_MARKS = ("o", "s", "^", "D", "v", "P")
"""Of series beyond the colours: dashes change with every round of colours, marks in each."""
_SIZE = (4.6, 2.7)
"""Inches. Twelve-point text at this width is readable on a phone, and two stand side by side."""
_INK, _LINE = "#000001", "#000002"
"""Stand for the page's own colours in what matplotlib writes."""


def lines(
    series: Mapping[str, Sequence[float | None]],
    *,
    x_label: str,
    low: float = 0.0,
    high: float = 1.0,
) -> Markup:
    """One line for each series over its index, with a legend; None leaves a gap.

    Args:
        series: values in [`low`, `high`] by name.
        x_label: what the index counts.
        low, high: range of the vertical axis.
    """
    points = {
        name: [
            None if value is None else (float(index + 1), value, value, value)
            for index, value in enumerate(values)
        ]
        for name, values in series.items()
    }
    return _figure(points, x_label=x_label, low=low, high=high) + legend(list(series), list(series))


def curves(
    series: Mapping[str, Sequence[Point]],
    *,
    x_label: str,
    low: float = 0.0,
    high: float = 1.0,
    keys: Mapping[str, str] | None = None,
    reference: float | None = None,
) -> Markup:
    """One line for each series, with the interval of every point; `legend` names them.

    Args:
        series: points by name; x in [0, 1], y in [`low`, `high`].
        x_label: what x is.
        low, high: range of the vertical axis.
        keys: what a page calls each series, for hiding it; default: its name.
        reference: a value of y to mark.
    """
    ordered = {name: sorted(points) for name, points in series.items()}
    return _figure(
        ordered, x_label=x_label, low=low, high=high, across=(0, 1), keys=keys, reference=reference
    )


def _figure(
    series: Mapping[str, Sequence[Point | None]],
    *,
    x_label: str,
    low: float,
    high: float,
    across: tuple[float, float] | None = None,
    keys: Mapping[str, str] | None = None,
    reference: float | None = None,
) -> Markup:
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    quiet = {"svg.fonttype": "none", "svg.hashsalt": x_label, "font.size": 9}
    with rc_context(quiet):
        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = figure.add_subplot()
        axes.set(xlabel=x_label, ylim=(low, high))
        if across:
            axes.set_xlim(-0.02, across[1] + 0.02)
        else:
            axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        axes.margins(x=0.03)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(_LINE)
        axes.grid(axis="y", color=_LINE, linewidth=0.8)
        axes.tick_params(colors=_INK, length=0, labelsize=9)
        axes.xaxis.label.set_color(_INK)
        if reference is not None:
            axes.axhline(reference, color=_INK, linewidth=0.8, linestyle=(0, (2, 2)))
        for number, points in enumerate(series.values()):
            known = [point for point in points if point is not None]
            ys = [float("nan") if point is None else point[1] for point in points]
            xs = [
                float(index + 1) if point is None else point[0]
                for index, point in enumerate(points)
            ]
            look = _look(number)
            axes.plot(
                xs,
                ys,
                linewidth=1.8,
                markersize=4.5,
                clip_on=False,
                gid=f"series-{number}",
                **look,
            )
            axes.vlines(
                [x for x, *_ in known],
                [bottom for *_, bottom, _ in known],
                [top for *_, top in known],
                color=look["color"],
                alpha=0.45,
                linewidth=1.2,
                gid=f"range-{number}",
            )
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True)
    names = list(series)
    called = [(keys or {}).get(name, name) for name in names]
    return _for_pages(buffer.getvalue(), x_label, called)


def _look(number: int) -> dict[str, Any]:
    colours = SERIES["light"]
    return {
        "color": colours[number % len(colours)],
        "linestyle": _DASHES[number // len(colours) % len(_DASHES)],
        "marker": _MARKS[number % len(_MARKS)],
    }


def legend(names: Sequence[str], keys: Iterable[str]) -> Markup:
    """Which line is which, as a list; `keys` is what the page calls each for hiding it."""
    items = [
        Markup(
            "<li data-series='{}'><svg viewBox='0 0 32 8' aria-hidden='true'>"
            "<line x2='32' y1='4' y2='4' style='{}'/></svg> {}</li>"
        ).format(key, _pen(number), name)
        for number, (name, key) in enumerate(zip(names, keys, strict=True))
    ]
    return Markup("<ul class='legend'>{}</ul>").format(Markup("").join(items))


def _pen(number: int) -> str:
    """How the line of a series is drawn in a legend."""
    round_ = number // len(SERIES["light"]) % len(_DASHES)
    dashes = ("none", "6 3", "2 3")[round_]
    colour = number % len(SERIES["light"])
    return f"stroke:var(--series-{colour});stroke-width:2.5;stroke-dasharray:{dashes}"


def _for_pages(svg: str, label: str, keys: Sequence[str]) -> Markup:
    """What matplotlib wrote, as an element of a page: its colours, its font, nothing to load."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.S)
    svg = re.sub(r"<svg [^>]*?viewBox=\"([^\"]*)\"[^>]*>", r'<svg viewBox="\1">', svg, count=1)
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg).replace("xlink:href", "href")
    for number, colour in enumerate(SERIES["light"]):
        svg = svg.replace(colour, f"var(--series-{number})")
    svg = svg.replace(_INK, "currentColor").replace(_LINE, "var(--line)")
    for number, key in enumerate(keys):
        for part in ("series", "range"):
            mark = Markup('data-series="{}"').format(key)
            svg = svg.replace(f'id="{part}-{number}"', str(mark))
    return Markup('<div class="plot" role="img" aria-label="{}">').format(label) + Markup(
        svg.strip() + "</div>"
    )
