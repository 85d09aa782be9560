"""What stands still, what may be reused, and how much of it each layer does without."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_pruner.baselines.entropy import attention_entropy, layer_shares
from vla_pruner.baselines.reuse import reusable, reuse_counts, reuse_order
from vla_pruner.pruning.frames import patch_similarity, patches

SCORES = st.lists(st.integers(0, 5).map(lambda n: n / 5), min_size=1, max_size=12)


def test_patches_are_rows_of_each_camera():
    frames = torch.arange(2 * 2 * 3 * 4 * 6).view(2, 2, 3, 4, 6)
    cut = patches(frames, 12)
    assert cut.shape == (2, 12, 12) and cut.dtype == torch.float32
    for row in range(2):
        for token in range(12):
            camera, place = divmod(token, 6)
            y, x = 2 * (place // 3), 2 * (place % 3)
            expected = frames[row, camera, :, y : y + 2, x : x + 2].flatten().float()
            assert torch.equal(cut[row, token], expected)


@pytest.mark.parametrize("tokens", [5, 7, 13, 48 * 4])
def test_images_that_tokens_do_not_tile(tokens):
    with pytest.raises(ValueError, match=rf"cannot be cut into {tokens} square patches"):
        patches(torch.zeros(1, 2, 3, 4, 6), tokens)
    with pytest.raises(ValueError, match=r"must be \[B, cameras, 3, H, W\]"):
        patches(torch.zeros(2, 3, 4, 6), 6)


def test_similarity_of_patches():
    before = torch.tensor([[[1.0, 0.0], [3.0, 4.0], [0.0, 0.0], [0.0, 0.0]]])
    now = torch.tensor([[[0.0, 2.0], [4.0, 3.0], [0.0, 0.0], [1.0, 0.0]]])
    expected = torch.tensor([[0.0, 0.96, 1.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(patch_similarity(before, now), expected)


def test_a_patch_that_changed_is_never_as_similar_as_one_that_did_not():
    """One colour of 588 by one step of 255, against exact arithmetic; and brighter, or darker."""
    rng = np.random.default_rng(0)
    before = rng.integers(60, 250, (1, 1000, 588))
    now = before.copy()
    now[0, np.arange(1000), rng.integers(0, 588, 1000)] += 1
    now[0, ::5] = before[0, ::5]
    found = patch_similarity(torch.tensor(before).float(), torch.tensor(now).float())[0]
    assert (found[::5] == 1).all() and (found.view(-1, 5)[:, 1:] < 1).all()
    fp32 = torch.cosine_similarity(torch.tensor(before).float(), torch.tensor(now).float(), dim=-1)
    assert int((fp32 >= 1).sum()) > 400, "fp32 would do"
    cosine = [exact_cosine(a, b) for a, b in zip(before[0].tolist(), now[0].tolist(), strict=True)]
    np.testing.assert_allclose(found.numpy(), cosine, rtol=1e-14)
    options = {"threshold": 0.996, "relevant": 0, "valid": None}
    named = reusable(found[None], torch.zeros(1, 1000), static=200, most=200, **options)
    assert named[0].nonzero().flatten().tolist() == list(range(0, 1000, 5))
    order = reuse_order(torch.ones(1, 1000, dtype=torch.bool), found[None])
    assert order[0, :200].tolist() == list(range(0, 1000, 5))
    for factor in (2, 0.5, 3):
        brighter = patch_similarity(torch.tensor(before).float(), factor * torch.tensor(before))
        assert (brighter < 1).all() and (brighter > 1 - 1e-12).all()


def exact_cosine(a, b):
    """Of whole numbers: only the root and the division round."""
    product = sum(x * y for x, y in zip(a, b, strict=True))
    lengths = sum(x * x for x in a) * sum(y * y for y in b)
    return product / math.sqrt(lengths) if lengths < 2**53 else product / math.isqrt(lengths)


def slow_entropy(query, key, scale, sees, weight):
    """[B], head by head and row by row, over a mask [B, Q, N]."""
    found = []
    for b in range(query.shape[0]):
        total, votes = 0.0, 0.0
        for i in range(query.shape[2]):
            rows = []
            for head in range(query.shape[1]):
                own = key[b, head * key.shape[1] // query.shape[1]]
                logits = (own @ query[b, head, i] * scale).masked_fill(~sees[b, i], -math.inf)
                rows.append(torch.softmax(logits, 0))
            mean = torch.stack(rows).mean(0)
            total += float(weight[b, i]) * -sum(p * math.log(p) for p in mean.tolist() if p > 0)
            votes += float(weight[b, i])
        found.append(total / votes)
    return torch.tensor(found)


@pytest.mark.parametrize(("rows", "keys"), [(7, 7), (5, 9), (140, 150)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_entropy_equals_the_slow_sum(rows, keys, masked, causal):
    generator = torch.Generator().manual_seed(rows)
    query = 2 * torch.randn(2, 4, rows, 8, generator=generator)
    key = torch.randn(2, 2, keys, 8, generator=generator)
    weight = torch.rand(2, rows, generator=generator)
    sees, mask = torch.ones(2, rows, keys, dtype=torch.bool), None
    if masked:
        mask = torch.rand(2, 1, rows, keys, generator=generator) < 0.7
        mask[..., 0] = True
        sees &= mask[:, 0]
    if causal:
        sees &= torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows)
    options = dict(scale=0.3, mask=mask, causal=causal, row_weight=weight)
    found = attention_entropy(query, key, **options)
    torch.testing.assert_close(found, slow_entropy(query, key, 0.3, sees, weight))
    if masked:
        options["mask"] = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo().min)
        torch.testing.assert_close(attention_entropy(query, key, **options), found)


def test_entropy_of_what_is_known():
    query, key = torch.zeros(1, 2, 3, 4), torch.randn(1, 2, 3, 4)
    alike = attention_entropy(query, key, scale=1.0)
    torch.testing.assert_close(alike, torch.tensor([math.log(3)]))
    growing = attention_entropy(query, key, scale=1.0, causal=True)
    torch.testing.assert_close(growing, torch.tensor([(math.log(2) + math.log(3)) / 3]))
    assert attention_entropy(query, key, scale=1.0, row_weight=torch.zeros(1, 3)).tolist() == [0]


def test_layer_shares_by_hand():
    # Shares 0, 1, 0.5, 1, 0.25; rises are followed by half.
    entropy = torch.tensor([[4.0, 0.0, 2.0, 0.0, 3.0], [7.0] * 5])
    expected = torch.tensor([[0.0, 0.5, 0.5, 0.75, 0.25], [1.0] * 5])
    torch.testing.assert_close(layer_shares(entropy, 0.5), expected)
    raw = torch.tensor([[0.0, 1.0, 0.5, 1.0, 0.25]])
    torch.testing.assert_close(layer_shares(entropy[:1], 1.0), raw)


def test_reuse_counts_by_hand():
    shares = torch.tensor([[0.0, 0.55, 0.3, 1.0], [0.0, 0.5, 0.1, 0.9], [0.2, 0.4, 0.6, 0.8]])
    found = reuse_counts(shares, torch.tensor([10, 1, 0]))
    assert found.tolist() == [[1, 5, 5, 10], [1, 1, 1, 1], [0, 0, 0, 0]]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), similarity=SCORES)
def test_reusable_equals_the_slow_rule(data, similarity):
    size = len(similarity)
    relevance = data.draw(st.lists(st.integers(0, 4), min_size=size, max_size=size))
    valid = data.draw(st.lists(st.booleans(), min_size=size, max_size=size))
    static, relevant, most = (data.draw(st.integers(0, size + 3)) for _ in range(3))
    threshold = data.draw(st.sampled_from([0.0, 0.4, 0.8]))
    rank = sorted(range(size), key=lambda t: (-similarity[t] if valid[t] else 9.0, t))
    task = sorted(range(size), key=lambda t: (-relevance[t], t))[:relevant]
    left = [
        token
        for token in rank[:static]
        if valid[token] and similarity[token] >= threshold and token not in task
    ]
    found = reusable(
        torch.tensor([similarity]),
        torch.tensor([relevance]).float(),
        threshold=threshold,
        static=static,
        relevant=relevant,
        most=most,
        valid=torch.tensor([valid]),
    )
    assert found[0].nonzero()[:, 0].tolist() == sorted(left[:most])


def test_the_order_of_reuse():
    named = torch.tensor([[True, False, True, True], [False] * 4])
    similarity = torch.tensor([[0.2, 1.0, 0.9, 0.9], [0.1, 0.2, 0.3, 0.4]])
    assert reuse_order(named).tolist() == [[0, 2, 3, 1], [0, 1, 2, 3]]
    assert reuse_order(named, similarity).tolist() == [[2, 3, 0, 1], [0, 1, 2, 3]]


def test_nan_never_decides():
    scores, nan = torch.zeros(1, 4), torch.full((1, 4), float("nan"))
    options = dict(threshold=0.0, static=2, relevant=2, most=2)
    for similarity, relevance in ((nan, scores), (scores, nan)):
        with pytest.raises(ValueError, match="NaN"):
            reusable(similarity, relevance, **options)
