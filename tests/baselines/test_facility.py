"""Facility location: against the sum of coverages of every candidate set, in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from vla_pruner.baselines.facility import most_covering

SEEDS = st.integers(0, 10**6)


def tokens(batch: int, n: int, dim: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, n, dim, generator=generator, dtype=torch.float32)


def covered(cosine: Tensor, chosen: list[int]) -> float:
    """How similar the tokens are to their most similar chosen one, together; never below 0."""
    return sum(max([0.0, *(float(cosine[i, s]) for s in chosen)]) for i in range(len(cosine)))


def greedily(cosine: Tensor, weight: list[float], k: int) -> list[int]:
    chosen: list[int] = []
    for _ in range(k):
        now = covered(cosine, chosen)
        gains = {
            j: weight[j] * (covered(cosine, [*chosen, j]) - now)
            for j in range(len(cosine))
            if j not in chosen
        }
        best, *others = sorted(gains.values(), reverse=True)
        assume(not others or best - others[0] > 1e-5)  # A tie in fp32: the CPU decides.
        chosen.append(max(gains, key=lambda j: gains[j]))
    return chosen


def cosines(features: Tensor) -> Tensor:
    unit = torch.nn.functional.normalize(features.double(), dim=-1)
    return unit @ unit.T


@settings(max_examples=50, deadline=None)
@given(seed=SEEDS, n=st.integers(2, 9), data=st.data())
def test_each_step_covers_most(seed, n, data):
    k = data.draw(st.integers(1, n - 1))
    features = tokens(1, n, 6, seed)
    weight = 0.2 + torch.rand(1, n, generator=torch.Generator().manual_seed(seed))
    found = most_covering(features, k, weight=weight)[0].tolist()
    assert found == sorted(greedily(cosines(features[0]), weight[0].tolist(), k))


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, n=st.integers(3, 7), data=st.data())
def test_without_weights_it_comes_close_to_the_best_set(seed, n, data):
    """1 - 1/e of it, as for every greedy search of a submodular function."""
    k = data.draw(st.integers(1, n - 1))
    features = tokens(1, n, 3, seed)
    cosine = cosines(features[0])
    best = max(covered(cosine, list(s)) for s in itertools.combinations(range(n), k))
    found = covered(cosine, most_covering(features, k)[0].tolist())
    assert found >= (1 - 0.3679) * best - 1e-5


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, batch=st.integers(1, 3), n=st.integers(1, 30), data=st.data())
def test_k_different_tokens(seed, batch, n, data):
    k = data.draw(st.integers(1, n))
    features = tokens(batch, n, 16, seed)
    kept = most_covering(features, k)
    assert kept.shape == (batch, k) and kept.diff(dim=1).gt(0).all()
    assert kept.ge(0).all() and kept.lt(n).all()
    for row in range(batch):
        alone = most_covering(features[row : row + 1], k)[0].tolist()
        cosine = cosines(features[row])
        assert covered(cosine, alone) == pytest.approx(covered(cosine, kept[row].tolist()))


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, n=st.integers(3, 30))
def test_the_order_of_tokens_does_not_matter(seed, n):
    features = tokens(1, n, 16, seed)
    cosine = cosines(features[0])
    gains = sorted(covered(cosine, [j]) for j in range(n))
    assume(gains[-1] - gains[-2] > 1e-4)  # Equal gains go to the lower index.
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    first, moved = most_covering(features, 1), most_covering(features[:, order], 1)
    assert torch.equal(order[moved], first)


def test_one_of_each_kind_is_enough():
    kinds = torch.eye(3).repeat_interleave(torch.tensor([4, 2, 1]), dim=0)[None]
    assert most_covering(kinds, 3).tolist() == [[0, 4, 6]]
    # Nothing is gained any more: the largest weight is next.
    weight = torch.tensor([[1.0, 1, 1, 1, 1, 1.5, 1]])
    assert most_covering(kinds, 4, weight=weight).tolist() == [[0, 1, 5, 6]]


def test_missing_tokens_are_not_covered_and_come_last():
    features = tokens(2, 8, 4, 5)
    valid = torch.ones(2, 8, dtype=torch.bool)
    valid[1, 3:] = False
    kept = most_covering(features, 4, valid=valid)
    assert kept[1].tolist() == [0, 1, 2, 3]
    assert torch.equal(kept[0], most_covering(features[:1], 4)[0])
    alone = most_covering(features[1:, :3], 2)
    assert torch.equal(most_covering(features, 2, valid=valid)[1:], alone)


def test_it_compiles_and_refuses_what_is_broken():
    features, weight = (
        tokens(2, 20, 6, 0),
        torch.rand(2, 20, generator=torch.Generator().manual_seed(0)),
    )

    def search(one: Tensor, other: Tensor) -> Tensor:
        return most_covering(one, 5, weight=other)

    compiled = torch.compile(search, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(features, weight), search(features, weight))
    with pytest.raises(ValueError, match="NaN"):
        most_covering(features * float("nan"), 2)
    with pytest.raises(ValueError, match="NaN"):
        most_covering(features, 2, weight=weight * float("nan"))
    with pytest.raises(ValueError, match="k=21"):
        most_covering(features, 21)
