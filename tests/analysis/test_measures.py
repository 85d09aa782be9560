"""Measures of attention: hand-made cases, and slow versions written from the definitions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from vla_pruner.analysis.measures import (
    distance,
    forecasts,
    jaccard,
    overlap,
    pool_ratio,
    top_sets,
)
from vla_pruner.pruning.history import HistorySpec

# Few levels, so that there are ties; none zero, so that sums are not.
SCORES = arrays(np.float32, (4, 6), elements=st.sampled_from([0.125, 0.25, 0.5, 1.0]))


def slow_top(row: np.ndarray, k: int) -> set[int]:
    return set(sorted(range(len(row)), key=lambda i: (-row[i], i))[:k])


@given(SCORES, st.integers(1, 6))
def test_top_sets_are_the_k_best_and_ties_go_to_the_lowest_index(scores, k) -> None:
    found = [set(np.flatnonzero(row)) for row in top_sets(scores, k)]
    assert found == [slow_top(row, k) for row in scores]


def test_top_sets_refuse_nan_and_accept_no_step() -> None:
    with pytest.raises(ValueError, match="NaN"):
        top_sets(np.array([[0.1, np.nan]]), 1)
    assert top_sets(np.zeros((0, 5)), 2).shape == (0, 5)


@given(SCORES, SCORES, st.integers(1, 6))
def test_measures_of_sets_equal_their_definitions(first, second, k) -> None:
    a, b = top_sets(first, k), top_sets(second, k)
    sets = [(slow_top(x, k), slow_top(y, k)) for x, y in zip(first, second, strict=True)]
    assert overlap(a, b).tolist() == [len(x & y) / k for x, y in sets]
    assert jaccard(a, b).tolist() == [len(x & y) / len(x | y) for x, y in sets]
    assert pool_ratio(first, second, k).tolist() == [len(x | y) / k for x, y in sets]


def test_a_hand_made_overlap() -> None:
    a = np.array([[1, 1, 0, 0], [1, 1, 0, 0]], dtype=bool)
    b = np.array([[0, 1, 1, 0], [1, 1, 0, 0]], dtype=bool)
    assert overlap(a, b).tolist() == [0.5, 1.0]
    assert jaccard(a, b).tolist() == [1 / 3, 1.0]


def test_sets_of_different_sizes_are_refused_or_compared_by_jaccard() -> None:
    a, b = np.array([[True, True, False]]), np.array([[True, False, False]])
    for pair in ((a, b), (a & False, a & False)):
        with pytest.raises(ValueError, match="equal size"):
            overlap(*pair)
    assert jaccard(a, b).tolist() == [0.5]
    assert jaccard(a & False, a & False).tolist() == [1.0]


@given(SCORES, st.integers(1, 5), st.sampled_from([0.5, 0.8, 1.0]))
def test_a_window_forecasts_from_the_steps_before_it(observed, window, gamma) -> None:
    found = forecasts(observed, HistorySpec(window=window, gamma=gamma))
    for step in range(len(observed)):
        past = [gamma**i * observed[step - i] for i in range(1, min(window, step) + 1)]
        np.testing.assert_allclose(found[step], sum(past, np.zeros(6)), rtol=1e-5)


@given(SCORES, st.sampled_from([0.3, 1.0]))
def test_a_moving_average_starts_with_the_first_observation(observed, alpha) -> None:
    found = forecasts(observed, HistorySpec(kind="ema", alpha=alpha))
    expected = observed[0]
    assert not found[0].any()
    for step in range(1, len(observed)):
        np.testing.assert_allclose(found[step], expected, rtol=1e-5)
        expected = (1 - alpha) * expected + alpha * observed[step]


def test_distance_ignores_scale_and_is_one_without_common_ground() -> None:
    p = np.array([[1.0, 1.0, 0.0], [2.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    q = np.array([[3.0, 3.0, 0.0], [0.0, 5.0, 5.0], [1.0, 0.0, 0.0], [1.0, 0.0, 1.0]])
    assert distance(p, q).tolist() == [0.0, 1.0, 1.0, 0.5]
