"""Plots: SVG elements that load nothing and take their colours from the page."""

import re

from vla_pruner.pages.plots import curves, legend, lines

POINTS = {"m": [(0.0, 0.0, 0.0, 0.5), (1.0, 1.0, 0.5, 1.0)]}


def path_of(svg: str, series: str) -> list[tuple[float, float]]:
    """The points of a line."""
    line = svg.split(f'data-series="{series}"')[1]
    numbers = re.search(r'd="([^"]*)"', line)[1]
    return [tuple(map(float, pair)) for pair in re.findall(r"([\d.]+) ([\d.]+)", numbers)]


def test_a_curve_is_higher_where_the_value_is():
    (left, low), (right, high) = path_of(curves(POINTS, x_label="x"), "m")
    assert left < right
    assert high < low


def test_an_unknown_value_leaves_a_gap():
    whole, broken = (lines({"m": [0.1, value, 0.3, 0.4]}, x_label="call") for value in (0.2, None))
    assert len(path_of(whole, "m")) == 4
    drawn = re.search(r'd="([^"]*)"', broken.split('data-series="m"')[1])[1]
    assert drawn.count("M") == 2


def test_nothing_is_loaded_and_no_style_leaks_into_the_page():
    svg = curves(POINTS, x_label="prefill FLOPs")
    assert "http" not in svg
    assert "<style" not in svg and "<metadata" not in svg and "<?xml" not in svg
    assert "font-family" not in svg
    assert "var(--series-0)" in svg and "currentColor" in svg
    assert re.match(r'<div class="plot" role="img" aria-label="prefill FLOPs"><svg viewBox=', svg)


def test_names_are_text_wherever_they_come_from():
    name = "<script>alert(1)</script>"
    drawn = curves({name: POINTS["m"]}, x_label="<b>", keys={name: '"><script>'})
    drawn += legend([name], ['"><script>'])
    assert "<script" not in drawn and "<b>" not in drawn
    assert "&lt;script&gt;alert(1)" in drawn
    assert 'data-series="&#34;&gt;&lt;script&gt;"' in drawn


def test_more_lines_than_colours_have_other_dashes():
    pens = re.findall(r"style='([^']*)'", legend([str(n) for n in range(18)], "x" * 18))
    assert len(set(pens)) == 18


def test_the_same_plot_is_written_the_same():
    assert curves(POINTS, x_label="x") == curves(POINTS, x_label="x")
