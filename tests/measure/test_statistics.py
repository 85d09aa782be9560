"""Published and hand-computed values of every interval and test."""

import math

import numpy as np
import pytest

from vla_pruner.measure.statistics import (
    PairedSuccess,
    difference_of_differences,
    holm,
    median,
    paired_success,
    quantile,
    ratio_of_means,
    speedup_of,
    wilson,
)


def test_wilson_gives_the_published_example():
    """81 of 263: Newcombe, Statistics in Medicine 1998, table I, method 3."""
    interval = wilson(81, 263)
    assert (round(interval.low, 4), round(interval.high, 4)) == (0.2553, 0.3662)


@pytest.mark.parametrize(("successes", "low", "high"), [(0, 0.0, 0.2775), (10, 0.7225, 1.0)])
def test_wilson_stays_within_zero_and_one(successes, low, high):
    interval = wilson(successes, 10)
    assert (round(interval.low, 4), round(interval.high, 4)) == (low, high)


def test_wilson_ends_are_where_the_score_test_turns():
    """At either end, (p - rate) / sqrt(p (1 - p) / n) is the normal quantile."""
    for p in (wilson(7, 20).low, wilson(7, 20).high):
        assert abs(p - 7 / 20) / math.sqrt(p * (1 - p) / 20) == pytest.approx(1.959964, abs=1e-5)


@pytest.mark.parametrize(("successes", "episodes"), [(1, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_impossible_counts(successes, episodes):
    with pytest.raises(ValueError, match="successes"):
        wilson(successes, episodes)


def test_confidence_is_a_probability():
    with pytest.raises(ValueError, match=r"0\.95"):
        wilson(1, 2, confidence=95)


@pytest.mark.parametrize(
    ("gained", "lost", "p"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),  # 2 * 1/2
        (0, 5, 0.0625),  # 2 / 32
        (1, 7, 18 / 256),  # 2 * (1 + 8) / 256
        (3, 3, 1.0),
    ],
)
def test_mcnemar_is_twice_the_binomial_tail(gained, lost, p):
    assert PairedSuccess(gained, lost, pairs=21).p_value() == pytest.approx(p)
    assert PairedSuccess(lost, gained, pairs=21).p_value() == pytest.approx(p)


def test_paired_difference_gives_the_published_example():
    """1 and 7 of 21 differ: Fagerland et al., Statistics in Medicine 2014, Tango's interval."""
    pairs = PairedSuccess(gained=1, lost=7, pairs=21)
    interval = pairs.interval()
    assert round(pairs.difference, 3) == -0.286
    assert (round(interval.low, 3), round(interval.high, 3)) == (-0.517, -0.026)


def test_paired_difference_is_antisymmetric_and_inside_minus_one_to_one():
    for gained, lost in [(0, 0), (3, 1), (10, 0), (0, 2)]:
        there = PairedSuccess(gained, lost, 10).interval()
        back = PairedSuccess(lost, gained, 10).interval()
        assert there.low == pytest.approx(-back.high, abs=1e-9)
        assert -1 <= there.low <= (gained - lost) / 10 <= there.high <= 1


def test_paired_interval_touches_zero_where_the_score_test_does():
    """Without a difference under the null, z^2 is McNemar's (b - c)^2 / (b + c)."""
    z = (9 - 2) / math.sqrt(9 + 2)
    confidence = math.erf(z / math.sqrt(2))
    assert PairedSuccess(9, 2, 40).interval(confidence).low == pytest.approx(0.0, abs=1e-6)


def test_paired_interval_covers_the_truth():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        baseline = rng.random(40) < 0.9
        treatment = np.where(rng.random(40) < 0.8, baseline, rng.random(40) < 0.6)
        interval = paired_success(baseline.tolist(), treatment.tolist()).interval()
        covered += interval.low <= 0.2 * (0.6 - 0.9) <= interval.high
    assert 0.92 <= covered / 400 <= 0.985


def test_paired_success_counts_what_differs():
    pairs = paired_success([True, True, False, False], [True, False, True, True])
    assert pairs == PairedSuccess(gained=2, lost=1, pairs=4)
    with pytest.raises(ValueError, match="zip"):
        paired_success([True], [True, False])
    with pytest.raises(ValueError, match="do not fit"):
        paired_success([], [])


def test_quantiles_interpolate_as_numpy_does():
    assert median([4.0, 1.0, 3.0]) == 3.0
    assert median([1.0, 2.0]) == 1.5
    assert quantile(range(1, 22), 0.95) == 20.0
    assert math.isnan(median([]))


def test_speedup_of_a_constant_factor_is_certain():
    baseline = [[10.0, 12.0], [11.0], [13.0, 9.0, 10.0]]
    halved = [[x / 2 for x in calls] for calls in baseline]
    speedup, interval = speedup_of(baseline, halved)
    assert speedup == pytest.approx(2.0)
    assert interval.low == pytest.approx(2.0) == interval.high


def test_speedup_of_equals_medians_of_the_calls_of_drawn_episodes():
    rng = np.random.default_rng(5)
    baseline = [rng.integers(90, 110, size=size) / 7 for size in (4, 9, 1, 6, 3)]
    treatment = [rng.integers(40, 60, size=size) / 7 for size in (3, 8, 2, 6, 4)]

    def ratio(episodes):
        before = np.median(np.concatenate([baseline[i] for i in episodes]))
        return before / np.median(np.concatenate([treatment[i] for i in episodes]))

    draws = np.random.default_rng(0)
    ratios = [ratio(draws.integers(5, size=5)) for _ in range(1000)]
    speedup, interval = speedup_of(baseline, treatment)
    assert speedup == ratio(range(5))
    assert (interval.low, interval.high) == (quantile(ratios, 0.025), quantile(ratios, 0.975))


def test_speedup_of_is_repeatable_and_widens_with_disagreement():
    baseline = [[10.0], [10.0], [10.0], [10.0]]
    treatment = [[5.0], [10.0], [5.0], [8.0]]
    speedup, interval = speedup_of(baseline, treatment)
    assert (speedup, interval) == speedup_of(baseline, treatment)
    assert speedup == pytest.approx(10 / 6.5)
    assert 1.0 <= interval.low < interval.high == 2.0
    with pytest.raises(ValueError, match="same episodes"):
        speedup_of(baseline, treatment[:2])


def test_a_single_episode_has_a_speedup_and_no_interval():
    assert speedup_of([[10.0, 10.0]], [[5.0, 5.0]]) == (2.0, None)


def test_holm_steps_down_and_never_below_a_smaller_one():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_ratio_of_means_is_that_of_what_is_printed():
    ratio, interval = ratio_of_means([1, 2, 3, 4], [2, 4, 6, 8])
    assert (ratio, interval.low, interval.high) == (2.0, 2.0, 2.0)
    ratio, interval = ratio_of_means([1, 2, 3, 4], [2, 2, 3, 5])
    assert ratio == pytest.approx(1.2) and interval.low < 1.2 < interval.high
    assert ratio_of_means([2.0], [3.0]) == (1.5, None)
    ratio, interval = ratio_of_means([0, 0], [1, 1])
    assert math.isnan(ratio) and interval is None
    with pytest.raises(ValueError, match="need pairs"):
        ratio_of_means([1, 2], [1])


def test_the_difference_of_differences_is_as_uncertain_as_both():
    first, second = PairedSuccess(0, 0, 40), PairedSuccess(0, 12, 40)
    middle, interval = difference_of_differences(first, second)
    assert middle == pytest.approx(-0.3)
    assert interval.low < second.interval().low and second.interval().high < interval.high < 0
    nothing, wide = difference_of_differences(first, first)
    assert nothing == 0 and wide.low == -wide.high < 0


def test_what_is_no_p_value_is_refused() -> None:
    for odd in (float("nan"), -0.1, 1.5):
        with pytest.raises(ValueError, match="between 0 and 1"):
            holm([0.5, odd])


def test_a_ratio_whose_base_may_vanish_has_no_interval() -> None:
    ratio, interval = ratio_of_means([0.0, 0.0, 1.0], [1.0, 1.0, 1.0])
    assert ratio == 3.0 and interval is None  # Draws of the first two have no ratio.
