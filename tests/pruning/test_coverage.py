"""The budget rule of PACT, against a version written from the formula."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_pruner.pruning.coverage import conflict, covering_level, shares


def draw(seed, n):
    generator = torch.Generator().manual_seed(seed)
    return [shares(torch.rand(2, n, generator=generator) ** 3) for _ in range(2)]


def divergence(p, q):
    return sum(x * math.log(x / y) for x, y in zip(p, q, strict=True) if x > 0)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 40), seed=st.integers(0, 99))
def test_conflict_is_the_jensen_shannon_divergence(n, seed):
    p, a = draw(seed, n)
    found = conflict(p, a)
    for row in range(2):
        x, y = p[row].tolist(), a[row].tolist()
        middle = [(i + j) / 2 for i, j in zip(x, y, strict=True)]
        expected = (divergence(x, middle) + divergence(y, middle)) / 2 / math.log(2)
        assert float(found[row]) == pytest.approx(expected, abs=1e-6)


def test_conflict_of_extremes():
    one, other = torch.tensor([[0.5, 0.5, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, 0.5, 0.5]])
    assert float(conflict(one, other)) == pytest.approx(1.0)
    assert float(conflict(one, one)) == 0.0


def slow_level(p, a, counts, theta):
    """The union of both top B, then its B largest by max(p, a), as the source says it."""
    n = len(p)

    def best(score, tokens, count):
        return sorted(tokens, key=lambda i: (-score[i], i))[:count]

    both = [max(x, y) for x, y in zip(p, a, strict=True)]
    for level, count in enumerate(counts):
        union = {*best(p, range(n), count), *best(a, range(n), count)}
        kept = best(both, union, count)
        if min(sum(p[i] for i in kept), sum(a[i] for i in kept)) >= theta:
            return level
    return len(counts) - 1


@settings(max_examples=80, deadline=None)
@given(n=st.integers(1, 40), theta=st.floats(0.05, 0.95), seed=st.integers(0, 99))
def test_the_first_level_that_covers(n, theta, seed):
    p, a = draw(seed, n)
    counts = sorted({math.ceil(level * n) for level in (0.125, 0.25, 0.5, 0.75, 1.0)})
    found = covering_level(p, a, counts, torch.tensor([theta, theta / 2]))
    for row, need in enumerate((theta, theta / 2)):
        assert int(found[row]) == slow_level(p[row].tolist(), a[row].tolist(), counts, need)


def test_the_last_level_where_none_covers():
    p = shares(torch.ones(1, 8))
    assert covering_level(p, p, [1, 2], torch.tensor([0.9])).tolist() == [1]
    assert covering_level(p, p, [1, 2, 8], torch.tensor([2.0])).tolist() == [2]


def test_shares_sum_to_one_over_valid_tokens():
    score, valid = torch.tensor([[1.0, 2.0, 5.0]]), torch.tensor([[True, True, False]])
    assert shares(score, valid).tolist() == [[pytest.approx(1 / 3), pytest.approx(2 / 3), 0.0]]
    assert shares(torch.zeros(1, 3)).tolist() == [[0.0, 0.0, 0.0]]
    with pytest.raises(ValueError, match="NaN"):
        shares(torch.tensor([[1.0, float("nan")]]))
