"""Column means equal those of the full softmax, whatever the mask, the heads and the chunks."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from checks import near
from vla_pruner.kernels.native import Attention
from vla_pruner.pruning.scores import (
    _by_operators,
    attention_column_mean,
    attention_rows,
)


def full_softmax(query, key, scale, allowed, softcap=None) -> Tensor:
    """Attention `[B, Hq, Q, N]` in fp64, one head at a time; fully hidden rows are zero."""
    batch, heads, rows, _ = query.shape
    group = heads // key.shape[1]
    out = torch.zeros(batch, heads, rows, key.shape[2], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            logits = query[b, h].double() @ key[b, h // group].double().T * scale
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            for i in range(rows):
                seen = allowed[b, h, i]
                if seen.any():
                    out[b, h, i, seen] = torch.softmax(logits[i, seen], dim=-1)
    return out


def literal_mean(probabilities, columns, rows, weight) -> Tensor:
    """Eq. 2 by loops: rows is a list of lists, weight `[B, Q]`."""
    out = torch.zeros(columns.shape, dtype=torch.float64)
    for b, chosen in enumerate(rows):
        total = sum(float(weight[b, i]) for i in chosen)
        for m, column in enumerate(columns[b].tolist()):
            votes = sum(float(weight[b, i]) * probabilities[b, :, i, column].mean() for i in chosen)
            out[b, m] = votes / total if total else 0.0
    return out


@st.composite
def attention_cases(draw):
    """A query, a key, and every option of the column mean."""
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    batch, dim = draw(st.integers(1, 3)), draw(st.sampled_from([2, 8]))
    queries = draw(st.integers(1, 9))
    keys = queries + draw(st.integers(-2, 5))
    keys = max(keys, 1)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    heads = kv_heads * group
    query = torch.randn(batch, heads, queries, dim, generator=generator)
    key = torch.randn(batch, kv_heads, keys, dim, generator=generator)
    columns = torch.randint(0, keys, (batch, draw(st.integers(1, 6))), generator=generator)
    allowed = torch.ones(batch, heads, queries, keys, dtype=torch.bool)
    causal = draw(st.booleans())
    if causal:
        allowed &= torch.arange(keys) <= torch.arange(queries)[:, None] + (keys - queries)
    mask = None
    form = draw(st.sampled_from(["none", "bool", "-inf", "smallest"]))
    if form != "none":
        shape = (
            draw(st.sampled_from([1, batch])),
            draw(st.sampled_from([1, heads])),
            draw(st.sampled_from([1, queries])),
            keys,
        )
        seen = torch.rand(shape, generator=generator) > 0.3
        allowed = allowed & seen
        mask = seen
        if form != "bool":
            dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
            lowest = float("-inf") if form == "-inf" else torch.finfo(dtype).min
            mask = torch.zeros(shape, dtype=dtype).masked_fill(~seen, lowest)
    which = draw(st.sampled_from(["all", "slice", "last", "strided", "shared", "each"]))
    rows: slice | Tensor | None = None
    if which == "all":
        lists = [list(range(queries))] * batch
    elif which in ("slice", "last", "strided"):
        rows = {
            "slice": slice(-max(1, queries // 2), None),
            "last": slice(-1, None),
            "strided": slice(queries % 2, None, 2) if queries > 1 else slice(None),
        }[which]
        lists = [list(range(queries))[rows]] * batch
    else:
        size = draw(st.integers(1, queries))
        order = torch.rand(batch, queries, generator=generator).argsort(dim=1)[:, :size]
        rows = order if which == "each" else order[0]
        lists = order.tolist() if which == "each" else [order[0].tolist()] * batch
    weight = None
    if draw(st.booleans()):
        weight = (torch.rand(batch, queries, generator=generator) > 0.4).float()
    softcap = draw(st.sampled_from([None, 1.5]))
    chunk = draw(st.sampled_from([1, 7, 40, 1 << 20]))
    options = {
        "scale": 1 / math.sqrt(dim),
        "mask": mask,
        "causal": causal,
        "rows": rows,
        "row_weight": weight,
        "softcap": softcap,
        "chunk": chunk,
    }
    return query, key, columns, allowed, lists, options


@settings(max_examples=150, deadline=None)
@given(attention_cases())
def test_column_mean_equals_the_full_softmax(case):
    query, key, columns, allowed, lists, options = case
    probabilities = full_softmax(query, key, options["scale"], allowed, options["softcap"])
    weight = options["row_weight"]
    weight = torch.ones(query.shape[0], query.shape[2]) if weight is None else weight
    expected = literal_mean(probabilities, columns, lists, weight)
    got = attention_column_mean(query, key, columns, **options)
    assert got.dtype == torch.float32
    near(got.double(), expected)
    how = dict(options)
    rows, weight, chunk = (how.pop(name) for name in ("rows", "row_weight", "chunk"))
    plain = _by_operators(Attention(query, key, **how), columns, rows, weight, chunk)
    near(plain.double(), expected)


@settings(max_examples=60, deadline=None)
@given(attention_cases())
def test_rows_equal_the_full_softmax(case):
    query, key, _, allowed, _, options = case
    expected = full_softmax(query, key, options["scale"], allowed, options["softcap"])
    got = attention_rows(
        query,
        key,
        **{name: options[name] for name in ("scale", "mask", "causal", "softcap")},
    )
    near(got.double(), expected)


def test_blocks_of_a_long_causal_prefill_fit_together():
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 301, 16, generator=generator)
    key = torch.randn(2, 2, 301, 16, generator=generator)
    columns = torch.arange(1, 257).expand(2, -1)
    allowed = torch.ones(301, 301, dtype=torch.bool).tril().expand(2, 4, -1, -1)
    expected = full_softmax(query, key, 0.25, allowed).mean(dim=(1, 2)).gather(1, columns)
    got = attention_column_mean(query, key, columns, scale=0.25, causal=True, chunk=50_000)
    near(got.double(), expected)


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operator made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def test_no_attention_matrix_is_ever_held_whole():
    query, key = torch.randn(1, 8, 300, 16), torch.randn(1, 8, 300, 16)
    columns = torch.arange(1, 257)[None]
    whole, chunk = 8 * 300 * 300, 60_000
    for causal in (False, True):
        with LargestTensor() as largest:
            attention_column_mean(query, key, columns, scale=0.25, causal=causal, chunk=chunk)
        assert 0 < largest.elements <= chunk < whole / 10


def test_attention_over_all_columns_sums_to_one():
    query, key = torch.randn(1, 4, 20, 8), torch.randn(1, 2, 20, 8)
    everything = torch.arange(20)[None]
    for causal in (False, True):
        got = attention_column_mean(query, key, everything, scale=0.3, causal=causal)
        assert abs(float(got.sum()) - 1.0) < 1e-5


def test_padded_rows_do_not_vote():
    query, key = torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8)
    columns = torch.arange(3, 6)[None]
    seen = torch.tensor([False, False, True, True, True, True])
    padded = attention_column_mean(
        query,
        key,
        columns,
        scale=0.3,
        mask=seen[None, None, None],
        causal=True,
        row_weight=seen.float()[None],
    )
    alone = attention_column_mean(
        query[:, :, 2:], key[:, :, 2:], columns - 2, scale=0.3, causal=True
    )
    torch.testing.assert_close(padded, alone)


def test_no_vote_at_all_is_zero_not_nan():
    query, key = torch.randn(2, 2, 3, 4), torch.randn(2, 2, 5, 4)
    columns = torch.tensor([[0, 4], [1, 2]])
    hidden = torch.zeros(1, 1, 1, 5, dtype=torch.bool)
    assert attention_column_mean(query, key, columns, scale=1.0, mask=hidden).eq(0).all()
    silent = torch.zeros(2, 3)
    assert attention_column_mean(query, key, columns, scale=1.0, row_weight=silent).eq(0).all()


def test_a_row_of_the_batch_does_not_depend_on_its_neighbours():
    query, key = torch.randn(3, 4, 10, 8), torch.randn(3, 2, 10, 8)
    columns = torch.randint(0, 10, (3, 4))
    together = attention_column_mean(query, key, columns, scale=0.3, causal=True)
    for b in range(3):
        alone = attention_column_mean(
            query[b : b + 1], key[b : b + 1], columns[b : b + 1], scale=0.3, causal=True
        )
        near(together[b : b + 1], alone)


def test_one_set_of_columns_serves_the_whole_batch():
    query, key = torch.randn(3, 2, 5, 4), torch.randn(3, 2, 5, 4)
    shared = attention_column_mean(query, key, torch.tensor([[1, 3]]), scale=0.5)
    each = attention_column_mean(query, key, torch.tensor([[1, 3]] * 3), scale=0.5)
    assert torch.equal(shared, each)


@pytest.mark.parametrize("causal", [False, True])
def test_views_of_token_major_tensors_score_the_same(causal):
    query, key = torch.randn(2, 30, 4, 8).transpose(1, 2), torch.randn(2, 30, 2, 8).transpose(1, 2)
    columns = torch.arange(5, 20)[None]
    viewed = attention_column_mean(query, key, columns, scale=0.35, causal=causal)
    copied = attention_column_mean(
        query.contiguous(), key.contiguous(), columns, scale=0.35, causal=causal
    )
    assert torch.equal(viewed, copied)


def test_half_precision_input_is_scored_in_full_precision():
    query, key = torch.randn(1, 2, 40, 16).bfloat16(), torch.randn(1, 2, 40, 16).bfloat16()
    columns = torch.arange(40)[None]
    exact = attention_column_mean(query.float(), key.float(), columns, scale=0.25)
    got = attention_column_mean(query, key, columns, scale=0.25)
    assert got.dtype == torch.float32
    near(got, exact, rel=2e-3)
    assert got.unique().numel() == 40


def test_autocast_does_not_lower_the_precision():
    query, key = torch.randn(1, 2, 40, 16), torch.randn(1, 2, 40, 16)
    columns = torch.arange(40)[None]
    expected = attention_column_mean(query, key, columns, scale=0.25)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = attention_column_mean(query, key, columns, scale=0.25)
        rows = attention_rows(query, key, scale=0.25)
    assert torch.equal(got, expected)
    assert torch.equal(rows, attention_rows(query, key, scale=0.25))


@pytest.mark.parametrize("causal", [False, True])
def test_it_compiles_into_one_graph(causal):
    query, key = torch.randn(2, 4, 30, 8), torch.randn(2, 2, 30, 8)
    columns = torch.randint(0, 30, (2, 7))
    weight = torch.ones(2, 30)

    def score(query, key, columns, weight):
        return attention_column_mean(
            query, key, columns, scale=0.35, causal=causal, row_weight=weight, chunk=2000
        )

    compiled = torch.compile(score, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(query, key, columns, weight), score(query, key, columns, weight)
    )


def test_inputs_stay_as_they_are():
    query, key = torch.randn(1, 2, 6, 4), torch.randn(1, 2, 6, 4)
    mask = torch.zeros(1, 1, 6, 6).masked_fill(torch.rand(1, 1, 6, 6) > 0.5, float("-inf"))
    before = [tensor.clone() for tensor in (query, key, mask)]
    attention_column_mean(query, key, torch.arange(6)[None], scale=1.0, mask=mask, softcap=2.0)
    for tensor, copy in zip((query, key, mask), before, strict=True):
        assert torch.equal(tensor, copy)


@pytest.mark.parametrize(
    ("query", "key", "options", "message"),
    [
        ((1, 2, 3), (1, 2, 3, 4), {}, r"\[B, H, tokens, D\]"),
        ((1, 2, 3, 4), (2, 2, 3, 4), {}, "agree in batch"),
        ((1, 3, 3, 4), (1, 2, 3, 4), {}, "multiple of the key heads"),
        ((1, 2, 3, 4), (1, 2, 3, 4), {"mask": torch.ones(1, 1, 3, 9).bool()}, "N=3 keys"),
        ((1, 2, 3, 4), (1, 2, 3, 4), {"rows": slice(3, None)}, "no row would vote"),
    ],
)
def test_what_does_not_fit_is_refused(query, key, options, message):
    with pytest.raises(ValueError, match=message):
        attention_column_mean(
            torch.randn(query), torch.randn(key), torch.zeros(1, 1).long(), scale=1.0, **options
        )
