"""Line plots as SVG, without a plotting library."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape

COLOURS = ("#0f5fa8", "#d9730d", "#2f855a", "#8b3fa8", "#b83232", "#54616e")
DASHES = ("", "6 3", "2 3")
"""With more series than colours, the second round is dashed, the third one dotted."""
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 640, 240, 40, 30, 14

Point = tuple[float, float, float, float]
"""x, y, and the lower and upper end of y's interval."""


def lines(
    series: Mapping[str, Sequence[float | None]],
    *,
    x_label: str,
    low: float = 0.0,
    high: float = 1.0,
) -> str:
    """One line for each series over its index; None leaves a gap.

    Args:
        series: values in [`low`, `high`] by name.
        x_label: what the index counts.
        low, high: range of the vertical axis.
    """
    longest = max((len(values) for values in series.values()), default=0)
    parts = _axes(x_label, low, high)
    for number, values in enumerate(series.values()):
        path, pen = [], "M"
        for index, found in enumerate(values):
            if found is None:
                pen = "M"
                continue
            x, y = _place(index / max(longest - 1, 1), (found - low) / (high - low))
            path.append(f"{pen}{x:.1f},{y:.1f}")
            pen = "L"
        parts.append(_path(path, number))
    return _figure(parts, series)


def curves(
    series: Mapping[str, Sequence[Point]],
    *,
    x_label: str,
    low: float = 0.0,
    high: float = 1.0,
) -> str:
    """One line for each series, with the interval of every point.

    Args:
        series: points by name; x in [0, 1], y in [`low`, `high`].
        x_label: what x is.
        low, high: range of the vertical axis.
    """
    parts = _axes(x_label, low, high)
    for tick in range(5):
        x, _ = _place(tick / 4, 0)
        parts.append(
            f"<text x='{x:.1f}' y='{HEIGHT - 18}' text-anchor='middle'>{tick / 4:g}</text>"
        )
    for number, points in enumerate(series.values()):
        colour = COLOURS[number % len(COLOURS)]
        path: list[str] = []
        for at, value, lowest, highest in sorted(points):
            x, y = _place(at, (value - low) / (high - low))
            ends = [_place(at, (end - low) / (high - low))[1] for end in (lowest, highest)]
            path.append(f"{'L' if path else 'M'}{x:.1f},{y:.1f}")
            parts.append(
                f"<line x1='{x:.1f}' x2='{x:.1f}' y1='{ends[0]:.1f}' y2='{ends[1]:.1f}' "
                f"stroke='{colour}' stroke-opacity='.4'/>"
                f"<circle cx='{x:.1f}' cy='{y:.1f}' r='3' fill='{colour}'/>"
            )
        parts.append(_path(path, number))
    return _figure(parts, series)


def _place(across: float, up: float) -> tuple[float, float]:
    """Pixels of a point whose coordinates are shares of the plot's width and height."""
    return LEFT + (WIDTH - LEFT - 10) * across, TOP + (HEIGHT - TOP - BOTTOM) * (1 - up)


def _axes(x_label: str, low: float, high: float) -> list[str]:
    parts = []
    for tick in range(5):
        x, y = _place(0, tick / 4)
        parts.append(
            f"<line x1='{x:.1f}' x2='{WIDTH - 10}' y1='{y:.1f}' y2='{y:.1f}' stroke='#8884'/>"
            f"<text x='{LEFT - 6}' y='{y + 4:.1f}' text-anchor='end'>"
            f"{low + (high - low) * tick / 4:.3g}</text>"
        )
    middle = (LEFT + WIDTH) // 2
    parts.append(
        f"<text x='{middle}' y='{HEIGHT - 4}' text-anchor='middle'>{escape(x_label)}</text>"
    )
    return parts


def _path(path: Sequence[str], number: int) -> str:
    return f"<path d='{' '.join(path)}' fill='none' {_pen(number)} stroke-linecap='round'/>"


def _pen(number: int) -> str:
    """How the line of a series is drawn."""
    colour = COLOURS[number % len(COLOURS)]
    dashes = DASHES[number // len(COLOURS) % len(DASHES)]
    return f"stroke='{colour}' stroke-width='2' stroke-dasharray='{dashes}'"


def _figure(parts: Sequence[str], names: Iterable[str]) -> str:
    legend = [
        f"<span><svg style='width:2rem;height:.6rem' viewBox='0 0 32 8'>"
        f"<line x2='32' y1='4' y2='4' {_pen(number)}/></svg> {escape(name)}</span>"
        for number, name in enumerate(names)
    ]
    return (
        f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' role='img'>{''.join(parts)}</svg>"
        f"<p class='legend'>{''.join(legend)}</p>"
    )
