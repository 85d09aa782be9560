"""What a method gets for nothing: scores by default, schedules, shares of cameras, warm-up."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vla_pruner.methods import Evidence, Method, OneCut, ScoreSpec, StepContext, build
from vla_pruner.pruning.selection import top_k


@dataclass(frozen=True, kw_only=True)
class Twice(OneCut):
    """Cuts twice with nothing but `choose`."""

    name: ClassVar[str] = "twice"
    summary: ClassVar[str] = "two cuts, default selection"

    def cuts(self, num_layers: int) -> tuple[int, ...]:
        return (2, 4)

    def schedule(self, views: tuple[int, ...], num_layers: int) -> tuple[int, ...]:
        return (10, 4)

    def choose(self, evidence: Evidence, k: int) -> Tensor:
        return top_k(evidence.features[..., 0], k, valid=evidence.valid)


def evidence(views, **changes) -> Evidence:
    features = torch.randn(2, sum(views), 3, generator=torch.Generator().manual_seed(1))
    return replace(Evidence(features, None, None, views, layer=2), **changes)


def test_scores_of_a_method_that_names_its_rows():
    assert build("fastv", layer=3).scores(3) == {"semantic": ScoreSpec(layer=2, rows="last")}
    assert build("vla-pruner").scores(5) == {"semantic": ScoreSpec(layer=4, rows="all")}
    assert build("vla-pruner", score_layer=1).scores(3)["semantic"].layer == 1
    assert build("random").scores(3) == {}


def test_defaults():
    method = build("fastv", keep=0.25)
    assert method.schedule((12, 8), 32) == (5,)
    assert (method.positions, method.needs, method.skipped(32)) == ("keep", (), ())
    assert not method.adaptive
    warming = [build("vla-pruner", window=2).full_step(StepContext(step=s)) for s in range(4)]
    assert warming == [True, True, False, False]
    with pytest.raises(NotImplementedError, match="define `query_weights`"):
        method.query_weights(torch.zeros(1, 4, 2), torch.zeros(1, 3, 2), torch.ones(1, 3).bool())


@settings(max_examples=100, deadline=None)
@given(
    views=st.lists(st.integers(0, 12), min_size=1, max_size=4).map(tuple),
    share=st.floats(0, 1),
    number=st.integers(0, 2),
)
def test_shares_of_cameras(views, share, number):
    k = round(share * sum(views))
    if number == 0 and min(views) == 0:
        return
    assert Twice().split(views, k, number) == (k,)
    shares = Twice(budget="view", keep=0.5).split(views, k, number)
    assert sum(shares) == k and len(shares) == len(views)
    for size, given_share in zip(views, shares, strict=True):
        assert 0 <= given_share <= size
        if not (number == 0 and k == sum(max(1, round(0.5 * n)) for n in views)):
            exact = k * size / sum(views) if sum(views) else 0
            assert abs(given_share - exact) < 1


def test_at_the_first_cut_a_camera_gets_its_own_budget():
    assert Twice(budget="view", keep=0.5).split((3, 5, 2), 5) == (2, 2, 1)
    assert Twice(budget="view", keep=2).split((12, 8), 4) == (2, 2)


def test_default_selection_at_several_cuts():
    for budget, views, k, number, expected in (
        ("global", (12, 8), 10, 0, None),
        ("view", (12, 8), 10, 0, (6, 4)),
        ("view", (6, 4), 4, 1, (2, 2)),
        ("global", (10,), 4, 1, None),
        ("global", (10,), 10, 1, None),
    ):
        given_evidence = evidence(views, keep_count=k, number=number)
        kept = Twice(budget=budget, keep=0.5).select(given_evidence)
        assert kept.shape == (2, k) and kept.diff(dim=1).gt(0).all()
        if expected is None:
            assert torch.equal(kept, top_k(given_evidence.features[..., 0], k))
        else:
            assert [int((row < views[0]).sum()) for row in kept] == [expected[0]] * 2


def test_nothing_may_be_left():
    kept = Twice().select(evidence((12, 8), keep_count=0))
    assert kept.shape == (2, 0) and kept.dtype == torch.int64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": -1}, "ScoreSpec.layer=-1"),
        ({"layer": 1, "rows": "first"}, "'visual', 'weighted'"),
        ({"layer": 1, "heads": "min"}, "'mean', 'max'"),
        ({"layer": 1, "kind": "rollout"}, "'attention', 'logits'"),
    ],
)
def test_scores_that_do_not_exist_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ScoreSpec(**options)


def test_a_method_that_cannot_choose_is_refused():
    class Undecided(Method):
        name = "undecided"

    class Unranked(OneCut):
        name = "unranked"

    with pytest.raises(TypeError, match="Undecided has to define `select`, or be a OneCut"):
        Undecided()
    with pytest.raises(TypeError, match="Unranked has to define `choose`, or `select`"):
        Unranked()
