"""Line plots as SVG, without a plotting library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

COLOURS = ("#0f5fa8", "#d9730d", "#2f855a", "#8b3fa8", "#b83232", "#54616e")
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 640, 240, 40, 30, 14


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

    def place(index: int, value: float) -> str:
        x = LEFT + (WIDTH - LEFT - 10) * index / max(longest - 1, 1)
        y = TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low)
        return f"{x:.1f},{y:.1f}"

    parts = []
    for tick in range(5):
        value = low + (high - low) * tick / 4
        x, y = place(0, value).split(",")
        parts.append(f"<line x1='{x}' x2='{WIDTH - 10}' y1='{y}' y2='{y}' stroke='#8884'/>")
        parts.append(f"<text x='{LEFT - 6}' y='{float(y) + 4}' text-anchor='end'>{value:g}</text>")
    middle = (LEFT + WIDTH) // 2
    parts.append(
        f"<text x='{middle}' y='{HEIGHT - 8}' text-anchor='middle'>{escape(x_label)}</text>"
    )
    legend = []
    for number, (name, values) in enumerate(series.items()):
        colour = COLOURS[number % len(COLOURS)]
        path, pen = [], "M"
        for index, found in enumerate(values):
            if found is None:
                pen = "M"
                continue
            path.append(pen + place(index, found))
            pen = "L"
        parts.append(
            f"<path d='{' '.join(path)}' fill='none' stroke='{colour}' stroke-width='2' "
            "stroke-linecap='round'/>"
        )
        legend.append(f"<span><i style='background:{colour}'></i>{escape(name)}</span>")
    return (
        f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' role='img'>{''.join(parts)}</svg>"
        f"<p class='legend'>{''.join(legend)}</p>"
    )
