"""openpi's policy, as a double, pruned without changing it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from openpi_double import ACTION, HORIZON, WORDS, PI0Pytorch, observation

import vla_pruner as vp
from checks import fingerprint, near, randomise
from vla_pruner.measure.doctor import examine
from vla_pruner.models.adapters.pi0 import FlowPolicyAdapter

FAMILY, M = "pi0-policies", 16


@pytest.fixture(scope="module")
def policy():
    with torch.no_grad():
        return randomise(PI0Pytorch())


def act(model, seed):
    noise = torch.randn(2, HORIZON, ACTION, generator=torch.Generator().manual_seed(5))
    return model.sample_actions("cpu", observation(seed), noise=noise, num_steps=4)


@pytest.mark.parametrize("method", ["vla-pruner", "fastv", "divprune"])
@pytest.mark.parametrize("layer", [1, 4])
def test_openpi_with_tokens_removed(policy, method, layer, proves):
    act(policy, 0)
    before, found, reports = fingerprint(policy), {}, {}
    options = {"window": 1} if method == "vla-pruner" else {}
    for mode in ("drop", "mask"):
        with vp.prune(policy, method, keep=0.25, layer=layer, mode=mode, **options) as session:
            found[mode] = torch.stack([act(policy, seed) for seed in (1, 2)])
        reports[mode] = session.last
    dropped, masked = reports["drop"], reports["mask"]
    assert dropped.tokens_full == 2 * M + WORDS and dropped.visual_kept == M // 2
    assert torch.equal(dropped.kept_mask, masked.kept_mask)
    near(found["drop"], found["mask"])
    full = act(policy, 2)
    assert (full - found["drop"][1]).abs().max() > 1e-4
    assert fingerprint(policy) == before and torch.equal(act(policy, 2), full)
    checks = ("reference", "undo", "batch", "padding", "cameras", "missing", "dynamic")
    proves(FAMILY, PI0Pytorch, *checks, double=True)


def test_the_chunk_votes_in_the_steps_that_are_asked_for(policy):
    scores = {}
    for steps in ("latter-half", "all"):
        adapter, seen = FlowPolicyAdapter(policy, flow_steps=steps), []

        def rows(length, original=adapter.reader_rows, seen=seen):
            seen.append(original(length))
            return seen[-1]

        adapter.reader_rows = rows
        with vp.prune(policy, keep=0.25, adapter=adapter) as session:
            act(policy, 1)
        watched = [found is not None for found in seen]
        scores[steps] = session.last.action
        assert watched[-1] and all(watched) == (steps == "all")
        assert {str(found) for found in seen if found} == {str(slice(1, HORIZON + 1))}
    assert not torch.equal(scores["all"], scores["latter-half"])
    with pytest.raises(ValueError, match="flow_steps"):
        FlowPolicyAdapter(policy, flow_steps="some")


def test_missing_cameras_are_candidates_of_nothing(policy):
    with vp.prune(policy, "fastv", tokens=8, layer=2) as session:
        act(policy, 1)
    assert session.last.kept_mask[0, M:].any() and not session.last.kept_mask[1, M:].any()


def test_compiled_sampling_runs_uncompiled_while_attached(proves):
    model = randomise(PI0Pytorch(compiled=True))
    compiled = model.sample_actions
    with vp.prune(model, keep=1.0, window=1) as session:
        kept = act(model, 1)
        assert session.last.visual_full == 2 * M
    assert model.sample_actions is compiled
    assert torch.equal(type(model).sample_actions(model, "cpu", *_arguments()), kept)
    proves(FAMILY, PI0Pytorch, "keep=1.0", double=True)


def _arguments():
    noise = torch.randn(2, HORIZON, ACTION, generator=torch.Generator().manual_seed(5))
    return observation(1), noise, 4


def test_doctor_finds_nothing_wrong(policy):
    words = observation(0)

    def show(frame: np.ndarray):
        image = torch.from_numpy(frame[:32, :32]).permute(2, 0, 1)[None].float() / 255
        words.images = [image.expand(2, -1, -1, -1)] * 2
        words.masks = [torch.ones(2, dtype=torch.bool)] * 2
        noise = torch.zeros(2, HORIZON, ACTION)
        return policy.sample_actions("cpu", words, noise=noise, num_steps=2)

    findings = examine(policy, show)
    assert all(finding.well for finding in findings), findings


def test_a_policy_that_is_built_otherwise():
    class Reordered(PI0Pytorch):
        def embed_prefix(self, images, img_masks, lang_tokens, lang_masks):
            parts = super().embed_prefix(images, img_masks, lang_tokens, lang_masks)
            return parts[0].flip(1), *parts[1:]

    model = randomise(Reordered())
    with (
        vp.prune(model, "fastv"),
        pytest.raises(ValueError, match=r"camera 0 are not at 0\.\.15"),
    ):
        act(model, 1)


class Policy:
    """openpi's: a module, a method of it that was noted when it was made, and `infer`."""

    def __init__(self, model):
        self._model, self._sample_actions = model, model.sample_actions

    def infer(self, seed):
        noise = torch.randn(2, HORIZON, ACTION, generator=torch.Generator().manual_seed(5))
        return self._sample_actions("cpu", observation(seed), noise=noise, num_steps=4)

    def reset(self):
        pass


@pytest.mark.parametrize("compiled", [False, True])
def test_the_policy_around_the_module_is_pruned_as_it_is(compiled):
    policy = Policy(randomise(PI0Pytorch(compiled=compiled)))
    noted = policy._sample_actions
    with vp.prune(policy, "vla-pruner", keep=0.25, window=1) as session:
        first, second = policy.infer(1), policy.infer(2)
        assert not session.last.warm_up.any() and session.last.visual_kept == M // 2
        assert torch.equal(policy.infer(2), second)
        policy.reset()
        assert torch.equal(policy.infer(1), first) and session.last.warm_up.all()
    assert policy._sample_actions is noted and vars(policy).keys() == {"_model", "_sample_actions"}
    with vp.prune(policy._model, "vla-pruner", keep=0.25, window=1):
        assert torch.equal(act(policy._model, 1), first)
        assert torch.equal(act(policy._model, 2), second)
    session = vp.prune(policy, "fastv")
    assert vp.remove(policy) and not session.attached and policy._sample_actions is noted


def test_a_policy_in_jax_says_what_to_convert(policy):
    made = Policy(policy)
    made._model = object()
    with pytest.raises(TypeError, match=r"runs in JAX.*convert_jax_model_to_pytorch"):
        vp.prune(made)
    for wrong in ("mini-oft", None, 3, object()):
        with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module"):
            vp.prune(wrong)
