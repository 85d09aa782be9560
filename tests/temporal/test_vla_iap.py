"""VLA-IAP: priors, masks and the gate against loops, and whole episodes of a policy."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_openvla import make_oft, observation
from torch import Tensor

import vla_pruner as vp
from vla_pruner.methods import Evidence, build
from vla_pruner.pruning.frames import grey
from vla_pruner.temporal.method import Now, Seen
from vla_pruner.temporal.vla_iap import by_camera, closed_up

SIDE, PATCH = 5, 8
VIEWS = (SIDE * SIDE,) * 2
SIZE = sum(VIEWS)


def frames(square: int | None = None, batch: int = 1) -> Tensor:
    """Grey images of two cameras; a bright square of 3 x 3 patches begins at column `square`."""
    found = torch.full((batch, 2, 3, SIDE * PATCH, SIDE * PATCH), 50.0)
    if square is not None:
        found[:, 0, :, PATCH : 4 * PATCH, square * PATCH : (square + 3) * PATCH] = 200.0
    return found


def features(named: list[int], batch: int = 1) -> tuple[Tensor, Tensor]:
    """Embeddings in which some tokens resemble the one word that there is."""
    generator = torch.Generator().manual_seed(0)
    visual = torch.randn(batch, SIZE, 32, generator=generator) * 0.1
    visual[..., 0] = 0.0
    visual[:, named, 0] = 1.0
    text = torch.zeros(batch, 1, 32)
    text[..., 0] = 1.0
    return visual, text


class Run:
    """Steps of an episode without a model."""

    def __init__(self, method, named: list[int]) -> None:
        self.method, self.memory = method, None
        self.visual, self.text = features(named)

    def step(self, shown: Tensor) -> list[int]:
        held = {} if self.memory is None else {k: v[None] for k, v in self.memory.items()}
        expected = self.method.expect(
            Now(
                features=self.visual,
                scores={},
                memory=held,
                known=torch.tensor([bool(held)]),
                frames=shown,
                views=VIEWS,
                text=self.text,
            )
        )
        self.expected = {name: score[0] for name, score in expected.items()}
        evidence = Evidence(self.visual, None, None, VIEWS, 0, scores=expected, text=self.text)
        kept = self.method.select(evidence)[0].tolist()
        self.memory = self.method.remember(
            Seen(
                features=self.visual[0],
                scores={},
                expected=self.expected,
                action=None,
                frames=shown[0],
                memory=self.memory,
                views=VIEWS,
            )
        )
        return kept


NAMED = [row * SIDE + column for row in (1, 2, 3) for column in (1, 2, 3)]


def test_a_scene_that_stands_still_keeps_what_the_words_are_about():
    run = Run(build("vla-iap", keep=0.1), NAMED)
    for _ in range(4):
        kept = run.step(frames(1))
        assert set(NAMED) <= set(kept) and len(kept) > run.method.kept(VIEWS)
        assert not run.expected["open"].any() and not run.expected["motion"].any()


def test_few_tokens_stay_once_what_moves_is_what_the_words_are_about():
    method = build("vla-iap", keep=0.1, steady=2)
    run, counts = Run(method, NAMED), []
    for step in range(4):
        counts.append(len(run.step(frames(step % 3))))
    # Nothing has moved at first; then the masks meet twice before the gate opens.
    assert counts[0] > 5 and counts[1] > 5
    assert counts[2:] == [5, 5]
    kept = run.step(frames(1))
    assert kept == sorted(run.expected["score"].topk(5).indices.tolist())
    counts = [len(run.step(frames(1))) for _ in range(20)]
    assert counts[0] == 5 and counts[-1] > 5, "the motion fades, and the gate closes"


def test_motion_elsewhere_leaves_the_gate_closed():
    run = Run(build("vla-iap", keep=0.1, share=0.1), [20, 21, 45])
    for step in range(5):
        kept = run.step(frames(step % 3))
        assert len(kept) > 5 and {20, 21, 45} <= set(kept)


def test_motion_is_an_average_that_forgets():
    run = Run(build("vla-iap", decay=0.7), NAMED)
    run.step(frames(0))
    run.step(frames(1))
    token = SIDE + 0  # Left by the square: 150 darker.
    assert float(run.expected["motion"][token]) == pytest.approx(0.3 * 150, rel=1e-4)
    run.step(frames(1))
    assert float(run.expected["motion"][token]) == pytest.approx(0.7 * 0.3 * 150, rel=1e-4)


def test_the_score_is_the_sum_of_scaled_priors():
    run = Run(build("vla-iap", edge_weight=0.25), NAMED)
    run.step(frames(0))
    run.step(frames(1))
    likes = torch.stack([torch.cosine_similarity(v, run.text[0, 0], dim=0) for v in run.visual[0]])

    def scaled(score: Tensor) -> Tensor:
        parts = []
        for part in score.split(list(VIEWS)):
            span = float(part.max() - part.min())
            parts.append((part - part.min()) / span if span else torch.zeros_like(part))
        return torch.cat(parts)

    bright = grey(frames(1))[0]
    x = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]])
    padded = torch.nn.functional.pad(bright[:, None], (1, 1, 1, 1), mode="replicate")
    slopes = torch.nn.functional.conv2d(padded, torch.stack([x, x.T])[:, None])
    length = slopes.square().sum(dim=1).sqrt()
    edge = torch.nn.functional.avg_pool2d(length[:, None], PATCH).flatten()
    expected = scaled(likes) + scaled(run.expected["motion"]) + 0.25 * scaled(edge)
    assert torch.allclose(run.expected["score"], expected, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(bits=st.lists(st.booleans(), min_size=3, max_size=20), steady=st.integers(1, 3))
def test_the_gate_turns_after_some_steps_in_a_row(bits, steady):
    method = build("vla-iap", steady=steady)
    opened, streak, slow, against = torch.tensor([False]), torch.zeros(1), False, 0
    words = torch.ones(1, 4, dtype=torch.bool)
    for bit in bits:
        moving = torch.full((1, 4), bit)
        opened, streak = method.gate(opened, streak, words, moving)
        against = against + 1 if bit != slow else 0
        if against >= steady:
            slow, against = bit, 0
        assert bool(opened) == slow and int(streak) == against


def test_lone_tokens_do_not_move_and_gaps_close():
    mask = torch.zeros(1, 25, dtype=torch.bool)
    mask[0, [0, 11, 13]] = True
    cells = ((5, 5),)
    assert not closed_up(mask, cells).any()
    mask[0, [6, 7, 8, 16, 17, 18]] = True
    assert closed_up(mask, cells)[0, 12]


def test_scaling_is_by_camera_and_among_the_valid():
    score = torch.tensor([[1.0, 3, 2, 9, 9]])
    valid = torch.tensor([[True, True, True, False, False]])
    assert by_camera(score, (3, 2), valid).tolist() == [[0, 1, 0.5, 0, 0]]
    assert by_camera(score, (3, 2), None).tolist() == [[0, 1, 0.5, 0, 0]]


@settings(max_examples=25, deadline=None)
@given(
    keep=st.floats(0.03, 1.0),
    opened=st.lists(st.booleans(), min_size=2, max_size=2),
    seed=st.integers(0, 999),
)
def test_the_selection_is_a_set_of_a_stated_size(keep, opened, seed):
    method = build("vla-iap", keep=keep)
    generator = torch.Generator().manual_seed(seed)
    scores = {
        "score": torch.rand(2, SIZE, generator=generator),
        "protected": (torch.rand(2, SIZE, generator=generator) < 0.4).float(),
        "open": torch.tensor(opened).float()[:, None].expand(2, SIZE),
    }
    kept = method.select(Evidence(torch.zeros(2, SIZE, 4), None, None, VIEWS, 0, scores=scores))
    least = method.kept(VIEWS)
    sizes = {max(math.ceil(level * SIZE), least) for level in method.levels} | {SIZE}
    assert kept.diff(dim=1).gt(0).all() and kept.ge(0).all() and kept.lt(SIZE).all()
    assert kept.shape[1] == least if all(opened) else kept.shape[1] in sizes
    for row in range(2):
        if not opened[row]:
            assert set(scores["protected"][row].nonzero()[:, 0].tolist()) <= set(kept[row].tolist())


def test_an_episode_of_a_policy():
    """Its own frames reach the method; the gate's state ends with the episode."""
    policy = make_oft()
    with vp.prune(policy, "vla-iap", keep=0.25, gamma=0.0, steady=1, share=0.9) as session:

        def step(number: int) -> int:
            seen = observation(0, 2, "pick up the can")
            for image in seen["images"]:
                image[:] = 40 * number
            policy.predict_action(**seen)
            return session.last.visual_kept

        assert [step(number) for number in range(3)] == [32, 8, 8]
        session.reset()
        assert [step(number) for number in range(2)] == [32, 8]
        (memory,) = session._cut.memories.known.values()
        assert set(memory) == {"brightness", "motion", "open", "streak"}
        assert memory["brightness"].shape == (2, 32, 32)


def test_a_missing_camera_is_neither_named_nor_an_edge():
    method, valid = build("vla-iap", keep=0.2), torch.ones(1, SIZE, dtype=torch.bool)
    valid[0, 25:] = False
    visual, text = features(NAMED)
    expected = method.expect(
        Now(
            features=visual,
            scores={},
            memory={},
            known=torch.tensor([False]),
            frames=frames(1),
            views=VIEWS,
            valid=valid,
            text=text,
        )
    )
    assert not expected["protected"][0, 25:].any()
    shown = Evidence(visual, None, None, VIEWS, 0, scores=expected, valid=valid)
    opened = dataclasses.replace(shown, scores={**expected, "open": torch.ones(1, SIZE)})
    assert method.select(opened)[0].lt(25).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": "view"}, 'use budget="global"'),
        ({"share": 1.0}, "share=1.0"),
        ({"decay": 1.0}, "decay=1.0"),
        ({"gamma": -0.1}, "gamma=-0.1"),
        ({"motion": float("nan")}, "motion=nan"),
        ({"edge_weight": -1.0}, "edge_weight=-1.0"),
        ({"steady": 0}, "steady=0"),
        ({"levels": (0.5, 0.25)}, "ascend within"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build("vla-iap", **options)
