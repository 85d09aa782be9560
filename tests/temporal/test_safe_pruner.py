"""SAFE-Pruner: correspondence, key steps, and whole episodes against a slow version."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_policy import Whole, look, sharpen
from tiny_openvla import make_oft, observation
from torch import Tensor

import vla_pruner as vp
from vla_pruner.baselines.correspondence import correspondence
from vla_pruner.methods import Evidence, build
from vla_pruner.pruning.selection import top_k
from vla_pruner.temporal.method import Now, Seen

VIEWS = (12, 8)
SIZE = sum(VIEWS)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


# -- correspondence --------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), sizes=st.lists(st.integers(1, 12), min_size=1, max_size=3))
def test_the_most_similar_token_of_the_same_camera(seed, sizes):
    now = random(2, sum(sizes), 5, seed=seed) - 0.5
    then = random(2, sum(sizes), 5, seed=seed + 1) - 0.5
    found = correspondence(now, then, tuple(sizes))
    for row in range(2):
        start = 0
        for size in sizes:
            for i in range(start, start + size):
                cosines = [
                    float(torch.cosine_similarity(now[row, i], then[row, j], dim=0))
                    for j in range(start, start + size)
                ]
                assert cosines[int(found[row, i]) - start] >= max(cosines) - 2e-6
                assert start <= int(found[row, i]) < start + size
            start += size


def test_a_scene_that_stands_still_corresponds_to_itself():
    """Even where all tokens look alike."""
    features = random(1, SIZE, 6)
    features[0, :5] = features[0, 0]
    assert correspondence(features, features, VIEWS).tolist() == [list(range(SIZE))]


def test_tokens_that_moved_take_their_place_with_them():
    features = random(1, SIZE, 16)
    order = torch.cat([torch.randperm(12), 12 + torch.randperm(8)])
    assert correspondence(features[:, order], features, VIEWS)[0].tolist() == order.tolist()


# -- the rule --------------------------------------------------------------------------------------


def now(known: bool = True, seed: int = 3, **memory: Tensor) -> Now:
    features = random(2, SIZE, 16, seed=seed)
    held = {
        "features": features,
        "shallow": random(2, SIZE, seed=seed + 1),
        "deep": random(2, SIZE, seed=seed + 2),
    }
    return Now(
        features=features,
        scores={"shallow": random(2, SIZE, seed=seed + 1)},
        memory={**held, **memory} if known else {},
        known=torch.tensor([known] * 2),
        frames=None,
        views=VIEWS,
        valid=None,
    )


def evidence_of(method, seen: Now) -> Evidence:
    scores = {**seen.scores, **method.expect(seen)}
    return Evidence(seen.features, None, None, VIEWS, 3, scores=scores)


def test_the_same_frame_expects_what_was_stored():
    method, seen = build("safe-pruner", keep=5), now()
    expected = method.expect(seen)
    assert torch.equal(expected["forecast"], seen.memory["deep"])
    assert not expected["refresh"].any()


def test_a_frame_that_moved_moves_the_forecast():
    seen, method = now(), build("safe-pruner", keep=5)
    order = torch.cat([torch.randperm(12), 12 + torch.randperm(8)])
    moved = dataclasses.replace(seen, features=seen.features[:, order])
    assert torch.equal(method.expect(moved)["forecast"], seen.memory["deep"][:, order])


@pytest.mark.parametrize(("gamma", "count"), [(1.01, SIZE), (-1.0, 5), (0.99, 5)])
def test_gamma_decides_what_another_scene_is(gamma, count):
    method = build("safe-pruner", keep=5, gamma=gamma)
    assert method.select(evidence_of(method, now())).shape == (2, count)


def test_a_row_in_a_new_scene_takes_its_neighbour_along_but_not_its_memory():
    strange = now().scores["shallow"].clone()
    strange[1] = 1e-3
    strange[1, 0] = 1.0
    seen = dataclasses.replace(now(), scores={"shallow": strange})
    method = build("safe-pruner", keep=5, gamma=0.6)
    assert method.expect(seen)["refresh"].any(dim=1).tolist() == [False, True]
    assert method.select(evidence_of(method, seen)).shape == (2, SIZE)
    unknown = dataclasses.replace(seen, known=torch.tensor([True, False]))
    assert not method.expect(unknown)["refresh"].any()


def test_the_two_saliencies_weigh_the_same_whatever_their_scale():
    seen = now()
    shallow, deep = seen.scores["shallow"], seen.memory["deep"]
    for mix in (0.0, 0.3, 1.0):
        method = build("safe-pruner", keep=5, mix=mix, gamma=-1.0)
        p = shallow.double() / shallow.double().sum(1, keepdim=True)
        q = deep.double() / deep.double().sum(1, keepdim=True)
        expected = top_k((1 - mix) * p + mix * q, 5)
        assert torch.equal(method.select(evidence_of(method, seen)), expected)
        louder = dataclasses.replace(seen, memory={**seen.memory, "deep": 70 * deep})
        assert torch.equal(method.select(evidence_of(method, louder)), expected)


@settings(max_examples=30, deadline=None)
@given(
    keep=st.one_of(st.floats(0.02, 1.0), st.integers(1, 8)),
    budget=st.sampled_from(["global", "view"]),
    seed=st.integers(0, 10**6),
)
def test_the_selection_is_a_set_of_the_planned_size(keep, budget, seed):
    method = build("safe-pruner", keep=keep, budget=budget, gamma=-1.0)
    seen = evidence_of(method, now(seed=seed))
    kept = method.select(seen)
    assert kept.shape == (2, method.kept(VIEWS)) and kept.diff(dim=1).gt(0).all()
    assert kept.ge(0).all() and kept.lt(SIZE).all()
    assert torch.equal(method.select(seen), kept)


def test_tokens_of_a_missing_camera_are_candidates_of_nothing():
    valid = torch.ones(2, SIZE, dtype=torch.bool)
    valid[1, 12:] = False
    method = build("safe-pruner", keep=6)
    seen = dataclasses.replace(now(), valid=valid)
    kept = method.select(dataclasses.replace(evidence_of(method, seen), valid=valid))
    assert kept.shape == (2, 6) and kept[1].lt(12).all()


def test_a_step_between_key_steps_only_makes_the_memory_older():
    method = build("safe-pruner", refresh=2)
    first = Seen(
        features=random(SIZE, 4),
        scores={"shallow": random(SIZE)},
        expected={},
        action=random(SIZE, seed=1),
        frames=None,
        memory=None,
        views=VIEWS,
    )
    memory = method.remember(first)
    assert torch.equal(memory["deep"], first.action)
    assert method.starts_full(None) and not method.starts_full(memory)
    later = dataclasses.replace(
        first,
        action=random(SIZE, seed=2),
        memory=memory,
        expected={"forecast": random(SIZE), "refresh": torch.zeros(SIZE)},
    )
    older = method.remember(later)
    assert older["deep"] is memory["deep"] and int(older["age"]) == 2
    assert method.starts_full(older)
    again = method.remember(dataclasses.replace(later, expected={"refresh": torch.ones(SIZE)}))
    assert torch.equal(again["deep"], later.action) and int(again["age"]) == 1


# -- a policy --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def policy():
    return sharpen(make_oft(attn_implementation="eager"))


def seen_at(step: int) -> dict:
    """The same scene, in which a patch of both images changes."""
    found = observation(0, 2, "pick up the can")
    for image in found["images"]:
        image[4 * step : 4 * step + 12, 8:24] = 40 * step
    return found


def slowly(wholes: list[Whole], views, rows, layer, deep, k, mix, gamma) -> list[list[int]]:
    """The tokens that stay at each step of an episode, from attention matrices; [] is all."""
    kept, key = [], None
    for whole in wholes:
        shallow = whole.from_rows(layer - 1, rows)
        chosen = None
        if key is not None:
            where, start = [], 0
            for size in views:
                for i in range(start, start + size):
                    cosines = [
                        float(torch.cosine_similarity(whole.visual[i], key.visual[j], dim=0))
                        for j in range(start, start + size)
                    ]
                    where.append(start + cosines.index(max(cosines)))
                start += size
            before = key.from_rows(layer - 1, rows)[where]
            if float(torch.cosine_similarity(shallow, before, dim=0)) >= gamma:
                far = sum(key.from_rows(at, rows) for at in deep)[where]
                score = (1 - mix) * shallow / shallow.sum() + mix * far / far.sum()
                chosen = sorted(score.argsort(descending=True)[:k].tolist())
        if chosen is None:
            key, chosen = whole, []
        kept.append(chosen)
    return kept


@pytest.mark.parametrize(("gamma", "refreshed"), [(0.5, 1), (2.0, 4)])
def test_an_episode_is_what_the_slow_version_says(policy, gamma, refreshed):
    views = policy.config.views
    wholes = [look(policy, seen_at(step), sum(views)) for step in range(4)]
    expected = slowly(
        wholes, views, policy.config.action_rows, 2, (2, 3), k=9, mix=0.4, gamma=gamma
    )
    assert sum(not chosen for chosen in expected) == refreshed
    found = []
    with vp.prune(policy, "safe-pruner", tokens=9, layer=2, mix=0.4, gamma=gamma) as session:
        for step in range(4):
            policy.predict_action(**seen_at(step))
            kept = session.last.kept_mask[0].nonzero()[:, 0].tolist()
            found.append([] if len(kept) == sum(views) else kept)
    assert found == expected


def test_an_episode_begins_with_a_key_step_and_ends_with_its_memory(policy):
    visual = sum(policy.config.views)
    with vp.prune(policy, "safe-pruner", tokens=9, layer=2, gamma=-1.0) as session:

        def step() -> int:
            policy.predict_action(**seen_at(0))
            return session.last.visual_kept

        assert [step(), step()] == [visual, 9]
        session.reset()
        assert [step(), step()] == [visual, 9]
        memories = session._cut.memories.known
        assert len(memories) == 1
    assert not memories


def test_a_call_that_failed_is_not_remembered(policy):
    visual = sum(policy.config.views)
    with vp.prune(policy, "safe-pruner", tokens=9, layer=2, gamma=-1.0) as session:
        last = policy.language_model.model.layers[-1]

        def fail(module, args, output):
            raise RuntimeError("stop")

        handle = last.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="stop"):
            policy.predict_action(**seen_at(0))
        handle.remove()
        policy.predict_action(**seen_at(0))
        assert session.last.visual_kept == visual
        policy.predict_action(**seen_at(0))
        assert session.last.visual_kept == 9


def test_refresh_asks_for_a_key_step_now_and_then(policy):
    visual = sum(policy.config.views)
    with vp.prune(policy, "safe-pruner", tokens=9, layer=2, gamma=-1.0, refresh=2) as session:
        kept = []
        for _ in range(5):
            policy.predict_action(**seen_at(0))
            kept.append(session.last.visual_kept)
    assert kept == [visual, 9, visual, 9, visual]
    assert build("safe-pruner").warmup == build("specprune-vla").warmup == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 0}, "`layer=0` must be an integer of at least 1"),
        ({"mix": 1.5}, "mix=1.5"),
        ({"mix": float("nan")}, "mix=nan"),
        ({"gamma": float("nan")}, "gamma=nan"),
        ({"refresh": 0}, "refresh=0"),
        ({"deep": ()}, "name at least one layer"),
        ({"deep": "first"}, "latter-half"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build("safe-pruner", **options)
