"""Colours of the pages: told apart by everyone, and seen on the paper behind them."""

import re

import pytest

from vla_pruner.pages.colours import PAPER, SERIES, VISION, closest, contrast
from vla_pruner.pages.engine import source

MODES = list(SERIES)


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("mode", MODES)
def test_any_two_lines_look_different_to_everyone(mode, vision):
    """2.3 is just noticeable side by side; lines lie apart, so ten times as much."""
    assert closest(SERIES[mode], vision) > 25


@pytest.mark.parametrize("mode", MODES)
def test_lines_stand_out_from_the_paper(mode):
    assert min(contrast(colour, PAPER[mode]) for colour in SERIES[mode]) >= 3


def test_red_and_green_look_alike_without_the_red_or_the_green_cones():
    """The simulation itself: a pair that is known to be confused, and one that is not."""
    confused, kept = ("#b83232", "#5f6b1f"), ("#0b6fb0", "#d9690d")
    normal = closest(confused, "three kinds of cones")
    for vision in ("protanopia", "deuteranopia"):
        assert closest(confused, vision) < 0.6 * normal
        assert closest(kept, vision) > 0.6 * closest(kept, "three kinds of cones")


def test_black_on_white_has_the_largest_contrast():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#777777") == pytest.approx(1)


def test_the_kept_tokens_of_a_film_are_blue_and_orange_for_everyone():
    style = source("style.css")
    tints = tuple(re.search(rf"--tint-{name}: (#\w+)", style)[1] for name in ("semantic", "action"))
    assert all(closest(tints, vision) > 40 for vision in ("protanopia", "deuteranopia"))


@pytest.mark.parametrize("mode", MODES)
def test_text_can_be_read(mode):
    ink, soft = (
        re.findall(rf"--{name}: (#\w+)", source("style.css"))[MODES.index(mode)]
        for name in ("ink", "soft")
    )
    assert contrast(ink, PAPER[mode]) > 7
    assert contrast(soft, PAPER[mode]) > 4.5
