"""Attention of the strongest head and raw logits, against loops over every row and head."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checks import near
from vla_pruner.pruning.received import attention_column_max, logit_column_mean

SHAPES = dict(
    batch=st.integers(1, 2),
    group=st.integers(1, 2),
    queries=st.integers(1, 9),
    seed=st.integers(0, 100),
)


def tensors(batch, group, queries, keys, seed):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, 2 * group, queries, 4, generator=generator)
    key = torch.randn(batch, 2, keys, 4, generator=generator)
    return query, key, generator


@settings(max_examples=60, deadline=None)
@given(
    **SHAPES,
    more=st.integers(0, 3),
    causal=st.booleans(),
    mask=st.sampled_from(["none", "bool", "additive"]),
    weighted=st.booleans(),
    voting=st.sampled_from(["all", "slice", "rows"]),
)
def test_attention_of_the_strongest_head(
    batch, group, queries, seed, more, causal, mask, weighted, voting
):
    keys = queries + more
    query, key, generator = tensors(batch, group, queries, keys, seed)
    sees = torch.rand(batch, 1, queries, keys, generator=generator) < 0.7
    weight = torch.rand(batch, queries, generator=generator) if weighted else None
    columns = torch.randperm(keys, generator=generator)[: max(1, keys // 2)][None]
    rows = {
        "all": None,
        "slice": slice(-1, None),
        "rows": torch.randint(queries, (batch, 3), generator=generator),
    }[voting]
    given_mask = {
        "none": None,
        "bool": sees,
        "additive": torch.zeros_like(sees, dtype=torch.float32).masked_fill(~sees, -math.inf),
    }[mask]
    got = attention_column_max(
        query, key, columns, scale=0.5, mask=given_mask, causal=causal, rows=rows, row_weight=weight
    )
    for b in range(batch):
        chosen = {"all": [*range(queries)], "slice": [queries - 1]}.get(voting)
        chosen = rows[b].tolist() if chosen is None else chosen
        total, weights = torch.zeros(columns.shape[1]), 0.0
        for i in chosen:
            strongest = torch.zeros(keys)
            for h in range(2 * group):
                allowed = [
                    j
                    for j in range(keys)
                    if (mask == "none" or sees[b, 0, i, j]) and (not causal or j <= i + more)
                ]
                if not allowed:
                    continue
                logits = 0.5 * key[b, h // group][allowed] @ query[b, h, i]
                probability = torch.zeros(keys)
                probability[allowed] = torch.softmax(logits, dim=0)
                strongest = torch.maximum(strongest, probability)
            w = 1.0 if weight is None else float(weight[b, i])
            total, weights = total + w * strongest[columns[0]], weights + w
        near(got[b], total / weights)


@settings(max_examples=40, deadline=None)
@given(**SHAPES, heads=st.sampled_from(["mean", "max"]), weighted=st.booleans())
def test_logits(batch, group, queries, seed, heads, weighted):
    query, key, generator = tensors(batch, group, queries, 5, seed)
    weight = torch.rand(batch, queries, generator=generator) if weighted else None
    got = logit_column_mean(query, key, scale=0.5, row_weight=weight, heads=heads)
    for b in range(batch):
        for m in range(5):
            total, weights = 0.0, 0.0
            for i in range(queries):
                products = [
                    0.5 * float(query[b, h, i] @ key[b, h // group, m]) for h in range(2 * group)
                ]
                joined = max(products) if heads == "max" else sum(products) / len(products)
                w = 1.0 if weight is None else float(weight[b, i])
                total, weights = total + w * joined, weights + w
            assert float(got[b, m]) == pytest.approx(total / weights, rel=1e-4, abs=1e-5)


def test_many_rows_are_taken_in_blocks():
    query, key, _ = tensors(2, 2, 150, 150, 0)
    columns = torch.arange(40, 60)[None]
    weight = torch.rand(2, 150)
    whole = torch.softmax(query @ key.repeat_interleave(2, 1).mT * 0.5, dim=-1).amax(1)
    expected = (whole[..., 40:60] * weight[..., None]).sum(1) / weight.sum(1, keepdim=True)
    got = attention_column_max(query, key, columns, scale=0.5, row_weight=weight)
    torch.testing.assert_close(got, expected)


def test_no_weight_gives_nothing_and_no_row_is_refused():
    query, key, _ = tensors(1, 1, 4, 4, 0)
    columns, none = torch.arange(4)[None], torch.zeros(1, 4)
    silent = attention_column_max(query, key, columns, scale=1.0, row_weight=none)
    assert silent.eq(0).all()
    assert logit_column_mean(query, key, scale=1.0, row_weight=none).eq(0).all()
    with pytest.raises(ValueError, match="names none of the 4 query rows"):
        attention_column_max(query, key, columns, scale=1.0, rows=slice(4, None))
    with pytest.raises(ValueError, match="names none"):
        logit_column_mean(query, key, scale=1.0, rows=slice(4, None))
    with pytest.raises(ValueError, match="key heads"):
        logit_column_mean(query[:, :1], key, scale=1.0)
