"""Scores and selection in C say what PyTorch's operators say, on whatever lies in memory how."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vla_pruner.kernels import native
from vla_pruner.kernels.native import Attention
from vla_pruner.pruning.scores import _by_operators, attention_column_mean
from vla_pruner.pruning.selection import combine_then_filter, max_min_filter, top_k

pytestmark = pytest.mark.skipif(
    native.state().startswith("not compiled"), reason=f"C is {native.state()}"
)
CLOSE = {"rtol": 2e-5, "atol": 1e-7}
LOWEST = torch.finfo(torch.float32).min


def operators(query: Tensor, key: Tensor, columns: Tensor, rows: object, **given: object) -> Tensor:
    """The reference in fp32, so that bf16 products are not rounded."""
    options = {"mask": None, "row_weight": None, "sinks": None, "causal": False, "softcap": None}
    options |= {"scale": 0.2, "chunk": 1 << 19, **given}
    weight, chunk = options.pop("row_weight"), options.pop("chunk")
    seen = Attention(query.float(), key.float(), **options)
    return _by_operators(seen, columns, rows, weight, chunk)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10_000),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([1, 8, 31, 32, 33, 64, 130]),
    st.sampled_from([1, 15, 16, 17, 32, 33, 47, 150]),
    st.sampled_from([1, 2, 16, 30, 33, 64]),
    st.booleans(),
)
def test_sizes_around_the_edges_of_tiles(seed, dtype, queries, keys, dim, causal):
    generator = torch.Generator().manual_seed(seed)
    # As models hand them over: views of [B, N, H, D].
    query = torch.randn(2, queries, 6, dim, generator=generator).to(dtype).transpose(1, 2)
    key = torch.randn(2, keys, 3, dim, generator=generator).to(dtype).transpose(1, 2)
    columns = torch.arange(keys)[None]
    weight = (torch.rand(1, queries, generator=generator) > 0.3).float()
    sinks = torch.randn(6, generator=generator)
    for options in ({}, {"row_weight": weight, "sinks": sinks}):
        options = {"causal": causal, "scale": 0.2, **options}
        got = attention_column_mean(query, key, columns, rows=slice(None), **options)
        torch.testing.assert_close(
            got, operators(query, key, columns, slice(None), **options), **CLOSE
        )


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["whole", "one row", "expanded", "by key", "one head"])
def test_masks_of_every_kind(dtype, layout):
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 3, 40, 16), torch.randn(2, 3, 53, 16)
    seen = torch.rand(2, 3, 40, 53, generator=generator) > 0.4
    seen[0, :, 7] = False  # A row that sees nothing.
    mask: Tensor = seen
    if dtype != torch.bool:
        bias = torch.randn(2, 3, 40, 53, generator=generator)
        mask = bias.masked_fill(~seen, LOWEST).to(dtype)
        mask = mask.masked_fill(~seen, torch.finfo(dtype).min)
    mask = {
        "whole": mask,
        "one row": mask[:, :, 3:4],
        "expanded": mask[:, :, 3:4].expand(-1, -1, 40, -1),
        "by key": mask.transpose(2, 3).contiguous().transpose(2, 3),
        "one head": mask[:1, :1],
    }[layout]
    columns = torch.randint(0, 53, (2, 20), generator=generator)
    rows = torch.randint(0, 40, (2, 25), generator=generator)
    got = attention_column_mean(query, key, columns, scale=0.2, mask=mask, rows=rows)
    torch.testing.assert_close(got, operators(query, key, columns, rows, mask=mask), **CLOSE)


def test_large_logits_and_a_soft_cap():
    query, key = 60 * torch.randn(1, 2, 9, 8), torch.randn(1, 2, 70, 8)
    columns = torch.arange(70)[None]
    for softcap in (None, 30.0):
        got = attention_column_mean(query, key, columns, scale=1.0, softcap=softcap)
        expected = operators(query, key, columns, None, scale=1.0, softcap=softcap)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
        assert abs(float(got.sum()) - 1.0) < 1e-5


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_numbers_are_not_hidden(value):
    query, key = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 20, 8)
    columns = torch.arange(20)[None]
    query[0, 1, 3, 2] = value
    assert attention_column_mean(query, key, columns, scale=1.0).isnan().any()
    mask = torch.ones(1, 1, 5, 20, dtype=torch.bool)
    mask[:, :, :, 4] = False
    key[0, 0, 4] = value  # Nobody looks at it.
    rows = slice(0, 3)
    got = attention_column_mean(query, key, columns, scale=1.0, mask=mask, rows=rows)
    assert got.isfinite().all() and float(got[0, 4]) == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_change_nothing(dtype):
    query, key = torch.randn(1, 3, 300, 64, dtype=dtype), torch.randn(1, 3, 300, 64, dtype=dtype)
    columns, before = torch.arange(300)[None], torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(attention_column_mean(query, key, columns, scale=0.125))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_tokens_that_are_not_there_get_nothing():
    query, key = torch.randn(2, 2, 5, 8), torch.randn(2, 2, 20, 8)
    columns = torch.tensor([[3, -1, 4], [-1, 19, 0]])
    got = attention_column_mean(query, key, columns, scale=1.0)
    torch.testing.assert_close(got, operators(query, key, columns, None, scale=1.0), **CLOSE)
    assert (got == 0).tolist() == (columns < 0).tolist()


def test_rows_and_columns_that_are_not_there_are_refused():
    query, key = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 20, 8)
    for columns, rows in ((20, [0]), (-2, [0]), (3, [5]), (3, [-1])):
        with pytest.raises(ValueError, match=r"5 query rows.*20 keys"):
            attention_column_mean(
                query, key, torch.tensor([[columns]]), scale=1.0, rows=torch.tensor(rows)
            )


# -- choosing ------------------------------------------------------------------------------------


def best(scores: Tensor, k: int, valid: Tensor | None) -> list[list[int]]:
    """The k largest by a stable sort of Python's."""
    rows = []
    for number, row in enumerate(scores.tolist()):
        own = [True] * len(row) if valid is None else valid[number].tolist()
        values = [value if real else -float("inf") for value, real in zip(row, own, strict=True)]
        rows.append(sorted(sorted(range(len(row)), key=lambda i: -values[i])[:k]))
    return rows


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 70), st.booleans(), st.booleans(), st.data())
def test_best_scores_with_ties(seed, size, tied, masked, data):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(2, size, generator=generator)
    if tied:
        scores = (2 * scores).round() / 2
        scores[scores == 0] *= -1  # Zeros of both signs are one number.
    valid = torch.rand(2, size, generator=generator) > 0.5 if masked else None
    k = data.draw(st.integers(1, size))
    assert top_k(scores, k, valid=valid).tolist() == best(scores, k, valid)
    assert top_k(scores[1], k).tolist() == best(scores[1:], k, None)[0]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10_000),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.booleans(),
    st.sampled_from(["second-nearest", "nearest"]),
    st.data(),
)
def test_algorithm_2_is_its_parts(seed, dtype, masked, first, data):
    generator = torch.Generator().manual_seed(seed)
    size = data.draw(st.integers(2, 80))
    k = data.draw(st.integers(1, size - 1))
    features = torch.randn(2, size, 24, generator=generator).to(dtype)
    semantic, action = torch.rand(2, 2, size, generator=generator)
    valid = torch.rand(2, size, generator=generator) > 0.2 if masked else None
    pool = torch.zeros(2, size, dtype=torch.bool)
    pool = pool.scatter(1, top_k(semantic, k, valid=valid), True)
    pool = pool.scatter(1, top_k(action, k, valid=valid), True)
    expected = max_min_filter(features, k, candidates=pool, first=first).sort(dim=1).values
    got = combine_then_filter(features, semantic, action, k, first=first, valid=valid)
    assert torch.equal(got, expected)


def test_broken_scores_and_features_are_named():
    features, scores = torch.randn(10, 8), torch.rand(10)
    broken = scores.clone()
    broken[4] = float("nan")
    for semantic, action in ((broken, scores), (scores, broken)):
        with pytest.raises(ValueError, match="scores contain NaN"):
            combine_then_filter(features, semantic, action, 3)
    features[int(scores.argmax()), 2] = float("inf")
    with pytest.raises(ValueError, match="candidate token are NaN or infinite"):
        combine_then_filter(features, scores, scores, 3)
