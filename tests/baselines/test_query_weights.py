"""Raters are the words that are more similar to the image than the average word."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_pruner.baselines.query_weights import query_weights
from vla_pruner.methods import build


def slow_raters(visual, text, words, strict):
    """One row in plain Python; `words` are the indices of text that count."""
    rating = dict.fromkeys(words, 0.0)
    for v in visual:
        logits = {j: sum(x * y for x, y in zip(v, text[j], strict=True)) for j in words}
        top = max(logits.values())
        total = sum(math.exp(z - top) for z in logits.values())
        for j in words:
            rating[j] += math.exp(logits[j] - top) / total / len(visual)
    mean = sum(rating.values()) / len(words)
    chosen = [j for j in words if rating[j] > mean or (not strict and rating[j] >= mean)]
    return sorted(chosen or words)


def draw(seed, words, visual=7, batch=2):
    generator = torch.Generator().manual_seed(seed)
    made = (
        torch.randn(batch, n, 4, dtype=torch.float64, generator=generator) for n in (visual, words)
    )
    return [tensor.float() for tensor in made]


@settings(max_examples=50, deadline=None)
@given(
    words=st.integers(3, 12), pad=st.integers(0, 2), strict=st.booleans(), seed=st.integers(0, 99)
)
def test_raters_equal_the_slow_version(words, pad, strict, seed):
    visual, text = draw(seed, words)
    valid = torch.ones(2, words, dtype=torch.bool)
    valid[1, :pad] = False
    text[1, :pad] = 100.0  # Padding does not matter, whatever is there.
    weights = query_weights(visual, text, valid, strict=strict)
    for row, first in ((0, 0), (1, pad)):
        expected = slow_raters(
            visual[row].tolist(), text[row].tolist(), range(first, words), strict
        )
        assert weights[row].nonzero()[:, 0].tolist() == expected
    assert set(weights.unique().tolist()) <= {0.0, 1.0}


def test_all_words_rate_where_none_stands_out():
    visual, text = draw(0, 1)
    assert query_weights(visual, text, torch.ones(2, 1).bool()).tolist() == [[1.0]] * 2
    text = torch.zeros(2, 4, 4)
    valid = torch.tensor([[True] * 4, [False, True, True, True]])
    assert query_weights(visual, text, valid).tolist() == [[1.0] * 4, [0.0, 1.0, 1.0, 1.0]]


def test_no_words_no_raters():
    visual, text = draw(1, 3)
    assert not query_weights(visual, text, torch.zeros(2, 3).bool()).any()


@settings(max_examples=30, deadline=None)
@given(words=st.integers(1, 9), pad=st.integers(0, 3), seed=st.integers(0, 99))
def test_the_release_leaves_out_the_first_and_the_last_word(words, pad, seed):
    visual, text = draw(seed, words + pad)
    valid = torch.ones(2, words + pad, dtype=torch.bool)
    valid[:, :pad] = False
    weights = build("sparsevlm-release").query_weights(visual, text, valid)
    inner = range(pad + 1, pad + words - 1) if words > 2 else range(pad, pad + words)
    for row in range(2):
        expected = slow_raters(visual[row].tolist(), text[row].tolist(), inner, strict=False)
        assert weights[row].nonzero()[:, 0].tolist() == expected


def test_shapes_that_do_not_fit_are_refused():
    visual, text = draw(0, 3)
    with pytest.raises(ValueError, match=r"text_valid \[B, T\]"):
        query_weights(visual, text, torch.ones(2, 4).bool())
