"""EfficientVLA, FitPrune, VTW and Fixed choose as their formulas say."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_recipe import recipe

from vla_pruner.methods import Evidence, build
from vla_pruner.methods.efficientvla import key_task_diverse


def evidence(batch=2, size=12, seed=0, **changes) -> Evidence:
    generator = torch.Generator().manual_seed(seed)
    made = {
        "features": torch.randn(batch, size, 5, generator=generator),
        "semantic": torch.rand(batch, size, generator=generator),
        "forecast": None,
        "views": (size,),
        "layer": 2,
        "scores": {
            "cross": torch.rand(batch, size, generator=generator),
            "self": torch.rand(batch, size, generator=generator),
        },
    }
    return Evidence(**{**made, **changes})


# ---------------------------------------------------------------------- EfficientVLA
def slow_key_task_diverse(features, relevance, k, key, alpha):
    """One row, step by step, with the scaled relevance of the paper."""
    low, high = min(relevance), max(relevance)
    span = (high - low) or 1.0
    scaled = [(value - low) / span for value in relevance]
    order = sorted(range(len(scaled)), key=lambda i: (-scaled[i], i))
    key = min(key, k)
    keys = order[:key]
    task = order[key : key + math.floor(alpha * (k - key))]

    def cosine(a, b):
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))

    rest = [i for i in range(len(scaled)) if i not in keys + task]
    distance = {i: 1 - max(cosine(features[i], features[j]) for j in keys) for i in rest}
    rest.sort(key=lambda i: (-distance[i], i))
    return sorted(keys + task + rest[: k - key - len(task)])


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 14),
    share=st.floats(0, 1),
    key=st.integers(1, 6),
    alpha=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    seed=st.integers(0, 1000),
)
def test_key_task_diverse_is_the_formula(n, share, key, alpha, seed):
    k = max(1, round(share * n))
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(2, n, 4, generator=generator)
    relevance = torch.rand(2, n, generator=generator)
    chosen = key_task_diverse(features, relevance, k, key=key, alpha=alpha)
    expected = [
        slow_key_task_diverse(f.double().tolist(), r.tolist(), k, key, alpha)
        for f, r in zip(features, relevance, strict=True)
    ]
    assert chosen.tolist() == expected


@settings(max_examples=40, deadline=None)
@given(n=st.integers(2, 12), seed=st.integers(0, 1000), data=st.data())
def test_key_task_diverse_follows_a_permutation_of_the_tokens(n, seed, data):
    k = data.draw(st.integers(1, n))
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(1, n, 4, generator=generator)
    relevance = torch.rand(1, n, generator=generator)
    order = torch.randperm(n, generator=generator)
    chosen = key_task_diverse(features, relevance, k)
    moved = key_task_diverse(features[:, order], relevance[:, order], k)
    assert order[moved[0]].sort().values.tolist() == chosen[0].tolist()


def test_ties_go_to_the_lowest_index():
    same = torch.ones(1, 8, 3)
    assert key_task_diverse(same, torch.zeros(1, 8), 5, key=2).tolist() == [[0, 1, 2, 3, 4]]


def test_diverse_tokens_differ_from_the_key_tokens_and_not_from_each_other():
    east, north, west = [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]
    features = torch.tensor([[east, north, west, west, east]])
    relevance = torch.tensor([[1.0, 0.0, 0.0, 0.0, 0.5]])
    assert key_task_diverse(features, relevance, 3, key=1, alpha=0.0).tolist() == [[0, 2, 3]]
    assert key_task_diverse(features, relevance, 3, key=1, alpha=0.5).tolist() == [[0, 2, 4]]


def test_tokens_of_a_missing_camera_come_last():
    features, relevance = torch.randn(1, 8, 4), torch.rand(1, 8)
    valid = torch.tensor([[False, False, True, True, True, True, True, True]])
    features[:, :2], relevance[:, :2] = -features[:, 2:4], 2.0
    assert key_task_diverse(features, relevance, 6, valid=valid).tolist() == [[2, 3, 4, 5, 6, 7]]
    assert key_task_diverse(features, relevance, 7, valid=valid)[0, 0] == 0


@pytest.mark.parametrize("broken", ["features", "relevance"])
def test_nan_never_reaches_the_selection(broken):
    given_tensors = {"features": torch.randn(1, 8, 4), "relevance": torch.rand(1, 8)}
    given_tensors[broken][0, 3] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        key_task_diverse(**given_tensors, k=6)


def test_efficientvla_asks_for_the_instructions_attention():
    method = build("efficientvla", keep=6)
    (spec,) = method.scores(2).values()
    assert (spec.layer, spec.rows, spec.heads, method.cuts(8)) == (1, "text", "mean", (2,))
    assert method.needs == ("text",) and not method.wants_recipe and method.skipped(8) == ()
    shown = evidence()
    expected = key_task_diverse(shown.features, shown.semantic, 6, key=4, alpha=0.5)
    assert torch.equal(method.select(shown), expected)
    with pytest.raises(ValueError, match="semantic"):
        method.select(evidence(semantic=None))


def test_the_least_important_layers_do_not_run():
    made = recipe("efficientvla", importance=[0.0, 0.3, 0.1, 0.1])
    layers = build("efficientvla", parts="layers", skip=2, recipe=made)
    assert layers.skipped(4) == (2, 3)  # Not layer 0, though it changes least.
    assert layers.cuts(4) == layers.schedule((12,), 4) == layers.needs == ()
    assert layers.kept((12,)) == 12
    assert build("efficientvla", parts="layers", recipe=made).skipped(4) == (2,)
    both = build("efficientvla", parts="both", layer=3, skip=2, recipe=made)
    assert both.skipped(4) == (1, 3)  # Layer 2 is read.
    assert both.cuts(4) == (3,)
    with pytest.raises(ValueError, match="leaves out 3 of 4 layers, of which 2 must run"):
        build("efficientvla", parts="both", skip=3, recipe=made).skipped(4)
    bare = build("efficientvla", parts="both")
    assert bare.wants_recipe
    with pytest.raises(ValueError, match="vla-pruner calibrate efficientvla"):
        bare.skipped(4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parts": "all"}, "'tokens', 'layers', 'both'"),
        ({"key": 0}, "key=0"),
        ({"alpha": 1.5}, "alpha=1.5"),
        ({"skip": 1.0}, r"skip=1\.0"),
        ({"skip": -1}, "skip=-1"),
        ({"layer": 0}, "layer=0"),
        ({"flow_interval": 0}, "flow_interval=0"),
    ],
)
def test_bad_options_of_efficientvla_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build("efficientvla", **options)


# ---------------------------------------------------------------------- FitPrune
def fitprune(left):
    return build("fitprune", recipe=recipe("fitprune", left=left))


def test_a_recipe_says_where_fitprune_cuts_and_what_is_left():
    method = fitprune([12, 12, 7, 3])
    assert method.cuts(4) == (2, 3)
    assert method.schedule((6, 6), 4) == (7, 3)
    assert method.kept((12,)) == 3
    assert fitprune([12, 12, 12, 12]).cuts(4) == ()
    assert method.needs == ("text",)
    read = {name: (s.layer, s.rows, s.heads) for name, s in method.scores(3).items()}
    assert read == {"cross": (2, "text", "max"), "self": (2, "visual", "max")}
    with pytest.raises(ValueError, match="for 12 visual tokens, but the input has 13"):
        method.schedule((13,), 4)
    with pytest.raises(ValueError, match="for 4 layers, but the decoder has 8"):
        method.cuts(8)
    with pytest.raises(ValueError, match="counts the tokens of all cameras together"):
        build("fitprune", budget="view")


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 12), seed=st.integers(0, 1000), data=st.data())
def test_fitprune_keeps_the_largest_products(n, seed, data):
    k = data.draw(st.integers(0, n))
    shown = evidence(size=n, seed=seed, keep_count=k)
    chosen = fitprune([n, n, n, 0]).select(shown)
    for row in range(2):
        cross, own = (shown.scores[name][row].tolist() for name in ("cross", "self"))
        order = sorted(range(n), key=lambda i: (-cross[i] * own[i], i))
        assert chosen[row].tolist() == sorted(order[:k])
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    moved = evidence(
        size=n,
        keep_count=k,
        scores={name: score[:, order] for name, score in shown.scores.items()},
    )
    again = order[fitprune([n, n, n, 0]).select(moved)].sort(dim=1).values
    assert torch.equal(again, chosen)


def test_fitprune_with_ties_missing_cameras_and_nan():
    method = fitprune([12, 12, 12, 4])
    same = {"cross": torch.ones(1, 12), "self": torch.ones(1, 12)}
    tied = evidence(1, keep_count=3, scores=same)
    assert method.select(tied).tolist() == [[0, 1, 2]]
    valid = torch.arange(12)[None] >= 6
    shown = evidence(1, keep_count=3, scores=same, valid=valid)
    assert method.select(shown).tolist() == [[6, 7, 8]]
    broken = {"cross": torch.full((1, 12), float("nan")), "self": torch.ones(1, 12)}
    with pytest.raises(ValueError, match="NaN"):
        method.select(evidence(1, keep_count=3, scores=broken))
    with pytest.raises(ValueError, match="needs the self score"):
        method.select(evidence(1, keep_count=3, scores={"cross": torch.ones(1, 12)}))
    with pytest.raises(ValueError, match="keep_count"):
        method.select(evidence(1))


@pytest.mark.parametrize("name", ["efficientvla", "fitprune", "vtw", "fixed"])
def test_selection_compiles_into_one_graph(name):
    method = {
        "efficientvla": build("efficientvla", keep=6),
        "fitprune": fitprune([12, 12, 9, 5]),
        "vtw": build("vtw", layer=2),
        "fixed": build("fixed", indices=[3, 1]),
    }[name]
    shown = evidence(keep_count=6 if name == "efficientvla" else 5)

    def select(features, semantic, cross, own):
        seen = Evidence(
            features, semantic, None, (12,), 2, None, None, {"cross": cross, "self": own}
        )
        return method.select(dataclasses.replace(seen, keep_count=shown.keep_count))

    compiled = torch.compile(select, fullgraph=True, backend="aot_eager")
    inputs = (shown.features, shown.semantic, shown.scores["cross"], shown.scores["self"])
    assert torch.equal(compiled(*inputs), method.select(shown))


# ---------------------------------------------------------------------- VTW
def test_vtw_leaves_nothing_from_the_layer_that_its_recipe_says():
    method = build("vtw", recipe=recipe("vtw", layer=2))
    assert method.cuts(4) == (2,)
    assert method.schedule((6, 6), 4) == (0,) and method.kept((12,)) == 0
    kept = method.select(evidence())
    assert kept.shape == (2, 0) and kept.dtype == torch.int64
    by_hand = build("vtw", layer=3)
    assert by_hand.cuts(4) == (3,) and not by_hand.wants_recipe
    by_hand.check(None, 4)
    with pytest.raises(ValueError, match="the decoder has 3 layers; use at most 2"):
        by_hand.cuts(3)
    with pytest.raises(ValueError, match="or a recipe, not both"):
        build("vtw", layer=3, recipe=recipe("vtw"))


# ---------------------------------------------------------------------- Fixed
def test_fixed_keeps_what_it_is_told():
    method = build("fixed", indices=[5, 1, 9])
    assert method.kept((6, 6)) == 3 and method.schedule((6, 6), 8) == (3,)
    assert method.select(evidence()).tolist() == [[1, 5, 9]] * 2
    rows = build("fixed", indices=[[5, 1], [2, 0]], keep=2)
    assert rows.select(evidence()).tolist() == [[1, 5], [0, 2]]
    assert build("fixed", indices=[]).select(evidence()).shape == (2, 0)
    with pytest.raises(ValueError, match="2 sets, but this batch has 3 rows"):
        rows.select(evidence(3))
    with pytest.raises(ValueError, match="token 12, but the input has 12 visual tokens: 0 to 11"):
        build("fixed", indices=[12]).kept((6, 6))
    with pytest.raises(ValueError, match="needs `indices`"):
        build("fixed").kept((12,))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"indices": [1, -2]}, "indices=-2"),
        ({"indices": [1, 1]}, "a token twice"),
        ({"indices": [[1], [1, 2]]}, r"different sizes \[1, 2\]"),
        ({"indices": "123"}, "sequence of token numbers"),
        ({"indices": [1, 2], "keep": 0.25}, "name 2 tokens"),
        ({"indices": [1, 2], "keep": 1}, "name 2 tokens"),
    ],
)
def test_bad_indices_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build("fixed", **options)
