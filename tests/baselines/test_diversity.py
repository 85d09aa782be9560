"""Max-min diversity and crop-wise quotas, against versions written token by token."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from vla_pruner.baselines.diversity import crop_quotas, crop_sizes, most_diverse
from vla_pruner.methods.holov import likeness


def cosine(a, b):
    length = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / length if length else 0.0


def draw(seed, batch, n, dim=4):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(batch, n, dim, generator=generator)
    return torch.rand(batch, n, generator=generator), features


# ---------------------------------------------------------------------- max-min
def slow_diverse(features, k):
    n = len(features)
    d = [[1 - cosine(a, b) for b in features] for a in features]
    nearest = [min((d[i][j] for j in range(n) if j != i), default=math.inf) for i in range(n)]
    chosen = [max(range(n), key=lambda i: (nearest[i], -i))]
    while len(chosen) < k:
        rest = [j for j in range(n) if j not in chosen]
        chosen.append(max(rest, key=lambda j: (min(d[i][j] for i in chosen), -j)))
    return sorted(chosen)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 14), data=st.data(), seed=st.integers(0, 99))
def test_most_diverse_equals_the_slow_version(n, data, seed):
    k = data.draw(st.integers(1, n))
    _, features = draw(seed, 2, n)
    kept = most_diverse(features, k)
    assert kept.tolist() == [slow_diverse(row.tolist(), k) for row in features]


@settings(max_examples=30, deadline=None)
@given(n=st.integers(2, 14), data=st.data(), seed=st.integers(0, 99))
def test_the_order_of_tokens_does_not_matter(n, data, seed):
    """Where one token starts: of two that are each other's nearest the lower index does."""
    k = data.draw(st.integers(1, n))
    _, features = draw(seed, 1, n)
    tokens = features[0].tolist()
    nearest = sorted(
        min(1 - cosine(a, b) for j, b in enumerate(tokens) if j != i) for i, a in enumerate(tokens)
    )
    assume(nearest[-1] - nearest[-2] > 1e-5)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    one, two = most_diverse(features, k)[0], order[most_diverse(features[:, order], k)[0]]
    assert sorted(two.tolist()) == one.tolist()


def test_duplicates_are_taken_last_and_never_twice():
    _, features = draw(0, 1, 6)
    features[0, 3:] = features[0, 0]
    assert set(most_diverse(features, 3)[0].tolist()) >= {1, 2}
    assert most_diverse(features, 6).tolist() == [list(range(6))]
    assert most_diverse(torch.ones(1, 5, 3), 3).tolist() == [[0, 1, 2]]


def test_bf16_features_are_compared_in_fp32():
    _, features = draw(1, 1, 64, dim=32)
    features = (features * 1e-2 + 1).bfloat16()
    assert torch.equal(most_diverse(features, 20), most_diverse(features.float(), 20))


def test_missing_tokens_fill_up():
    _, features = draw(2, 1, 8)
    valid = torch.tensor([[True, False, True, True, False, False, True, False]])
    assert most_diverse(features, 3, valid=valid)[0].tolist() == [
        [0, 2, 3, 6][i] for i in slow_diverse(features[0, [0, 2, 3, 6]].tolist(), 3)
    ]
    assert most_diverse(features, 6, valid=valid).tolist() == [[0, 1, 2, 3, 4, 6]]


@pytest.mark.parametrize("k", [0, 6])
def test_impossible_counts_are_refused(k):
    attention, features = draw(0, 1, 5)
    for valid in (None, torch.ones(1, 5).bool()):
        with pytest.raises(ValueError, match=r"must lie in 1\.\.5"):
            most_diverse(features, k, valid=valid)
        with pytest.raises(ValueError, match=r"must lie in 1\.\.5"):
            crop_quotas(attention, features, k, valid=valid)


# ---------------------------------------------------------------------- crops
def slow_quotas(attention, features, k, crops, beta, valid):
    """One row; `valid` tokens alone take part."""
    n = len(attention)
    sizes = crop_sizes(n, crops)
    members, start = [], 0
    for size in sizes:
        members.append([i for i in range(start, start + size) if valid[i]])
        start += size
    scores = []
    for crop in members:
        m = len(crop)
        if m == 0:
            scores.append(0.0)
            continue
        variety = []
        for i in crop:
            row = [0.0 if i == j else cosine(features[i], features[j]) for j in crop]
            mean = sum(row) / max(m - 1, 1)
            variety.append(sum((s - mean) ** 2 for s in row) / max(m - 1, 1))
        level = sum(1000 * attention[i] for i in crop) / m
        scale = level / (sum(variety) / m + 1e-6)
        tokens = [
            1000 * attention[i] + beta * v * scale for i, v in zip(crop, variety, strict=True)
        ]
        scores.append(sum(tokens) / m)
    total = sum(scores)
    shares = [s / total if total else 1 / len(sizes) for s in scores]
    places = [min(math.floor(k * s + 1e-4), len(c)) for s, c in zip(shares, members, strict=True)]
    want = min(k, sum(map(len, members)))
    while sum(places) < want:
        for p in sorted(range(len(sizes)), key=lambda p: (-scores[p], p)):
            if places[p] < len(members[p]) and sum(places) < want:
                places[p] += 1
    chosen = []
    for crop, count in zip(members, places, strict=True):
        chosen += sorted(crop, key=lambda i: (-attention[i], i))[:count]
    return places, sorted(chosen)


@settings(max_examples=100, deadline=None)
@given(
    n=st.integers(1, 40),
    crops=st.integers(1, 20),
    beta=st.sampled_from([0.0, 0.09, 2.0]),
    missing=st.booleans(),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_crop_quotas_equal_the_slow_version(n, crops, beta, missing, seed, data):
    attention, features = draw(seed, 2, n)
    valid = torch.ones(2, n, dtype=torch.bool)
    if missing:
        valid[1, n // 3 : n // 3 + n // 2] = False
    k = data.draw(st.integers(1, int(valid.sum(1).min())))
    kept = crop_quotas(
        attention, features, k, crops=crops, beta=beta, valid=valid if missing else None
    )
    for row in range(2):
        _, expected = slow_quotas(
            attention[row].tolist(), features[row].tolist(), k, crops, beta, valid[row].tolist()
        )
        assert kept[row].tolist() == expected


def test_places_beyond_a_crops_size_are_handed_on():
    attention = torch.full((1, 16), 1e-4)
    attention[0, :4] = 1.0
    _, features = draw(3, 1, 16)
    kept = crop_quotas(attention, features, 10, crops=4, beta=0.0)
    assert kept[0, :4].tolist() == [0, 1, 2, 3] and kept.shape == (1, 10)
    assert torch.bincount(kept[0] // 4).tolist() == [4, 2, 2, 2]


def test_scale_of_attention_does_not_matter():
    attention, features = draw(4, 3, 64)
    one, two = (crop_quotas(a, features, 20) for a in (attention, 1000 * attention))
    assert torch.equal(one, two)


def test_even_scores_share_evenly_and_ties_go_to_the_lowest_index():
    kept = crop_quotas(torch.ones(1, 20), torch.ones(1, 20, 3), 8, crops=4)
    assert kept.tolist() == [[0, 1, 5, 6, 10, 11, 15, 16]]
    assert crop_quotas(torch.zeros(1, 20), torch.ones(1, 20, 3), 4, crops=4).tolist() == [
        [0, 5, 10, 15]
    ]


def test_missing_tokens_come_last():
    attention, features = draw(5, 1, 20)
    valid = torch.arange(20)[None] < 7
    kept = crop_quotas(attention, features, 9, crops=4, valid=valid)
    assert kept.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 8]]


@given(n=st.integers(1, 300), crops=st.integers(1, 40))
def test_crops_differ_by_at_most_one(n, crops):
    sizes = crop_sizes(n, crops)
    assert sum(sizes) == n and len(sizes) == min(n, crops)
    assert max(sizes) - min(sizes) <= 1 and list(sizes) == sorted(sizes, reverse=True)


@pytest.mark.parametrize("broken", ["attention", "features"])
def test_nan_is_refused(broken):
    attention, features = draw(6, 1, 20)
    (attention if broken == "attention" else features)[0, 3] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        crop_quotas(attention, features, 5)
    if broken == "features":
        with pytest.raises(ValueError, match="NaN"):
            most_diverse(features, 5)


def test_likeness_is_cosine_to_the_mean_token():
    _, features = draw(7, 2, 9)
    valid = torch.arange(9).expand(2, 9) < 6
    for mask, count in ((None, 9), (valid, 6)):
        mean = features[:, :count].mean(dim=1)
        expected = [
            [(1 + cosine(token.tolist(), mean[row].tolist())) / 2 for token in features[row]]
            for row in range(2)
        ]
        torch.testing.assert_close(likeness(features, mask), torch.tensor(expected))
