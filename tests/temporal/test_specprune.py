"""SpecPrune-VLA: the three sets against loops, and whole episodes against attention matrices."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_policy import look, sharpen
from test_hf_vlm import smolvlm
from tiny_openvla import make_oft, observation
from tiny_pi0 import make as make_pi0
from tiny_pi0 import observation as pi0_observation
from torch import Tensor

import vla_pruner as vp
from vla_pruner.methods import Evidence, build
from vla_pruner.pruning.frames import patches
from vla_pruner.temporal.method import Now

VIEWS = (16, 16)
SIZE = sum(VIEWS)


def chosen(scores: dict[str, Tensor], k: int, g: int, d: int, similarity: float) -> list[int]:
    """One row and one camera: the union of the three sets, step by step."""
    n = len(scores["local0"])

    def best(name: str) -> list[int]:
        return sorted(range(n), key=lambda i: (-float(scores[name][i]), i))

    union = set(best("global")[:g])
    moving = [i for i in range(n) if float(scores["alike"][i]) < similarity]
    moving = sorted(moving, key=lambda i: (float(scores["alike"][i]), i))
    union |= set(moving[:d])
    first, second = best("local0"), best("local1")
    for one, other in zip(first, second, strict=True):
        for token in (one, other):
            if len(union) < k:
                union.add(token)
    return sorted(union)


def random_scores(n: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {name: torch.rand(2, n, generator=generator) for name in ("local0", "local1", "global")}
    found["alike"] = 1 - 0.05 * torch.rand(2, n, generator=generator)
    found["fine"] = torch.zeros(2, n)
    return found


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(4, 24),
    shares=st.sampled_from([(0.25, 0.25), (0.0, 0.5), (0.6, 0.4), (0.0, 0.0), (1.0, 0.0)]),
    similarity=st.sampled_from([0.96, 0.99, 1.0]),
    data=st.data(),
)
def test_three_sets_of_k_tokens_in_all(seed, n, shares, similarity, data):
    k = data.draw(st.integers(1, n - 1))
    method = build(
        "specprune-vla",
        keep=k,
        budget="global",
        global_share=shares[0],
        dynamic_share=shares[1],
        similarity=similarity,
    )
    scores = random_scores(n, seed)
    kept = method.select(Evidence(torch.zeros(2, n, 4), None, None, (n,), 2, scores=scores))
    assert kept.shape == (2, k)
    g = round(shares[0] * k)
    d = min(round(shares[1] * k), k - g)
    for row in range(2):
        expected = chosen({name: s[row] for name, s in scores.items()}, k, g, d, similarity)
        assert kept[row].tolist() == expected


def now(shown: Tensor, before: Tensor | None, count: int = 1, motion=()) -> Now:
    memory = {}
    if before is not None:
        memory = {
            "frames": before[None],
            "count": torch.tensor([count]),
            "late": torch.rand(1, SIZE, generator=torch.Generator().manual_seed(1)),
        }
    return Now(
        features=torch.zeros(1, SIZE, 4),
        scores={},
        memory=memory,
        known=torch.tensor([before is not None]),
        frames=shown[None],
        views=VIEWS,
        motion=(motion,),
    )


def images(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (2, 3, 32, 32), generator=generator).float()


def test_a_scene_that_stands_still_has_no_dynamic_tokens_and_one_that_moved_has():
    method, shown = build("specprune-vla", keep=8), images(0)
    held = torch.stack([shown, images(1), images(2), images(3)])
    still = method.expect(now(shown, held))
    assert still["alike"].eq(1).all() and torch.equal(
        still["global"], now(shown, held).memory["late"]
    )
    other = shown.clone()
    other[1, :, 8:16, 24:32] = 255 - other[1, :, 8:16, 24:32]
    moved = method.expect(now(other, held))["alike"][0]
    assert (moved < 0.986).nonzero()[:, 0].tolist() == [16 + 4 + 3]


@pytest.mark.parametrize(("count", "back"), [(1, 0), (3, 2), (4, 3), (9, 3)])
def test_frames_are_compared_lag_calls_back_or_as_far_as_there_are(count, back):
    method, held = build("specprune-vla", lag=4), torch.stack([images(seed) for seed in range(4)])
    alike = method.expect(now(images(9), held, count))["alike"][0]
    one, other = patches(held[back][None], SIZE)[0], patches(images(9)[None], SIZE)[0]
    expected = torch.cosine_similarity(one.double(), other.double(), dim=1)
    assert torch.allclose(alike.double(), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("slow", "motion", "fine"),
    [
        (0.1, (0.5, 0.05), True),
        (0.1, (0.05, 0.5), False),
        (0.1, (0.1,), False),
        (0.1, (), False),
        (None, (0.0,), False),
    ],
)
def test_a_step_is_fine_when_the_robot_was_slow(slow, motion, fine):
    method = build("specprune-vla", keep=12, slow=slow, budget="global")
    expected = method.expect(now(images(0), None, motion=motion))
    assert bool(expected["fine"].all()) == bool(expected["fine"].any()) == fine
    scores = {**random_scores(SIZE, 0), "fine": expected["fine"].expand(2, -1)}
    kept = method.select(Evidence(torch.zeros(2, SIZE, 4), None, None, VIEWS, 2, scores=scores))
    assert kept.shape == (2, 20 if fine else 12)
    assert ("motion" in method.needs) == (slow is not None)


# -- policies --------------------------------------------------------------------------------------


def test_an_episode_is_what_attention_matrices_say():
    """Late scores come from the pruned calls themselves; early ones from layers that see all."""
    policy = sharpen(make_oft(attn_implementation="eager"))
    visual = sum(policy.config.views)
    assert policy.config.views == VIEWS
    last = policy.language_model.model.layers[-1].self_attn
    seen = [observation(0, 2, "pick up the can") for _ in range(4)]
    for step, one in enumerate(seen):
        for image in one["images"]:
            image[12 * step : 12 * step + 12, 8:30] = 60 * step
    wholes = [look(policy, one, visual) for one in seen]
    options = dict(tokens=9, budget="global", lag=2, global_share=0.34, dynamic_share=0.34)
    late, shown = None, []
    with vp.prune(policy, "specprune-vla", **options) as session:
        for step, (one, whole) in enumerate(zip(seen, wholes, strict=True)):
            weights: list[Tensor] = []
            hook = last.register_forward_hook(lambda m, a, out: weights.append(out[1][0]))  # noqa: B023
            policy.predict_action(**one)
            hook.remove()
            prefill = session._passes.latest.prefill
            shown.append(prefill.note.frames[0])
            kept = session.last.kept_mask[0].nonzero()[:, 0].tolist()
            text = prefill.layout.text_rows[0]
            if step == 0:
                assert len(kept) == visual
            else:
                back = shown[max(0, step - 2)]
                pair = [patches(f[None], visual)[0].double() for f in (back, shown[step])]
                scores = {
                    "local0": whole.from_rows(0, text),
                    "local1": whole.from_rows(1, text),
                    "global": late,
                    "alike": torch.cosine_similarity(*pair, dim=1),
                }
                assert kept == chosen(scores, 9, 3, 3, 0.986)
            rows = weights[0].shape[1] - (prefill.length - text)
            columns = slice(1, 1 + len(kept))
            late = torch.zeros(visual)
            late[kept] = weights[0][:, rows, columns].mean(dim=(0, 1))


def test_without_dynamic_tokens_no_images_are_needed():
    (model, _, _), images = smolvlm(), "compares the images of two steps"
    with pytest.raises(ValueError, match=images):
        vp.prune(model, "specprune-vla")
    with vp.prune(model, "specprune-vla", tokens=3, dynamic_share=0.0):
        pass
    policy = make_pi0()
    with vp.prune(policy, "specprune-vla", tokens=3, dynamic_share=0.0) as session:
        counts = []
        for _ in range(3):
            policy.predict_action(**pi0_observation(0))
            counts.append(session.last.visual_kept)
    assert counts == [18, 6, 6]


def test_motion_reaches_the_controller():
    policy = make_oft()
    with vp.prune(policy, "specprune-vla", tokens=3, slow=0.1) as session:
        counts = []
        for moved in (1.0, 0.01, 1.0, 0.01):
            policy.predict_action(**observation(0, 2))
            counts.append(session.last.visual_kept)
            session.motion(moved)
    assert counts == [32, 6, 10, 6]


def test_a_row_that_begins_does_not_disturb_the_others():
    method, held = build("specprune-vla"), torch.stack([images(seed) for seed in range(4)])
    alone = method.expect(now(images(9), held))
    one = now(images(9), held)
    both = dataclasses.replace(
        one,
        features=one.features.repeat(2, 1, 1),
        memory={name: torch.cat([t, torch.zeros_like(t)]) for name, t in one.memory.items()},
        known=torch.tensor([True, False]),
        frames=one.frames.repeat(2, 1, 1, 1, 1),
        motion=((), ()),
    )
    found = method.expect(both)
    for name in ("global", "alike"):
        assert torch.equal(found[name][:1], alone[name])
    assert found["alike"][1].eq(1).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 1}, "layer=1"),
        ({"lag": 0}, "lag=0"),
        ({"global_share": 0.8, "dynamic_share": 0.3}, "at most 1 together"),
        ({"global_share": -0.1}, "at least 0"),
        ({"dynamic_share": float("nan")}, "at least 0"),
        ({"similarity": 1.5}, "similarity=1.5"),
        ({"slow": 0.0}, "slow=0.0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build("specprune-vla", **options)
