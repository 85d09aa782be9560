"""The fast selection is Algorithms 1 and 2, and does not care how tokens are presented."""

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from literally import ROUNDING, algorithm_1, cosine_distance, worst_step
from vla_pruner.pruning.selection import (
    _search_on_device,
    combine_then_filter,
    max_min_filter,
    top_k,
)


def literal_top(scores: Tensor, k: int) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda i: (-float(scores[i]), i))[:k])


def algorithm_2(
    features: Tensor, semantic: Tensor, action: Tensor, k: int, first: str
) -> list[int]:
    if k >= len(features):
        return list(range(len(features)))
    pool = sorted({*literal_top(semantic, k), *literal_top(action, k)})
    return sorted(algorithm_1(cosine_distance(features), pool, k, first))


FIRST = st.sampled_from(["second-nearest", "nearest"])


@st.composite
def exact_features(draw, largest=24):
    """Features whose distances are exact in fp32, so that ties are ties and not rounding.

    Unit vectors along signed axes: duplicates, opposites and right angles, nothing between.
    """
    size, dim = draw(st.integers(1, largest)), draw(st.integers(1, 8))
    axes = draw(st.lists(st.integers(0, dim - 1), min_size=size, max_size=size))
    signs = draw(st.lists(st.sampled_from([-1.0, 1.0, 2.0]), min_size=size, max_size=size))
    features = torch.zeros(size, dim)
    features[torch.arange(size), torch.tensor(axes)] = torch.tensor(signs)
    return features


def random_features(seed: int, size: int, dim: int) -> Tensor:
    return torch.randn(size, dim, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=80, deadline=None)
@given(st.data(), exact_features(), FIRST)
def test_max_min_filter_is_algorithm_1_ties_included(data, features, first):
    size = len(features)
    candidates = sorted(data.draw(st.sets(st.integers(0, size - 1), min_size=1)))
    k = data.draw(st.integers(1, len(candidates)))
    expected = algorithm_1(cosine_distance(features), candidates, k, first)
    index = torch.tensor(candidates)
    mask = torch.zeros(size, dtype=torch.bool).scatter(0, index, True)
    assert max_min_filter(features, k, candidates=mask, first=first).tolist() == expected
    assert max_min_filter(features, k, candidates=index, first=first).tolist() == expected


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    size=st.integers(1, 40),
    dim=st.integers(2, 32),
    first=FIRST,
    data=st.data(),
)
def test_max_min_filter_is_algorithm_1_on_random_features(seed, size, dim, first, data):
    features = random_features(seed, size, dim)
    k = data.draw(st.integers(1, size))
    picks = max_min_filter(features, k, first=first).tolist()
    assert len(set(picks)) == k
    assert worst_step(features, picks, first == "nearest") < ROUNDING


@settings(max_examples=30, deadline=None)
@given(st.data(), exact_features(), st.integers(1030, 2200), FIRST)
def test_ties_of_long_features_go_to_the_lowest_index(data, features, dim, first):
    size, used = features.shape
    long = torch.zeros(size, dim)
    place = torch.linspace(0, dim - 1, used).long()  # Over all pieces that a feature is cut into.
    long[:, place] = features
    k = data.draw(st.integers(1, size))
    expected = algorithm_1(cosine_distance(features), list(range(size)), k, first)
    assert max_min_filter(long, k, first=first).tolist() == expected


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    size=st.integers(1, 40),
    dim=st.integers(1030, 2200),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    first=FIRST,
    data=st.data(),
)
def test_max_min_filter_is_algorithm_1_on_long_features(seed, size, dim, dtype, first, data):
    features = random_features(seed, size, dim).to(dtype)
    k = data.draw(st.integers(1, size))
    picks = max_min_filter(features, k, first=first).tolist()
    assert len(set(picks)) == k
    assert worst_step(features, picks, first == "nearest") < ROUNDING


@settings(max_examples=60, deadline=None)
@given(st.data(), exact_features(), FIRST)
def test_the_search_for_other_devices_picks_the_same(data, features, first):
    size = len(features)
    candidates = torch.tensor(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    candidates[data.draw(st.integers(0, size - 1))] = True
    k = data.draw(st.integers(1, int(candidates.sum())))
    batch, masks = features.expand(2, -1, -1), torch.stack([candidates, torch.ones(size).bool()])
    got = _search_on_device(batch, masks, k, first == "nearest")
    expected = max_min_filter(batch, k, candidates=masks, first=first)
    assert torch.equal(got, expected)


@settings(max_examples=60, deadline=None)
@given(st.data(), exact_features(), FIRST)
def test_combine_then_filter_is_algorithm_2(data, features, first):
    size = len(features)
    scores = st.lists(st.integers(0, 4), min_size=size, max_size=size)  # Small range: many ties.
    semantic = torch.tensor(data.draw(scores), dtype=torch.float32)
    action = torch.tensor(data.draw(scores), dtype=torch.float32)
    k = data.draw(st.integers(1, size))
    got = combine_then_filter(features, semantic, action, k, first=first)
    assert got.tolist() == algorithm_2(features, semantic, action, k, first)


def starts_clearly(features: Tensor, candidates: list[int]) -> bool:
    """Whether one token is the first: two that are each other's second-nearest tie by symmetry."""
    distance = cosine_distance(features)[candidates][:, candidates].fill_diagonal_(float("inf"))
    if len(candidates) < 3:
        return len(candidates) == 1
    best = distance.sort(dim=1).values[:, 1].sort(descending=True).values
    return float(best[0] - best[1]) > 1e-6


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(seed=st.integers(0, 10_000), size=st.integers(3, 40), data=st.data())
def test_selection_follows_a_permutation_of_the_tokens(seed, size, data):
    features = random_features(seed, size, 16)
    semantic, action = random_features(seed + 1, 2, size).abs()
    k = data.draw(st.integers(1, size - 1))
    order = torch.tensor(data.draw(st.permutations(range(size))))
    pool = sorted({*literal_top(semantic, k), *literal_top(action, k)})
    assume(starts_clearly(features, list(range(size))) and starts_clearly(features, pool))
    picked = max_min_filter(features, k)
    assert torch.equal(order[max_min_filter(features[order], k)], picked)
    kept = combine_then_filter(features, semantic, action, k)
    moved = combine_then_filter(features[order], semantic[order], action[order], k)
    assert torch.equal(order[moved].sort().values, kept)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), size=st.integers(2, 30), data=st.data())
def test_a_row_of_the_batch_does_not_depend_on_its_neighbours(seed, size, data):
    features = random_features(seed, 3 * size, 12).view(3, size, 12)
    scores = random_features(seed + 1, 6, size).abs().view(2, 3, size)
    k = data.draw(st.integers(1, size))
    picked = max_min_filter(features, k)
    kept = combine_then_filter(features, scores[0], scores[1], k)
    for b in range(3):
        assert torch.equal(max_min_filter(features[b], k), picked[b])
        assert torch.equal(combine_then_filter(features[b], scores[0, b], scores[1, b], k), kept[b])


@settings(max_examples=40, deadline=None)
@given(exact_features(), st.data())
def test_what_is_chosen_is_chosen_once_and_from_the_candidates(features, data):
    size = len(features)
    candidates = sorted(data.draw(st.sets(st.integers(0, size - 1), min_size=1)))
    picked = max_min_filter(features, len(candidates), candidates=torch.tensor(candidates))
    assert sorted(picked.tolist()) == candidates


def test_lengths_of_features_do_not_matter():
    features = random_features(0, 30, 16)
    scaled = features * 2.0 ** torch.randint(-6, 7, (30, 1))
    assert torch.equal(max_min_filter(features, 12), max_min_filter(scaled, 12))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_every_floating_dtype_is_compared_in_fp32(dtype):
    features = random_features(0, 30, 16).to(dtype)
    assert torch.equal(max_min_filter(features, 12), max_min_filter(features.float(), 12))


def test_a_feature_of_length_zero_is_far_from_everything():
    features = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 0.0], [1.0, 0.2]])
    assert max_min_filter(features, 2, first="nearest").tolist() == [2, 0]


def test_duplicates_come_last_and_the_lowest_index_first():
    features = torch.eye(4).repeat(3, 1)
    assert max_min_filter(features, 12).tolist() == list(range(12))
    assert max_min_filter(torch.ones(6, 3), 6).tolist() == [0, 1, 2, 3, 4, 5]


def test_one_token_and_all_tokens():
    features = random_features(0, 9, 4)
    semantic, action = torch.rand(2, 9)
    assert max_min_filter(features[:1], 1).tolist() == [0]
    assert max_min_filter(features, 1).shape == (1,)
    assert max_min_filter(features, 9).sort().values.tolist() == list(range(9))
    assert combine_then_filter(features, semantic, action, 9).tolist() == list(range(9))
    alone = combine_then_filter(features, semantic, semantic, 1)
    assert alone.tolist() == [int(semantic.argmax())]


def test_equal_scores_leave_nothing_to_filter():
    features, semantic = random_features(0, 20, 4), torch.rand(20)
    assert torch.equal(combine_then_filter(features, semantic, semantic, 6), top_k(semantic, 6))
    assert torch.equal(combine_then_filter(features, semantic, None, 6), top_k(semantic, 6))


def test_the_first_token_can_be_the_releases():
    # 0 and 1 are a close pair far from the rest; 2, 3, 4 are an arc.
    angle = torch.tensor([0.0, 0.02, 1.6, 2.05, 2.4])
    features = torch.stack([angle.cos(), angle.sin()], dim=1)
    assert max_min_filter(features, 1, first="second-nearest").tolist() == [0]
    assert max_min_filter(features, 1, first="nearest").tolist() == [2]


@pytest.mark.parametrize("kind", ["random", "clustered"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sequence_is_that_of_a_plain_fp32_search_at_full_size(kind, dtype):
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(512, 4096, generator=generator)
    if kind == "clustered":
        centres = torch.randn(40, 4096, generator=generator)
        features = centres[torch.arange(512) % 40] + 0.3 * features
    features = features.to(dtype)
    distance = cosine_distance(features)
    others = distance.clone().fill_diagonal_(float("inf"))
    pick = int(others.topk(2, largest=False).values[:, 1].argmax())
    best, expected = torch.full((512,), float("inf")), [pick]
    for _ in range(127):
        best = torch.minimum(best, distance[pick])
        best[expected] = float("-inf")
        pick = int(best.argmax())
        expected.append(pick)
    assert max_min_filter(features, 128).tolist() == expected


def test_bf16_features_are_compared_in_fp32():
    # Next to each other in bf16's cosine, told apart in fp32.
    angle = torch.linspace(0.0, 0.02, 40)
    features = torch.stack([angle.cos(), angle.sin()], dim=1)
    order = max_min_filter(features, 3, first="nearest")
    assert {0, 39} <= set(order.tolist())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(max_min_filter(features, 3, first="nearest"), order)
        device = _search_on_device(features[None], torch.ones(1, 40).bool(), 3, True)
        assert device.shape == (1, 3)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 20))
def test_top_k_breaks_ties_by_index(data, size):
    scores = torch.tensor(
        data.draw(st.lists(st.integers(-2, 2), min_size=size, max_size=size)), dtype=torch.float32
    )
    k = data.draw(st.integers(1, size))
    assert top_k(scores, k).tolist() == literal_top(scores, k)
    assert top_k(scores.expand(2, 3, -1), k).tolist() == [[literal_top(scores, k)] * 3] * 2


def test_tokens_that_are_not_valid_come_after_all_others():
    scores = torch.tensor([0.1, 0.9, 0.5, 0.8])
    valid = torch.tensor([True, False, True, False])
    assert top_k(scores, 2, valid=valid).tolist() == [0, 2]
    assert top_k(scores, 3, valid=valid).tolist() == [0, 1, 2]
    features = torch.eye(4)
    assert combine_then_filter(features, scores, scores.flip(0), 2, valid=valid).tolist() == [0, 2]
    got = combine_then_filter(features, scores, scores.flip(0), 3, valid=valid)
    assert got.tolist() == [0, 1, 2]


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_broken_features_are_refused(broken):
    features = random_features(0, 8, 4)
    features[3, 1] = broken
    with pytest.raises(ValueError, match="NaN or infinite"):
        max_min_filter(features, 3)
    others = torch.tensor([0, 1, 2, 4, 5])
    picked = max_min_filter(features, 3, candidates=others)
    mask = torch.zeros(1, 8, dtype=torch.bool).scatter(1, others[None], True)
    assert 3 not in picked.tolist()
    assert torch.equal(_search_on_device(features[None], mask, 3, False)[0], picked)


def test_nan_scores_are_refused():
    scores = torch.tensor([0.1, float("nan"), 0.2])
    with pytest.raises(ValueError, match="scores contain NaN"):
        top_k(scores, 2)
    with pytest.raises(ValueError, match="scores contain NaN"):
        combine_then_filter(torch.eye(3), torch.ones(3), scores, 2)


def test_impossible_requests_are_refused():
    features = torch.eye(4)
    for k in (0, 5):
        with pytest.raises(ValueError, match=f"`k={k}` must lie in 1..4"):
            max_min_filter(features, k)
    with pytest.raises(ValueError, match="more than the 2 candidates"):
        max_min_filter(features, 3, candidates=torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="first='last'"):
        max_min_filter(features, 3, first="last")
    with pytest.raises(ValueError, match="one entry for each of the 4 tokens"):
        max_min_filter(features, 2, candidates=torch.ones(3).bool())
    with pytest.raises(ValueError, match=r"features must be \[n, d\] or \[B, n, d\]"):
        max_min_filter(torch.ones(3), 1)
    with pytest.raises(ValueError, match=r"action must be \(4,\)"):
        combine_then_filter(features, torch.ones(4), torch.ones(3), 2)


def test_it_compiles_into_one_graph_without_recompiling():
    compilations = []

    def count(graph, inputs):
        compilations.append(graph)
        return graph

    def select(features, semantic, action):
        return combine_then_filter(features, semantic, action, 5)

    compiled = torch.compile(select, fullgraph=True, backend=count)
    for seed in range(3):
        features = random_features(seed, 24, 8).view(2, 12, 8)
        semantic, action = random_features(seed + 9, 4, 12).abs().view(2, 2, 12)
        assert torch.equal(compiled(features, semantic, action), select(features, semantic, action))
    assert len(compilations) == 1
    assert len(list(compilations[0].graph.nodes)) < 60


@pytest.mark.gpu
def test_a_gpu_picks_what_the_cpu_picks_and_can_be_captured():
    features = random_features(1, 2 * 64, 32).view(2, 64, 32)
    semantic, action = random_features(2, 4, 64).abs().view(2, 2, 64)
    expected = combine_then_filter(features, semantic, action, 16)
    static = [tensor.cuda() for tensor in (features, semantic, action)]
    assert torch.equal(combine_then_filter(*static, 16).cpu(), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = combine_then_filter(*static, 16)
    graph.replay()
    assert torch.equal(captured.cpu(), expected)
