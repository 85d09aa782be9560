"""Schedules of progressive methods spend exactly what they are given."""

from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from vla_pruner.methods.sparsevlm import _TABLE
from vla_pruner.pruning.budget import split_by_shares
from vla_pruner.pruning.schedule import scaled_cuts, stages_by_last, stages_by_total

CUTS, WEIGHTS = (3, 7, 16), (4, 9, 16)


@pytest.mark.parametrize(
    ("layers", "cuts"),
    [
        (32, (3, 7, 16)),
        (64, (6, 14, 32)),
        (28, (3, 6, 14)),
        (40, (4, 9, 20)),
        (24, (2, 5, 12)),
        (18, (2, 4, 9)),
        (8, (1, 2, 4)),
        (6, (1, 2, 3)),
        (4, (1, 2, 3)),
    ],
)
def test_cuts_keep_their_relative_depth(layers, cuts):
    assert scaled_cuts(CUTS, 32, layers) == cuts


@given(st.integers(4, 200))
def test_cuts_of_any_depth_ascend_and_are_near_their_place(layers):
    cuts = scaled_cuts(CUTS, 32, layers)
    assert 0 < cuts[0] < cuts[1] < cuts[2] < layers
    if layers >= 8:
        for cut, source in zip(cuts, CUTS, strict=True):
            assert abs(cut - source * layers / 32) <= 0.5


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_shallow_decoder_is_refused(layers):
    with pytest.raises(ValueError, match=f"of {layers} layers is too shallow for 3 cuts"):
        scaled_cuts(CUTS, 32, layers)


@pytest.mark.parametrize(
    "published", [(300, 200, 110), (303, 110, 36), (238, 48, 26), (66, 30, 17), (576, 576, 576)]
)
def test_the_published_schedules_come_back(published):
    total = sum(w * n for w, n in zip(WEIGHTS, published, strict=True))
    assert stages_by_total(_TABLE, WEIGHTS, 576, Fraction(total)) == published
    assert stages_by_last(_TABLE, 576, published[-1]) == published


@settings(max_examples=50)
@given(
    weights=st.tuples(*[st.integers(1, 20)] * 3),
    visual=st.integers(1, 700),
    share=st.fractions(0, 1, max_denominator=1000),
)
def test_the_total_is_spent_and_never_overspent(weights, visual, share):
    total = share * visual * sum(weights)
    assume(total >= sum(weights))
    counts = stages_by_total(_TABLE, weights, visual, total)
    assert visual >= counts[0] >= counts[1] >= counts[2] >= 1
    rest = total - sum(w * n for w, n in zip(weights, counts, strict=True))
    assert rest >= 0
    for weight, (before, count) in zip(weights, pairwise((visual, *counts)), strict=True):
        assert count == before or rest < weight


@settings(max_examples=50)
@given(visual=st.integers(1, 700), share=st.fractions(0, 1, max_denominator=1000))
def test_stages_lie_between_the_tables_rows(visual, share):
    total = share * visual * sum(WEIGHTS)
    assume(total >= sum(WEIGHTS))
    counts = stages_by_total(_TABLE, WEIGHTS, visual, total)
    costs = [sum(w * s for w, s in zip(WEIGHTS, row, strict=True)) * visual for row in _TABLE]
    at = max(i for i, cost in enumerate(costs[:-1]) if cost <= total)
    for low, high, count in zip(_TABLE[at], _TABLE[at + 1], counts, strict=True):
        ends = sorted((float(low * visual), float(high * visual)))
        # Rounding down takes less than one token of each stage, which the others get.
        assert ends[0] - 1 <= count <= max(ends[1], 1) + sum(WEIGHTS) / min(WEIGHTS)


@given(visual=st.integers(1, 700), data=st.data())
def test_the_last_stage_is_met_exactly(visual, data):
    last = data.draw(st.integers(1, visual))
    counts = stages_by_last(_TABLE, visual, last)
    assert visual >= counts[0] >= counts[1] >= counts[2] == last
    assert stages_by_last(_TABLE, visual, visual) == (visual,) * 3


def test_impossible_totals_are_refused():
    with pytest.raises(ValueError, match="not even one visual token per stage"):
        stages_by_total(_TABLE, WEIGHTS, 100, Fraction(28))
    assert stages_by_total(_TABLE, WEIGHTS, 100, Fraction(29)) == (1, 1, 1)
    for last in (0, 101):
        with pytest.raises(ValueError, match=f"`last={last}` must lie in"):
            stages_by_last(_TABLE, 100, last)


@pytest.mark.parametrize(
    ("total", "shares", "sizes", "expected"),
    [
        (100, (0.4, 0.6), (256, 256), (40, 60)),
        (5, (0.5, 0.5), (9, 9), (3, 2)),
        (7, (0.4, 0.6), (9, 9), (3, 4)),
        (17, (0.4, 0.6), (9, 9), (8, 9)),
        (18, (0.4, 0.6), (9, 9), (9, 9)),
        (10, (0.1, 0.2, 0.7), (9, 9, 3), (3, 4, 3)),
        (1, (0.4, 0.6), (9, 9), (0, 1)),
    ],
)
def test_split_by_shares(total, shares, sizes, expected):
    assert split_by_shares(total, shares, sizes) == expected


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    data=st.data(),
)
def test_shares_sum_to_the_total_within_each_size(sizes, data):
    raw = [data.draw(st.integers(1, 9)) for _ in sizes]
    shares = [r / sum(raw) for r in raw]
    total = data.draw(st.integers(0, sum(sizes)))
    counts = split_by_shares(total, shares, sizes)
    assert sum(counts) == total
    for count, share, size in zip(counts, shares, sizes, strict=True):
        assert 0 <= count <= size
        assert count == size or count >= int(total * share + 1e-6)
    with pytest.raises(ValueError, match="cannot keep"):
        split_by_shares(sum(sizes) + 1, shares, sizes)
