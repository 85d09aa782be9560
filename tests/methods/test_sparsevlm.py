"""SparseVLM cuts where, and keeps as many as, its budget says; its raters score."""

import dataclasses
import math
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from test_clustering import slow_recycle
from test_query_weights import slow_raters

import vla_pruner as vp
from checks import near
from vla_pruner.baselines.clustering import recycled_counts
from vla_pruner.baselines.query_weights import query_weights
from vla_pruner.methods import Choice, Evidence, ScoreSpec, build
from vla_pruner.pruning.hashed_uniform import hashed_uniform

WEIGHTS = {8: (1, 2, 4), 32: (4, 9, 16)}


def average(counts, visual, layers, cuts):
    """Visual tokens that each layer computes, counted layer by layer."""
    left = [visual, *counts]
    return [left[sum(cut <= layer for cut in cuts)] for layer in range(layers)]


# ---------------------------------------------------------------------- budgets
def test_the_published_budget_is_what_its_layers_really_compute():
    """What the source calls 192 of 576 tokens is 3 full layers, 4 of 300, 9 of 200, 16 of 110."""
    per_layer = [576] * 3 + [300] * 4 + [200] * 9 + [110] * 16
    method = build("sparsevlm", keep=sum(per_layer) / 32 / 576)
    assert method.schedule((576,), 32) == (300, 200, 110)
    assert sum(per_layer) / 32 == 202.75
    with pytest.raises(ValueError, match=r"at least 0\.095 is needed"):
        build("sparsevlm", keep=0.09).schedule((576,), 32)
    assert build("sparsevlm", keep=17, count="final").schedule((576,), 32) == (66, 30, 17)


@given(
    keep=st.floats(0.01, 1.0),
    views=st.lists(st.integers(4, 300), min_size=1, max_size=3).map(tuple),
    layers=st.integers(4, 40),
    count=st.sampled_from(["average", "behind", "final"]),
)
def test_any_image_and_any_budget(keep, views, layers, count):
    method, visual = build("sparsevlm", keep=keep, count=count), sum(views)
    cuts = method.cuts(layers)
    least = (cuts[0] * visual + layers - cuts[0]) / layers / visual
    if count == "average" and keep < least:
        assume(keep * visual * layers + 1e-6 < cuts[0] * visual + layers - cuts[0])
        with pytest.raises(
            ValueError, match=f"the {cuts[0]} before the first cut see all {visual}"
        ):
            method.schedule(views, layers)
        return
    assume(count != "behind" or keep * visual > 1.01)
    counts = method.schedule(views, layers)
    assert all(1 <= b <= a for a, b in pairwise((visual, *counts)))
    per_layer = average(counts, visual, layers, cuts)
    if count == "final":
        assert counts[-1] == method.kept(views) == max(1, round(keep * visual))
        return
    counted = per_layer if count == "average" else per_layer[cuts[0] :]
    budget = Fraction(keep) * visual * len(counted)
    assert sum(counted) <= budget + Fraction(1, 10**6)
    spare = math.floor(budget) - sum(counted)
    spans = [b - a for a, b in pairwise((*cuts, layers))]
    for span, (before, now) in zip(spans, pairwise((visual, *counts)), strict=True):
        assert now == before or spare < span


def test_a_number_of_tokens_and_a_fraction_agree():
    for count in ("average", "behind", "final"):
        one, other = (build("sparsevlm", keep=k, count=count) for k in (64, 0.25))
        assert one.schedule((256,), 32) == other.schedule((256,), 32)
    with pytest.raises(ValueError, match="asks for more than the 100 visual tokens"):
        build("sparsevlm", keep=101).schedule((100,), 32)


def test_behind_costs_what_one_cut_costs():
    for keep in (0.5, 0.25, 0.125):
        counts = build("sparsevlm", keep=keep, count="behind").schedule((256,), 32)
        one_cut = build("fastv", keep=keep, layer=3).schedule((256,), 32)[0] * 29
        assert one_cut - 4 < sum(w * n for w, n in zip(WEIGHTS[32], counts, strict=True)) <= one_cut


def test_half_a_token_is_not_spent():
    """12.5 tokens in each of 7 layers are 87, not 88."""
    for keep, visual, layers in [(0.125, 100, 8), (0.3, 15, 8), (0.17, 33, 12), (0.5, 7, 5)]:
        method = build("sparsevlm", keep=keep, count="behind")
        cuts = method.cuts(layers)
        left = average(method.schedule((visual,), layers), visual, layers, cuts)[cuts[0] :]
        assert sum(left) <= Fraction(str(keep)) * visual * len(left) < sum(left) + layers


def test_the_smallest_average_is_the_one_on_the_page():
    """c_1 / T + (T - c_1) / (T M); with a token less it is refused."""
    for visual, layers, first in [(100, 8, 1), (576, 32, 3), (256, 32, 3)]:
        least = Fraction(first, layers) + Fraction(layers - first, layers * visual)
        method = build("sparsevlm", keep=float(least))
        assert method.schedule((visual,), layers) == (1, 1, 1)
        with pytest.raises(ValueError, match="at least"):
            build("sparsevlm", keep=float(least) - 1 / layers / visual).schedule((visual,), layers)
    with pytest.raises(ValueError, match=r"at least 0\.134"):
        build("sparsevlm", keep=0.125).schedule((100,), 8)


def test_tokens_left_in_the_end_depend_on_the_depth():
    with pytest.raises(ValueError, match="ask `schedule`"):
        build("sparsevlm").kept((256,))


def test_keeping_everything():
    for count in ("average", "behind", "final"):
        assert build("sparsevlm", keep=1.0, count=count).schedule((30, 12), 8) == (42, 42, 42)


def test_cuts():
    assert build("sparsevlm").cuts(32) == (3, 7, 16)
    assert build("sparsevlm", layers=[1, 4, 5]).cuts(6) == (1, 4, 5)
    with pytest.raises(ValueError, match="before layer 5, but the decoder has 5 layers"):
        build("sparsevlm", layers=(1, 4, 5)).cuts(5)


# ---------------------------------------------------------------------- what it asks for, chooses
def evidence(m=40, k=20, **changes) -> Evidence:
    generator = torch.Generator().manual_seed(3)
    semantic = torch.rand(2, m, generator=generator)
    made = Evidence(
        features=torch.randn(2, m, 4, generator=generator),
        semantic=semantic,
        forecast=None,
        views=(m,),
        layer=3,
        hidden=torch.randn(2, m, 4, generator=generator),
        tokens=torch.arange(m).expand(2, -1),
        keep_count=k,
    )
    return dataclasses.replace(made, **changes)


def test_raters_vote_in_the_layer_before_each_cut():
    method = build("sparsevlm")
    for cut in (3, 7, 16):
        assert method.scores(cut) == {"semantic": ScoreSpec(layer=cut - 1, rows="weighted")}
    assert method.needs == ("text",)
    visual, text = torch.randn(2, 9, 4), torch.randn(2, 5, 4)
    valid = torch.ones(2, 5, dtype=torch.bool)
    assert torch.equal(
        method.query_weights(visual, text, valid), query_weights(visual, text, valid)
    )


def test_recycled_tokens_are_part_of_the_budget():
    choice = build("sparsevlm").select(evidence())
    assert isinstance(choice, Choice) and choice.kept.shape == (2, 20)
    assert choice.kept.diff(dim=1).gt(0).all()
    stay, _, clusters = recycled_counts(40, 20)
    own = torch.nn.functional.one_hot(choice.kept, 40).float()
    untouched = (choice.merge == own).all(dim=2).sum(dim=1)
    assert (untouched >= stay).all() and clusters >= 1
    best = evidence().semantic.topk(stay).indices
    for row in range(2):
        assert set(best[row].tolist()) <= set(choice.kept[row].tolist())


def test_without_recycling_the_best_stay():
    kept = build("sparsevlm", recycle=0.0).select(evidence())
    assert torch.equal(kept, evidence().semantic.topk(20).indices.sort(dim=1).values)


def test_each_camera_keeps_and_recycles_its_own():
    choice = build("sparsevlm", budget="view", group=2).select(evidence(views=(28, 12)))
    assert [(int((row < 28).sum()), int((row >= 28).sum())) for row in choice.kept] == [(14, 6)] * 2
    for row in range(2):
        first = choice.kept[row] < 28
        assert not choice.merge[row, first, 28:].any() and not choice.merge[row, ~first, :28].any()
    torch.testing.assert_close(choice.merge.sum(dim=2), torch.ones(2, 20))


def test_noise_belongs_to_a_token_not_to_its_place():
    """A token is told apart from its equals in the same way at every cut and in every row."""
    method, tokens = build("sparsevlm"), torch.tensor([[3, 5, 9], [5, 9, 11]])
    features = torch.zeros(2, 3, 1)
    noise = method._noise(evidence(3, 2, features=features, tokens=tokens))
    assert torch.equal(noise[0, 1:], noise[1, :2]) and noise.max() <= 1e-6
    other = build("sparsevlm", seed=1)._noise(evidence(3, 2, features=features, tokens=tokens))
    assert not torch.equal(noise, other)


def test_selection_compiles_into_one_graph():
    method = build("sparsevlm", group=2)

    def select(semantic, hidden, tokens):
        shown = Evidence(
            hidden, semantic, None, (40,), 3, hidden=hidden, tokens=tokens, keep_count=20
        )
        choice = method.select(shown)
        return choice.kept, choice.merge

    given_evidence = evidence()
    inputs = (given_evidence.semantic, given_evidence.hidden, given_evidence.tokens)
    compiled = torch.compile(select, fullgraph=True, backend="aot_eager")
    for one, other in zip(compiled(*inputs), select(*inputs), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 3}, "no option 'layer'; did you mean 'layers'"),
        ({"layers": (3, 7)}, "three layers, ascending"),
        ({"layers": (3, 7, 7)}, "three layers, ascending"),
        ({"layers": (0, 7, 8)}, "layers=0"),
        ({"count": "mean"}, "'average', 'behind', 'final'"),
        ({"recycle": 1.5}, "recycle=1.5"),
        ({"group": 0}, "group=0"),
        ({"positions": "new"}, "'keep', 'compact'"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build("sparsevlm", **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"semantic": None}, "the semantic score"),
        ({"keep_count": None}, "`keep_count`"),
        ({"hidden": None}, "recycles hidden states"),
    ],
)
def test_missing_evidence_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        build("sparsevlm").select(evidence(**changes))


def test_a_budget_that_the_first_layers_use_up_is_refused_at_the_first_call(decoders, embeds):
    adapter = vp.models.Decoder("model.layers", visual=slice(1, 21))
    with (
        vp.prune(decoders(), "sparsevlm", keep=0.15, adapter=adapter),
        pytest.raises(ValueError, match='or `count="behind"`'),
    ):
        decoders()(inputs_embeds=embeds())


# ---------------------------------------------------------------------- on a model
def slow_sparsevlm(model, embeds, counts, *, compact, share, group):
    """Logits of one sequence [30, 32], layer by layer; tokens 1..20 are visual. Cuts: 1, 2, 3."""
    visual, text = embeds[1:21].tolist(), embeds[21:].tolist()
    raters = slow_raters(visual, text, range(9), strict=True)
    noise = (1e-6 * hashed_uniform(torch.zeros(1).long(), torch.arange(20)))[0].tolist()
    left, x, kept, attention = list(range(20)), embeds[None], [], None
    for index, layer in enumerate(model.model.layers):
        if index in (1, 2, 3):
            rows = [1 + len(left) + j for j in raters]
            score = attention[:, rows, 1 : 1 + len(left)].mean(dim=(0, 1)).tolist()
            states = x[0, 1 : 1 + len(left)].tolist()
            own_noise = [noise[token] for token in left]
            stay, states = slow_recycle(
                score, states, counts[index - 1], own_noise, share=share, group=group
            )
            x = torch.cat([x[:, :1], torch.tensor([states]), x[:, 1 + len(left) :]], dim=1)
            left = [left[i] for i in stay]
            kept.append(left)
        places = [0, *(1 + token for token in left), *range(21, 30)]
        ids = torch.arange(len(places)) if compact else torch.tensor(places)
        n = len(places)
        mask = torch.full((1, 1, n, n), torch.finfo(torch.float32).min).triu(1)
        found = []
        hook = layer.self_attn.register_forward_hook(lambda m, a, out, f=found: f.append(out[1][0]))
        rotary = model.model.rotary_emb(x, ids[None])
        x = layer(x, attention_mask=mask, position_embeddings=rotary, position_ids=None)
        x, attention = x[0] if isinstance(x, tuple) else x, found[0]
        hook.remove()
    return kept, model.lm_head(model.model.norm(x))[0, -1]


@pytest.mark.parametrize("positions", ["compact", "keep"])
@pytest.mark.parametrize("recycling", [(0.3, 10), (0.8, 2)])
def test_a_whole_prefill_equals_the_slow_one(decoders, embeds, positions, recycling):
    share, group = recycling
    adapter = vp.models.Decoder("model.layers", visual=slice(1, 21))
    options = dict(keep=0.5, positions=positions, recycle=share, group=group)
    with vp.prune(decoders(), "sparsevlm", adapter=adapter, **options) as session:
        logits = decoders()(inputs_embeds=embeds()).logits[0, -1]
    kept = [stage.kept_mask[0].nonzero()[:, 0].tolist() for stage in session.last.stages]
    counts = [len(tokens) for tokens in kept]
    assert sum([20, *counts[:2]]) + 3 * counts[2] == 0.5 * 20 * 6
    left, expected = slow_sparsevlm(
        decoders("llama", "eager"),
        embeds()[0],
        counts,
        compact=positions == "compact",
        share=share,
        group=group,
    )
    assert kept == left
    near(logits, expected)


# ---------------------------------------------------------------------- the release's variant
def test_the_release_cuts_once_and_counts_from_what_is_pruned():
    method = build("sparsevlm-release", keep=0.1)
    assert (method.cuts(32), method.kept((256,))) == ((3,), round(256 * (1 - (1 - 0.1))))
    assert method.scores(3) == {"semantic": ScoreSpec(layer=2, rows="weighted")}
    assert torch.equal(
        build("sparsevlm-release", keep=20).select(evidence()),
        evidence().semantic.topk(20).indices.sort(dim=1).values,
    )
    with pytest.raises(ValueError, match="layer=0"):
        build("sparsevlm-release", layer=0)
    with pytest.raises(ValueError, match="needs the semantic score"):
        method.select(evidence(semantic=None))
