"""TEAM-VLA: sampling, expansion and merging against loops, and in a decoder."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_grid import around
from tiny_openvla import make_oft, observation
from torch import Tensor

import vla_pruner as vp
from vla_pruner.baselines.merging import merge_into
from vla_pruner.core import scores
from vla_pruner.methods import Choice, Evidence, build
from vla_pruner.methods.team_vla import closest
from vla_pruner.pruning.hashed_uniform import hashed_uniform

SHAPES = ((5, 5), (4, 4))
VIEWS = (25, 16)
SIZE = sum(VIEWS)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def evidence(seed: int = 0, batch: int = 2, **changes) -> Evidence:
    made = Evidence(
        random(batch, SIZE, 8, seed=seed),
        None,
        None,
        VIEWS,
        0,
        seeds=torch.arange(batch) + 7,
        text=random(batch, 4, 8, seed=seed + 1),
        text_valid=torch.arange(4).lt(torch.tensor([[4], [2]])[:batch]),
    )
    return dataclasses.replace(made, **changes)


def cosine(one: Tensor, other: Tensor) -> float:
    return float(torch.cosine_similarity(one, other, dim=0))


def slowly(shown: Evidence, method, row: int) -> tuple[set[int], int]:
    """E of one row, and how many tokens C has at least."""
    words = [w for w in range(4) if bool(shown.text_valid[row, w])]
    anchors = set()
    for w in words:
        likes = [cosine(shown.features[row, i], shown.text[row, w]) for i in range(SIZE)]
        anchors.add(likes.index(max(likes)))
    uniform = hashed_uniform(shown.seeds, torch.arange(SIZE), 2 * method.seed)[row]
    expanded = set(anchors)
    for i in range(SIZE):
        near = around(SHAPES, i)
        density = sum(j in anchors for j in near)
        if density > method.tau:
            expanded |= set(near)
        elif density > 0:
            expanded |= {j for j in near if float(uniform[j]) < method.chance}
    outside = SIZE - len(expanded)
    return expanded, min(outside, max(1, math.floor(method.context * outside)))


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    tau=st.sampled_from([0.0, 1.0, 2.0, 9.0]),
    context=st.sampled_from([0.0, 0.1, 0.5]),
    keep=st.sampled_from([0.1, 0.4]),
)
def test_what_is_sampled_is_what_the_loops_say(seed, tau, context, keep):
    method, shown = build("team-vla", tau=tau, context=context, keep=keep), evidence(seed)
    kept = method.select(shown)
    assert kept.diff(dim=1).gt(0).all() and kept.ge(0).all() and kept.lt(SIZE).all()
    assert torch.equal(method.select(shown), kept)
    most = 0
    for row in range(2):
        expanded, drawn = slowly(shown, method, row)
        assert expanded <= set(kept[row].tolist())
        most = max(most, len(expanded) + drawn)
    counts = [max(math.ceil(level * SIZE), method.kept(VIEWS)) for level in method.levels]
    assert kept.shape[1] == min(n for n in [*counts, SIZE] if n >= most)


def test_extremes_of_tau():
    """At 9 everything is sparse, and with no chance nothing is added; at 0 all is dilation."""
    shown = evidence()
    anchors = closest(shown.features, shown.text, shown.text_valid, None)
    method = build("team-vla", tau=9.0, chance=0.0)
    uniform = torch.rand(2, SIZE)
    assert torch.equal(method._expanded(shown, SHAPES, uniform), anchors)
    twice = {
        j
        for i in anchors[0].nonzero()[:, 0].tolist()
        for k in around(SHAPES, i)
        for j in around(SHAPES, k)
    }
    found = build("team-vla", tau=0.0)._expanded(shown, SHAPES, uniform)[0]
    assert set(found.nonzero()[:, 0].tolist()) == twice


def test_context_prefers_what_the_words_resemble():
    """Drawn without replacement in proportion to exp(10 cos), over many seeds."""
    features = torch.zeros(1, 16, 8)
    features[..., 0] = 1
    features[0, 8:, 0], features[0, 8:, 1] = 0.9, math.sqrt(1 - 0.81)
    text = torch.zeros(1, 1, 8)
    text[..., 0] = 1
    method = build("team-vla", levels=(0.25,), tau=9.0, chance=0.0, context=0.0, keep=0.05)
    shown = Evidence(
        features.expand(2000, -1, -1),
        None,
        None,
        (16,),
        0,
        seeds=torch.arange(2000),
        text=text.expand(2000, -1, -1),
        text_valid=torch.ones(2000, 1, dtype=torch.bool),
    )
    kept = method.select(shown)
    assert kept.shape == (2000, 4) and kept[:, 0].eq(0).all()  # 0 is the anchor; three are drawn.
    # The first draw takes one of the 7 closer tokens with odds 7 e to 8.
    closer = float((kept[:, 1:] < 8).float().mean())
    assert 0.62 < closer < 0.72
    assert len({tuple(row) for row in kept.tolist()}) > 100


def test_a_missing_camera_has_no_anchors():
    valid = torch.ones(2, SIZE, dtype=torch.bool)
    valid[1, 25:] = False
    shown = evidence(valid=valid)
    assert not closest(shown.features, shown.text, shown.text_valid, valid)[1, 25:].any()
    kept = build("team-vla", levels=(0.25, 0.5), tau=9.0, chance=0.0).select(shown)
    assert kept[1].lt(25).all() and kept[0].ge(25).any()


# -- merging ---------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), m=st.integers(2, 12), data=st.data())
def test_merging_is_what_the_loops_say_and_loses_nothing(seed, m, data):
    k = data.draw(st.integers(1, m - 1))
    hidden = random(1, m, 6, seed=seed)
    kept = torch.randperm(m, generator=torch.Generator().manual_seed(seed))[:k].sort().values[None]
    weights = merge_into(hidden, kept)
    assert torch.allclose(weights.sum(dim=2), torch.ones(1, k), atol=1e-6)
    h = hidden[0].double()
    rms = h / h.square().mean(dim=1, keepdim=True).sqrt()
    others = [t for t in range(m) if t not in kept[0].tolist()]
    share = torch.softmax(rms[others] @ rms[kept[0]].T / math.sqrt(6), dim=1)
    assert torch.allclose(share.sum(dim=1), torch.ones(len(others), dtype=torch.float64))
    count = share.sum(dim=0)
    expected = (h[kept[0]] + share.T @ h[others]) / (1 + count)[:, None]
    found = weights[0].double() @ h
    assert torch.allclose(found, expected, atol=1e-5)
    whole = ((1 + count)[:, None] * found).sum(dim=0)
    assert torch.allclose(whole, h.sum(dim=0), atol=1e-4)


def test_what_is_invalid_is_shared_out_to_nobody():
    hidden, kept = random(1, 5, 6), torch.tensor([[0, 3]])
    valid = torch.tensor([[True, True, False, True, True]])
    assert merge_into(hidden, kept, valid)[0, :, 2].tolist() == [0, 0]


def test_the_tokens_like_words_or_actions_stay():
    shown = evidence(
        hidden=random(2, SIZE, 8, seed=5),
        guides=random(2, 6, 8, seed=6),
        guides_valid=torch.arange(6).lt(torch.tensor([[6], [3]])),
        number=1,
        keep_count=9,
    )
    choice = build("team-vla").select(shown)
    assert isinstance(choice, Choice)
    for row, guides in enumerate((6, 3)):
        like = [
            max(cosine(shown.hidden[row, i], shown.guides[row, j]) for j in range(guides))
            for i in range(SIZE)
        ]
        best = sorted(range(SIZE), key=lambda i: -like[i])[:9]
        assert choice.kept[row].tolist() == sorted(best)
    everything = build("team-vla").select(dataclasses.replace(shown, keep_count=SIZE))
    assert everything.tolist() == [list(range(SIZE))] * 2


# -- a decoder -------------------------------------------------------------------------------------


def test_guides_are_the_hidden_states_of_words_and_action_slots(monkeypatch):
    policy = make_oft()
    seen, original = [], scores.guides

    def noting(prefill, left, hidden):
        found = original(prefill, left, hidden)
        seen.append((prefill, hidden, found["guides"], found["guides_valid"]))
        return found

    monkeypatch.setattr(scores, "guides", noting)
    with vp.prune(policy, "team-vla", keep=0.2, tau=9.0, chance=0.0) as session:
        policy.predict_action(**observation(0, 2))
    assert [stage.layer for stage in session.last.stages] == [0, 2]
    prefill, hidden, guides, valid = seen[1]
    # Words keep their rows from the end, where nothing was cut; so do action slots.
    behind = prefill.length - prefill.layout.text_rows[0]
    slots = policy.config.action_rows
    for i, row in enumerate(behind.tolist()):
        assert torch.equal(guides[0, i], hidden[0, hidden.shape[1] - row])
    assert torch.equal(guides[0, len(behind) :], hidden[0, slots])
    assert valid.all() and hidden.shape[1] < prefill.length
    kept = session.last.stages[1].kept_mask
    assert int(kept.sum()) == session.method.kept(policy.config.views)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": "view"}, 'use budget="global"'),
        ({"layer": -1}, "layer=-1"),
        ({"layer": 3, "merge_layer": 3}, "`merge_layer=3` must be an integer of at least 4"),
        ({"tau": -1.0}, "tau=-1.0"),
        ({"tau": float("nan")}, "tau=nan"),
        ({"chance": 1.1}, "chance=1.1"),
        ({"context": -0.1}, "context=-0.1"),
        ({"levels": (0.5, 0.25)}, r"levels=\(0.5, 0.25\)"),
        ({"levels": (0.5, 1.0)}, "ascend within"),
        ({"columns": 0}, "columns=0"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build("team-vla", **options)


def test_a_decoder_without_a_middle_is_refused():
    assert build("team-vla").cuts(32) == (0, 16)
    assert build("team-vla", layer=2, merge_layer=5).cuts(8) == (2, 5)
    with pytest.raises(ValueError, match="merged before layer 8"):
        build("team-vla", merge_layer=8).cuts(8)
    with pytest.raises(ValueError, match="sampled before layer 4 and merged before layer 4"):
        build("team-vla", layer=4).cuts(8)
