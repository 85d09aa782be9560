"""The greedy determinant: against determinants of every candidate set, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vla_pruner.baselines import determinant
from vla_pruner.baselines.determinant import most_determinant, stretched, text_likeness
from vla_pruner.kernels import determinant as in_c
from vla_pruner.kernels import native

SEEDS = st.integers(0, 10**6)


def tokens(batch: int, n: int, dim: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, n, dim, generator=generator, dtype=torch.float32)


def kernel(features: Tensor, quality: Tensor | None) -> Tensor:
    """L of one row, as the paper writes it: diag(q) cos diag(q)."""
    unit = torch.nn.functional.normalize(features.double(), dim=-1)
    q = torch.ones(len(features)) if quality is None else quality
    return torch.diag(q.double()) @ (unit @ unit.T) @ torch.diag(q.double())


def greedily(whole: Tensor, k: int) -> list[int]:
    """Every determinant of every extension, k times."""
    chosen: list[int] = []
    for _ in range(k):
        best, pick = -1.0, -1
        for j in range(len(whole)):
            if j not in chosen:
                at = [*chosen, j]
                value = float(torch.linalg.det(whole[at][:, at]))
                if value > best * (1 + 1e-9):  # All tokens alone are as good.
                    best, pick = value, j
        chosen.append(pick)
    return chosen


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS, n=st.integers(2, 8), data=st.data(), weighed=st.booleans())
def test_each_step_maximises_the_determinant(seed, n, data, weighed):
    k = data.draw(st.integers(1, n))
    features = tokens(1, n, 12, seed)
    quality = 0.1 + tokens(1, n, 1, seed + 1)[..., 0].abs() if weighed else None
    found = most_determinant(features, k, quality=quality)[0].tolist()
    whole = kernel(features[0], None if quality is None else quality[0])
    assert found == sorted(greedily(whole, k))


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS, batch=st.integers(1, 3), n=st.integers(1, 40), data=st.data())
def test_k_different_tokens_the_same_every_time(seed, batch, n, data):
    """Of any rank: where the determinant can only be 0, something is taken all the same."""
    k, dim = data.draw(st.integers(1, n)), data.draw(st.integers(1, 6))
    features = tokens(batch, n, dim, seed)
    kept = most_determinant(features, k)
    assert kept.shape == (batch, k) and kept.dtype == torch.int64
    assert kept.diff(dim=1).gt(0).all() and kept.ge(0).all() and kept.lt(n).all()
    assert torch.equal(most_determinant(features.clone(), k), kept)
    for row in range(batch):
        assert torch.equal(most_determinant(features[row : row + 1], k)[0], kept[row])


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS, n=st.integers(2, 16), data=st.data())
def test_the_order_of_tokens_says_nothing(seed, n, data):
    k = data.draw(st.integers(1, n))
    features, order = tokens(1, n, 24, seed), torch.randperm(n)
    quality = 0.5 + tokens(1, n, 1, seed + 1)[..., 0].abs()
    kept = most_determinant(features, k, quality=quality)[0]
    moved = most_determinant(features[:, order], k, quality=quality[:, order])[0]
    assert order[moved].sort().values.tolist() == kept.tolist()


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS, n=st.integers(2, 30), dim=st.integers(2, 40), data=st.data())
def test_the_loop_in_numpy_is_the_loop_on_a_device(seed, n, dim, data):
    """Up to the rank of the features; behind it both order by quality alone."""
    k = data.draw(st.integers(1, n))
    unit = torch.nn.functional.normalize(tokens(1, n, dim, seed), dim=-1)
    cosine = unit @ unit.transpose(1, 2)
    quality = torch.rand(1, n, generator=torch.Generator().manual_seed(seed))
    last = quality - 2.0
    one = determinant._search_in_numpy(cosine[0], quality[0], last[0], k)
    other = determinant._search_on_device(cosine, quality, last, k)[0]
    assert one[: min(k, dim - 1)].tolist() == other[: min(k, dim - 1)].tolist()
    assert len(set(one.tolist())) == len(set(other.tolist())) == k


needs_c = pytest.mark.skipif(native.reading() is None, reason="no C compiler here")


@needs_c
@settings(max_examples=60, deadline=None)
@given(seed=SEEDS, n=st.integers(1, 40), dim=st.integers(2, 48), data=st.data())
def test_the_loop_in_c_is_the_loop_in_numpy(seed, n, dim, data):
    """Up to the rank of the features; behind it both order by quality alone."""
    k = data.draw(st.integers(1, n))
    unit = torch.nn.functional.normalize(tokens(1, n, dim, seed)[0], dim=-1)
    cosine, quality = unit @ unit.T, 0.5 + 0.5 * tokens(1, n, 1, seed + 1)[0, :, 0].tanh()
    before = native.calls()
    one = in_c.determinant_search(cosine, quality, quality - 2.0, k, determinant.NOTHING_NEW)
    assert native.calls() == before + 1
    other = determinant._search_in_numpy(cosine, quality, quality - 2.0, k)
    assert one[: min(k, dim - 1)].tolist() == other[: min(k, dim - 1)].tolist()
    assert len(set(one.tolist())) == k


@needs_c
def test_in_c_twins_and_tokens_without_quality_come_last_as_in_numpy():
    cosine = torch.eye(4).repeat(2, 2)
    quality = torch.tensor([0.2, 0.9, 0.0, 1.0, 0.3, 0.8, 0.0, 0.7])
    for k in range(1, 9):
        one = in_c.determinant_search(cosine, quality, quality - 2.0, k, 1e-5)
        assert (
            one.tolist() == determinant._search_in_numpy(cosine, quality, quality - 2.0, k).tolist()
        )
    assert one.tolist() == [3, 1, 4, 5, 7, 0, 2, 6]


@needs_c
def test_what_c_would_read_beyond_is_refused():
    quality = torch.rand(4)
    for cosine, k in ((torch.eye(3), 2), (torch.eye(4), 5), (torch.eye(4), 0)):
        with pytest.raises(ValueError, match="`cosine` must be"):
            in_c.determinant_search(cosine, quality, quality - 2, k, 1e-5)


def test_without_a_compiler_the_same_is_found():
    features, quality = tokens(2, 30, 64, 5), 0.5 + torch.rand(2, 30)
    found = most_determinant(features, 9, quality=quality)
    with native.by_operators():
        assert in_c.determinant_search(torch.eye(2), torch.ones(2), -torch.ones(2), 1, 0) is None
        assert torch.equal(most_determinant(features, 9, quality=quality), found)


def test_a_twin_adds_nothing_and_comes_last():
    features = torch.eye(4)[None].repeat(1, 2, 1)  # Tokens 4..7 repeat 0..3.
    assert most_determinant(features, 4).tolist() == [[0, 1, 2, 3]]
    best = torch.tensor([[1.0, 1, 1, 1, 3, 3, 1, 1]])
    assert most_determinant(features, 5, quality=best).tolist() == [[0, 2, 3, 4, 5]]


def test_tokens_without_quality_come_last():
    quality = torch.tensor([[0.0, 1, 0, 2, 0]])
    assert most_determinant(torch.eye(5)[None], 3, quality=quality).tolist() == [[0, 1, 3]]


def test_tokens_of_a_missing_camera_fill_up():
    features, valid = tokens(2, 6, 8, 0), torch.ones(2, 6, dtype=torch.bool)
    valid[1, 2:] = False
    features[1, 2:] = float("nan")
    kept = most_determinant(features, 3, valid=valid)
    assert kept[1].tolist() == [0, 1, 2]
    assert torch.equal(kept[:1], most_determinant(features[:1], 3))


def test_it_compiles_into_one_graph_and_ignores_autocast():
    features, quality = tokens(2, 20, 16, 3), torch.rand(2, 20)

    def search(one: Tensor, other: Tensor) -> Tensor:
        return most_determinant(one, 7, quality=other)

    kept = search(features, quality)
    compiled = torch.compile(search, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(features, quality), kept)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(search(features, quality), kept)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 7}, "k=7"),
        ({"quality": torch.ones(1, 5)}, r"quality must be \(1, 6\)"),
        ({"quality": torch.full((1, 6), float("nan"))}, "NaN"),
        ({"quality": torch.tensor([[1.0, -1, 1, 1, 1, 1]])}, "must not be negative"),
        ({"features": torch.full((1, 6, 4), float("nan"))}, "NaN or infinite"),
        ({"features": torch.ones(6, 4)}, r"must be \[B, n, D\]"),
    ],
)
def test_what_makes_no_sense_is_refused(changes, message):
    given_ = {"features": torch.eye(6)[None], "k": 3, **changes}
    with pytest.raises(ValueError, match=message):
        most_determinant(given_.pop("features"), given_.pop("k"), **given_)


def test_likeness_to_words_is_a_cosine_over_real_words():
    features, text = tokens(2, 5, 8, 1), tokens(2, 3, 8, 2)
    there = torch.tensor([[True, True, False], [False, False, False]])
    for pool in ("mean", "max"):
        found = text_likeness(features, text, there, pool=pool)
        for i in range(5):
            cosines = [torch.cosine_similarity(features[0, i], text[0, j], dim=0) for j in (0, 1)]
            expected = max(cosines) if pool == "max" else sum(cosines) / 2
            assert float(found[0, i]) == pytest.approx(float(expected), abs=1e-6)
        assert found[1].tolist() == [0.0] * 5


def test_stretching_reaches_from_0_to_1_among_the_valid():
    score = torch.tensor([[2.0, 4, 3, 99], [1, 1, 1, 5]])
    valid = torch.tensor([[True, True, True, False]] * 2)
    assert stretched(score, valid).tolist() == [[0, 1, 0.5, 0], [1, 1, 1, 0]]
    least = stretched(score, valid, least=1e-6)
    assert 0 < float(least[0, 0]) < 1e-6
