"""DivPrune and HoloV hand the right things to the right search."""

import dataclasses

import pytest
import torch

from vla_pruner.baselines.diversity import crop_quotas, most_diverse
from vla_pruner.methods import Choice, Evidence, build
from vla_pruner.methods.holov import likeness


def evidence(n=40, **changes) -> Evidence:
    generator = torch.Generator().manual_seed(0)
    made = Evidence(
        torch.randn(2, n, 5, generator=generator),
        torch.rand(2, n, generator=generator),
        None,
        (n,),
        3,
    )
    return dataclasses.replace(made, **changes)


def test_divprune_asks_for_nothing_and_takes_the_most_diverse():
    method = build("divprune", keep=0.25)
    assert (method.cuts(8), method.scores(0), method.needs) == ((0,), {}, ())
    assert (method.positions, build("divprune", positions="keep").positions) == ("compact", "keep")
    assert build("divprune", layer=2).cuts(8) == (2,)
    kept = method.select(evidence(semantic=None))
    assert torch.equal(kept, most_diverse(evidence().features, 10))
    other = build("divprune", keep=0.25, first="second-nearest").select(evidence())
    assert torch.equal(other, most_diverse(evidence().features, 10, first="second-nearest"))
    assert not torch.equal(kept, other)
    assert "CC BY-NC" in method.licence


def test_divprune_searches_each_camera_under_a_budget_per_view():
    kept = build("divprune", keep=5, budget="view").select(evidence(views=(25, 15)))
    features = evidence().features
    assert torch.equal(kept[:, :5], most_diverse(features[:, :25], 5))
    assert torch.equal(kept[:, 5:], 25 + most_diverse(features[:, 25:], 5))


@pytest.mark.parametrize(("attention", "rows"), [("received", "all"), ("last", "last")])
def test_holov_shares_by_attention(attention, rows):
    method = build("holov", attention=attention, crops=5, beta=0.5)
    assert (method.semantic_rows, method.cuts(8), method.scores(3)["semantic"].layer) == (
        rows,
        (3,),
        2,
    )
    given_evidence = evidence()
    assert torch.equal(
        method.select(given_evidence),
        crop_quotas(given_evidence.semantic, given_evidence.features, 10, crops=5, beta=0.5),
    )


def test_holov_without_attention_may_cut_before_the_decoder():
    method = build("holov", attention="features", layer=0, positions="compact")
    assert (method.scores(0), method.cuts(8), method.positions) == ({}, (0,), "compact")
    features = evidence().features
    expected = crop_quotas(likeness(features), features, 10)
    assert torch.equal(method.select(evidence(semantic=None)), expected)


@pytest.mark.parametrize(
    "method",
    [
        build("divprune", keep=6),
        build("holov", keep=6),
        build("holov", keep=6, attention="features"),
        build("vla-adp", keep=6, budget="global"),
        build("sparsevlm-release", keep=6),
        build("sparsevlm", keep=6, count="final"),
        build("pact", keep=6),
    ],
    ids=lambda method: method.name,
)
def test_tokens_of_a_missing_camera_are_candidates_of_nothing(method):
    valid = torch.ones(2, 40, dtype=torch.bool)
    valid[1, 15:] = False
    shown = evidence(forecast=evidence().semantic.flip(1), valid=valid, keep_count=6)
    shown = dataclasses.replace(shown, hidden=shown.features)
    choice = method.select(shown)
    kept = choice.kept if isinstance(choice, Choice) else choice
    assert kept.shape == (2, 6) and kept.diff(dim=1).gt(0).all()
    assert kept[1].lt(15).all() and kept[0].ge(15).any()


@pytest.mark.parametrize("name", ["divprune", "holov"])
def test_selection_compiles_into_one_graph(name):
    method = build(name, keep=0.4)

    def select(features, semantic):
        return method.select(Evidence(features, semantic, None, (25, 15), 3))

    inputs = (evidence().features, evidence().semantic)
    compiled = torch.compile(select, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), select(*inputs))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("divprune", {"first": "farthest"}, "'nearest', 'second-nearest'"),
        ("divprune", {"positions": "new"}, "'keep', 'compact'"),
        ("divprune", {"layer": -1}, "layer=-1"),
        ("holov", {"attention": "cls"}, "'received', 'last', 'features'"),
        ("holov", {"layer": 0}, 'or `attention="features"`'),
        ("holov", {"crops": 0}, "crops=0"),
        ("holov", {"beta": -0.1}, "beta=-0.1"),
        ("holov", {"beta": float("nan")}, "beta=nan"),
        ("holov", {"positions": "new"}, "'keep', 'compact'"),
    ],
)
def test_bad_options_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        build(name, **options)
