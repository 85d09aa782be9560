"""Each method asks for what it says, chooses as it says, and keeps to its budget."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_pruner.methods import Evidence, Method, build
from vla_pruner.pruning.selection import combine_then_filter, top_k

NAMES = ["none", "random", "fastv", "vla-pruner", "vla-pruner-release"]
PRUNING = NAMES[1:]


def evidence(batch=2, views=(12, 8), dim=6, seed=0, **changes) -> Evidence:
    generator = torch.Generator().manual_seed(seed)
    size = sum(views)
    made = Evidence(
        features=torch.randn(batch, size, dim, generator=generator),
        semantic=torch.rand(batch, size, generator=generator),
        forecast=torch.rand(batch, size, generator=generator),
        views=views,
        layer=3,
        seeds=torch.arange(batch),
    )
    return dataclasses.replace(made, **changes)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    keep=st.one_of(st.floats(0.01, 1.0), st.integers(1, 4)),
    budget=st.sampled_from(["global", "view"]),
    views=st.lists(st.integers(4, 12), min_size=1, max_size=3).map(tuple),
    batch=st.integers(1, 3),
)
def test_what_stays_is_ascending_in_range_and_within_the_budget(name, keep, budget, views, batch):
    method = build(name, keep=keep, budget=budget)
    kept = method.select(evidence(batch, views))
    assert kept.dtype == torch.int64
    assert kept.shape == (batch, method.kept(views))
    assert kept.ge(0).all() and kept.lt(sum(views)).all()
    assert kept.diff(dim=1).gt(0).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_budget_per_view_keeps_the_same_in_each(name):
    method = build(name, keep=0.5, budget="view")
    kept = method.select(evidence(views=(12, 8)))
    per_view = (12, 8) if name == "none" else (6, 4)
    for row in kept:
        assert (int((row < 12).sum()), int((row >= 12).sum())) == per_view


@pytest.mark.parametrize("name", NAMES)
def test_keeping_everything_keeps_everything(name):
    for budget in ("global", "view"):
        kept = build(name, keep=1.0, budget=budget).select(evidence())
        assert kept.tolist() == [list(range(20))] * 2


@pytest.mark.parametrize("name", PRUNING)
def test_tokens_of_a_missing_camera_are_candidates_of_nothing(name):
    valid = torch.ones(2, 20, dtype=torch.bool)
    valid[1, 12:] = False
    kept = build(name, keep=6).select(evidence(valid=valid))
    assert kept.shape == (2, 6)
    assert kept[1].lt(12).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_row_of_the_batch_does_not_depend_on_its_neighbours(name):
    method, together = build(name, keep=0.4), evidence(batch=3)
    kept = method.select(together)
    for b in range(3):
        alone = dataclasses.replace(
            together,
            features=together.features[b : b + 1],
            semantic=together.semantic[b : b + 1],
            forecast=together.forecast[b : b + 1],
            seeds=together.seeds[b : b + 1],
        )
        assert torch.equal(method.select(alone), kept[b : b + 1])


def test_none_cuts_nowhere():
    method = build("none", keep=0.25)
    assert method.cuts(8) == ()
    assert method.kept((12, 8)) == 20
    assert (method.semantic_rows, method.history, method.warmup) == (None, None, 0)


def test_fastv_keeps_what_the_last_query_looks_at():
    method, given_evidence = build("fastv", keep=5, layer=2), evidence(forecast=None)
    assert (method.semantic_rows, method.history, method.warmup) == ("last", None, 0)
    assert method.cuts(8) == (2,)
    assert method.semantic_layer(2) == 1
    assert torch.equal(method.select(given_evidence), top_k(given_evidence.semantic, 5))


def test_vla_pruner_is_algorithm_2_with_the_papers_defaults():
    method, given_evidence = build("vla-pruner"), evidence()
    assert (method.keep, method.layer, method.budget) == (0.25, 3, "global")
    assert (method.semantic_rows, method.warmup, method.cuts(32)) == ("all", 3, (3,))
    assert method.semantic_layer(3) == 2
    spec = method.history
    assert (spec.kind, spec.window, spec.gamma, spec.newest_heaviest) == ("window", 3, 0.8, True)
    assert spec.resolve_layers(32) == tuple(range(16, 32))
    expected = combine_then_filter(
        given_evidence.features, given_evidence.semantic, given_evidence.forecast, 5
    )
    assert torch.equal(method.select(given_evidence), expected)


def test_vla_pruners_options_reach_their_places():
    method = build(
        "vla-pruner",
        window=5,
        gamma=0.6,
        smoothing="ema",
        alpha=0.3,
        action_layers=[4, 6],
        first="nearest",
        score_layer=1,
    )
    spec = method.history
    assert (spec.kind, spec.window, spec.gamma, spec.alpha) == ("ema", 5, 0.6, 0.3)
    assert spec.resolve_layers(8) == (4, 6)
    assert method.semantic_layer(3) == 1
    assert method.warmup == 5
    given_evidence = evidence()
    expected = combine_then_filter(
        given_evidence.features,
        given_evidence.semantic,
        given_evidence.forecast,
        5,
        first="nearest",
    )
    assert torch.equal(method.select(given_evidence), expected)


def test_the_release_differs_where_it_says():
    method, given_evidence = build("vla-pruner-release"), evidence()
    spec = method.history
    assert (spec.newest_heaviest, spec.window, spec.gamma) == (False, 3, 0.8)
    assert spec.resolve_layers(32) == (15,)
    assert spec.resolve_layers(8) == (3,)
    assert method.semantic_rows == "all"
    assert build("vla-pruner-release", semantic="last").semantic_rows == "last"
    explicit = build("vla-pruner-release", action_layer=15).history
    assert explicit.resolve_layers(40) == (15,)
    with pytest.raises(ValueError, match="action layer 15 does not exist"):
        explicit.resolve_layers(8)
    expected = combine_then_filter(
        given_evidence.features,
        given_evidence.semantic,
        given_evidence.forecast,
        5,
        first="nearest",
    )
    assert torch.equal(method.select(given_evidence), expected)


@pytest.mark.parametrize(("keep", "k"), [(0.5, 128), (0.25, 64), (0.125, 32), (0.1, 26)])
def test_the_release_counts_its_budget_from_what_is_pruned(keep, k):
    assert build("vla-pruner-release", keep=keep).kept((256,)) == k == round(256 * (1 - (1 - keep)))


def test_random_draws_follow_the_seed_alone():
    one = evidence(batch=2, views=(64,), seeds=torch.tensor([7, 8]))
    method = build("random", keep=0.5)
    kept = method.select(one)
    torch.manual_seed(123)
    assert torch.equal(method.select(one), kept)
    assert not torch.equal(kept[0], kept[1])
    swapped = dataclasses.replace(one, seeds=torch.tensor([8, 7]))
    assert torch.equal(method.select(swapped), kept.flip(0))
    assert not torch.equal(build("random", keep=0.5, seed=1).select(one), kept)


def test_random_draws_are_fair():
    steps = torch.arange(4000)
    drawn = build("random", keep=4).select(
        evidence(batch=4000, views=(16,), dim=1, semantic=None, forecast=None, seeds=steps)
    )
    share = torch.bincount(drawn.flatten(), minlength=16) / 4000
    assert share.sub(0.25).abs().max() < 0.035  # Five standard deviations.
    together = (drawn == 0).any(1) & (drawn == 1).any(1)
    assert abs(float(together.float().mean()) - 4 / 16 * 3 / 15) < 0.02


@pytest.mark.parametrize("name", NAMES)
def test_selection_compiles_into_one_graph(name):
    method = build(name, keep=0.4)

    def select(features, semantic, forecast, seeds):
        return method.select(Evidence(features, semantic, forecast, (12, 8), 3, None, seeds))

    given_evidence = evidence()
    inputs = (
        given_evidence.features,
        given_evidence.semantic,
        given_evidence.forecast,
        given_evidence.seeds,
    )
    compiled = torch.compile(select, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), method.select(given_evidence))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"semantic": None}, "needs the semantic score"),
        ({"forecast": None}, "needs the forecast score"),
        ({"semantic": torch.rand(2, 19)}, r"semantic must be \[B, M\] = \(2, 20\)"),
        ({"valid": torch.ones(20).bool()}, r"valid must be \[B, M\]"),
        ({"views": (12, 9)}, "sum to 21 = M visual tokens; got"),
        ({"features": torch.rand(20, 6)}, r"features must be \[B, M, D\]"),
    ],
)
def test_evidence_that_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        build("vla-pruner").select(dataclasses.replace(evidence(), **changes))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("fastv", {"keep": 0.0}, "keep=0.0"),
        ("fastv", {"keep": True}, "keep=True"),
        ("fastv", {"layer": 0}, "`layer=0` must be an integer of at least 1"),
        ("fastv", {"layer": "3"}, "layer='3'"),
        ("fastv", {"budget": "views"}, "'global', 'view'"),
        ("random", {"layer": -1}, "layer=-1"),
        ("random", {"seed": -1}, "seed=-1"),
        ("vla-pruner", {"window": 0}, "window=0"),
        ("vla-pruner", {"gamma": 2.0}, "gamma=2.0"),
        ("vla-pruner", {"alpha": 1.5}, "alpha=1.5"),
        ("vla-pruner", {"smoothing": "mean"}, "'window', 'ema'"),
        ("vla-pruner", {"action_layers": "first"}, "latter-half"),
        ("vla-pruner", {"first": "farthest"}, "second-nearest"),
        ("vla-pruner", {"score_layer": 3}, "use at most 2"),
        ("vla-pruner-release", {"semantic": "all"}, "'prefill', 'last'"),
        ("vla-pruner-release", {"action_layer": -2}, "action_layer=-2"),
    ],
)
def test_bad_options_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        build(name, **options)


@pytest.mark.parametrize("name", PRUNING)
def test_a_layer_beyond_the_decoder_is_refused(name):
    assert build(name, layer=7).cuts(8) == (7,)
    with pytest.raises(ValueError, match="`layer=8` cuts nothing: the decoder has 8 layers"):
        build(name, layer=8).cuts(8)


def test_random_may_cut_before_the_first_layer():
    assert build("random", layer=0).cuts(8) == (0,)


@pytest.mark.parametrize("name", NAMES)
def test_every_method_describes_itself(name):
    method = build(name)
    assert isinstance(method, Method)
    assert method.name == name
    assert 10 < len(method.summary) < 70
    assert dataclasses.replace(method, keep=0.5).keep == 0.5
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.keep = 0.1
