"""CDPruner, SCOPE and DART hand the right things to the right search."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_pruner.baselines.determinant import most_determinant, text_likeness
from vla_pruner.baselines.facility import most_covering
from vla_pruner.methods import Evidence, build
from vla_pruner.methods.holov import likeness

NAMES = ("cdpruner", "scope", "dart")


def evidence(n=40, views=None, seed=0, batch=2, **changes) -> Evidence:
    generator = torch.Generator().manual_seed(seed)
    made = Evidence(
        torch.randn(batch, n, 16, generator=generator),
        torch.rand(batch, n, generator=generator),
        None,
        views or (n,),
        3,
        text=torch.randn(batch, 5, 16, generator=generator),
        text_valid=torch.arange(5).lt(torch.tensor([[5], [3], [4]])[:batch]),
    )
    return dataclasses.replace(made, **changes)


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    keep=st.one_of(st.floats(0.02, 1.0), st.integers(1, 6)),
    budget=st.sampled_from(["global", "view"]),
    views=st.lists(st.integers(6, 16), min_size=1, max_size=3).map(tuple),
    seed=st.integers(0, 10**6),
)
def test_the_selection_is_a_set_of_the_planned_size(name, keep, budget, views, seed):
    method = build(name, keep=keep, budget=budget)
    shown = evidence(sum(views), views, seed)
    kept = method.select(shown)
    assert kept.shape == (2, method.kept(views)) and kept.dtype == torch.int64
    assert kept.ge(0).all() and kept.lt(sum(views)).all() and kept.diff(dim=1).gt(0).all()
    assert torch.equal(method.select(shown), kept)
    for row in range(2):
        alone = dataclasses.replace(
            shown,
            features=shown.features[row : row + 1],
            semantic=shown.semantic[row : row + 1],
            text=shown.text[row : row + 1],
            text_valid=shown.text_valid[row : row + 1],
        )
        assert torch.equal(method.select(alone)[0], kept[row])


@pytest.mark.parametrize("name", NAMES)
def test_tokens_of_a_missing_camera_are_candidates_of_nothing(name):
    valid = torch.ones(2, 40, dtype=torch.bool)
    valid[1, 15:] = False
    kept = build(name, keep=8, budget="global").select(evidence(valid=valid))
    assert kept.shape == (2, 8) and kept.diff(dim=1).gt(0).all()
    assert kept[1].lt(15).all() and kept[0].ge(15).any()


@pytest.mark.parametrize("name", NAMES)
def test_selection_compiles_into_one_graph(name):
    method = build(name, keep=0.4)

    def select(features, semantic, text, there):
        return method.select(
            Evidence(features, semantic, None, (25, 15), 3, text=text, text_valid=there)
        )

    shown = evidence()
    inputs = (shown.features, shown.semantic, shown.text, shown.text_valid)
    compiled = torch.compile(select, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), select(*inputs))


# -- CDPruner --------------------------------------------------------------------------------------


def test_cdpruner_weighs_the_determinant_by_what_the_words_are_like():
    shown = evidence()
    method = build("cdpruner", keep=6)
    assert (method.cuts(8), method.needs, method.budget) == ((0,), ("text",), "view")
    for pool in ("mean", "max"):
        q = text_likeness(shown.features, shown.text, shown.text_valid, pool=pool)
        for sign in (1, -1):
            r = sign * q
            r = r - r.amin(1, keepdim=True) + 1e-6
            r = r / (r.amax(1, keepdim=True) - r.amin(1, keepdim=True))
            expected = most_determinant(shown.features, 6, quality=r)
            chosen = build("cdpruner", keep=6, pool=pool, negate=sign < 0).select(shown)
            assert torch.equal(chosen, expected)


def test_cdpruner_without_relevance_is_the_determinant_of_the_cosines():
    shown, expected = evidence(), most_determinant(evidence().features, 6)
    plain = build("cdpruner", keep=6, relevance="nothing")
    assert plain.needs == () and plain.scores(0) == {}
    assert torch.equal(plain.select(dataclasses.replace(shown, text=None)), expected)
    assert torch.equal(build("cdpruner", keep=6, weight=0.0).select(shown), expected)


def test_cdpruner_with_all_weight_on_relevance_ranks_by_it():
    shown = evidence()
    q = text_likeness(shown.features, shown.text, shown.text_valid)
    chosen = build("cdpruner", keep=1, weight=0.9).select(shown)
    assert torch.equal(chosen[:, 0], q.argmax(dim=1))


def test_cdpruner_takes_relevance_from_the_first_layer():
    method = build("cdpruner", keep=6, relevance="logits", layer=2)
    spec = method.scores(2)["relevance"]
    assert (spec.kind, spec.rows, spec.layer) == ("logits", "text", 2)
    shown = evidence(scores={"relevance": evidence().semantic - 0.5})
    quality = method.quality(shown)
    assert float(quality.amax()) == pytest.approx(1, abs=1e-4) and float(quality.amin()) > 0
    assert torch.equal(method.select(shown), most_determinant(shown.features, 6, quality=quality))


def test_cdpruner_normalises_each_row_and_each_view_by_itself():
    shown = evidence(views=(25, 15))
    louder = dataclasses.replace(shown, text=shown.text * torch.tensor([[[1.0]], [[50.0]]]))
    method = build("cdpruner", keep=5)
    assert torch.equal(method.select(louder), method.select(shown))
    second = dataclasses.replace(shown.within(slice(25, 40)))
    assert torch.equal(method.select(shown)[:, 5:] - 25, method.choose(second, 5))


# -- SCOPE -----------------------------------------------------------------------------------------


def test_scope_covers_with_what_is_attended():
    shown, method = evidence(), build("scope", keep=6)
    assert (method.cuts(8), method.semantic_rows, method.positions) == ((3,), "all", "keep")
    assert torch.equal(
        method.select(shown), most_covering(shown.features, 6, weight=shown.semantic)
    )
    squared = build("scope", keep=6, alpha=2.0).select(shown)
    assert torch.equal(squared, most_covering(shown.features, 6, weight=shown.semantic**2))
    alone = build("scope", keep=6, alpha=0.0).select(shown)
    assert torch.equal(alone, most_covering(shown.features, 6))
    assert build("scope", attention="last").semantic_rows == "last"


def test_scope_without_attention_may_cut_before_the_decoder():
    method = build("scope", keep=6, attention="features", layer=0)
    assert (method.cuts(8), method.scores(0)) == ((0,), {})
    shown = evidence(semantic=None)
    expected = most_covering(shown.features, 6, weight=likeness(shown.features))
    assert torch.equal(method.select(shown), expected)


# -- DART ------------------------------------------------------------------------------------------


def literally_dart(features, text, k, pivots, text_pivots):
    """One row, written out."""
    n = len(features)
    length = [float(v.abs().sum()) for v in features]
    first = sorted(range(n), key=lambda i: (-length[i], i))[: min(pivots, k)]
    said = sorted(range(len(text)), key=lambda j: (-float(text[j].abs().sum()), j))[:text_pivots]
    compared = [features[i] for i in first] + [text[j] for j in said]
    nearest = [
        max(float(torch.cosine_similarity(v, other, dim=0)) for other in compared) for v in features
    ]
    others = sorted((i for i in range(n) if i not in first), key=lambda i: (nearest[i], i))
    return sorted(first + others[: k - len(first)])


@pytest.mark.parametrize(("pivots", "text_pivots", "k"), [(4, 4, 10), (1, 0, 7), (6, 2, 3)])
def test_dart_keeps_pivots_and_what_repeats_them_least(pivots, text_pivots, k):
    shown = evidence()
    method = build("dart", keep=k, pivots=pivots, text_pivots=text_pivots)
    kept = method.select(shown)
    for row, words in enumerate((5, 3)):
        expected = literally_dart(
            shown.features[row], shown.text[row, :words], k, pivots, text_pivots
        )
        assert kept[row].tolist() == expected
    assert method.needs == (("text",) if text_pivots else ())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cdpruner", {"relevance": "clip"}, "'text', 'logits', 'nothing'"),
        ("cdpruner", {"pool": "sum"}, "'mean', 'max'"),
        ("cdpruner", {"weight": 1.0}, "weight=1.0"),
        ("cdpruner", {"weight": float("nan")}, "weight=nan"),
        ("cdpruner", {"negate": "yes"}, "negate='yes'"),
        ("cdpruner", {"positions": "new"}, "'keep', 'compact'"),
        ("scope", {"layer": 0}, 'or `attention="features"`'),
        ("scope", {"attention": "cls"}, "'received', 'last', 'features'"),
        ("scope", {"alpha": -1.0}, "alpha=-1.0"),
        ("scope", {"alpha": float("nan")}, "alpha=nan"),
        ("scope", {"positions": "new"}, "'keep', 'compact'"),
        ("dart", {"pivots": 0}, "pivots=0"),
        ("dart", {"text_pivots": -1}, "text_pivots=-1"),
        ("dart", {"positions": "new"}, "'keep', 'compact'"),
    ],
)
def test_bad_options_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        build(name, **options)
