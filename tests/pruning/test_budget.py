"""Budgets: fractions and counts, over all views or in each."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vla_pruner.pruning.budget import Budget


@given(
    keep=st.floats(0.0, 1.0, exclude_min=True),
    views=st.lists(st.integers(1, 400), min_size=1, max_size=4).map(tuple),
)
def test_a_fraction_is_rounded_and_never_empty(keep, views):
    assert Budget(keep).resolve(views) == (max(1, round(keep * sum(views))),)
    each = Budget(keep, "view").resolve(views)
    assert each == tuple(max(1, round(keep * size)) for size in views)
    assert all(1 <= k <= size for k, size in zip(each, views, strict=True))


def test_halves_round_to_even_as_python_does():
    assert Budget(0.5).resolve((5,)) == (2,)
    assert Budget(0.5).resolve((7,)) == (4,)
    assert Budget(0.125).resolve((100,)) == (12,)


def test_a_count_is_taken_as_it_is():
    assert Budget(96).resolve((256, 256)) == (96,)
    assert Budget(96, "view").resolve((256, 256)) == (96, 96)
    assert Budget(1).resolve((256,)) == (1,)
    assert Budget(1.0).resolve((256,)) == (256,)


def test_too_much_is_refused_with_the_view_that_lacks_it():
    with pytest.raises(
        ValueError, match=r"keeping 300 tokens asks for more than the 256 visual tokens"
    ):
        Budget(300).resolve((256,))
    with pytest.raises(ValueError, match=r"the 64 visual tokens of view 1; .* at most 64"):
        Budget(100, "view").resolve((256, 64))


@pytest.mark.parametrize("keep", [0, -1, 0.0, 1.5, -0.5, float("nan"), True, "0.5", None])
def test_a_keep_that_means_nothing_is_refused(keep):
    with pytest.raises(ValueError, match="keep="):
        Budget(keep)


def test_bad_scopes_and_views_are_refused():
    with pytest.raises(ValueError, match="budget='camera'"):
        Budget(0.5, "camera")
    for views in ((), (0,), (256, 0)):
        with pytest.raises(ValueError, match="visual token"):
            Budget(0.5).resolve(views)
