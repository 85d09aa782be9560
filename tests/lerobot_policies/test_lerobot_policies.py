"""lerobot's own policy classes, pruned without changing them. `make test-lerobot` runs these."""

from __future__ import annotations

import pytest
import torch

import vla_pruner as vp
from checks import fingerprint, near
from ladder import Ladder

# Not "lerobot" alone, which is also the name of this folder.
pytest.importorskip("lerobot.policies", reason="needs lerobot; run `make test-lerobot`")

from tiny_lerobot import CHUNK, batch_of, pi, smolvla

M = 16
FLOW = ("pi0", "pi05", "smolvla", "smolvla-special")
FAMILY = {"pi0": "pi0-policies", "pi05": "pi0-policies"}


@pytest.fixture(scope="module")
def policies():
    made = {}

    def get(name):
        if name not in made:
            with pytest.MonkeyPatch.context() as patch, torch.no_grad():
                if name.startswith("pi"):
                    try:
                        made[name] = pi(patch, name)
                    except ValueError as error:
                        if "incorrect transformer version" not in str(error):
                            raise
                        pytest.skip("lerobot 0.4's pi0 wants files of transformers replaced")
                elif name == "smolvla":
                    made[name] = smolvla(patch)
                else:
                    made[name] = smolvla(patch, special=True, prefix_length=60)
        return made[name]

    return get


def chunk(policy, seed, **options):
    """The chunk that a policy predicts from the same noise for the same observations."""
    torch.manual_seed(seed)
    return policy.predict_action_chunk(batch_of(seed, 56, **options))


@pytest.mark.parametrize("name", FLOW)
@pytest.mark.parametrize("cameras", ["ab", "a"])
def test_flow_policies_with_tokens_removed(policies, name, cameras, proves):
    """Two rows, one padded; with one camera the other is missing."""
    policy = policies(name)
    if cameras == "a" and name.startswith("smolvla"):
        policy.config.empty_cameras = 1
    chunk(policy, 0)  # The first call sets the kernel.
    before, found, reports = fingerprint(policy), {}, {}
    for mode in ("drop", "mask"):
        with vp.prune(policy, keep=0.25, layer=2, window=1, mode=mode) as session:
            found[mode] = [chunk(policy, seed, cameras=cameras) for seed in (1, 2)]
        reports[mode] = session.last
    dropped, masked = reports["drop"], reports["mask"]
    assert dropped.views == (M, M) and dropped.steps == (1, 1)
    assert dropped.tokens_full - dropped.tokens_kept == 2 * M - M // 2
    assert torch.equal(dropped.kept_mask, masked.kept_mask)
    assert dropped.action is not None and float(dropped.action.sum()) > 0
    near(dropped.action, masked.action)
    for a, b in zip(found["drop"], found["mask"], strict=True):
        near(a, b)
    full = [chunk(policy, seed, cameras=cameras) for seed in (1, 2)]
    assert torch.equal(full[0], found["drop"][0])  # the warm-up step
    assert (full[1] - found["drop"][1]).abs().max() > 1e-4
    assert fingerprint(policy) == before
    checks = ("reference", "undo", "batch", "padding", "cameras", "dynamic")
    more = ("missing",) if cameras == "a" else ()
    proves(FAMILY.get(name, "smolvla"), type(policy), *checks, *more)


@pytest.mark.parametrize("name", FLOW)
def test_keeping_everything_changes_nothing(policies, name, proves):
    policy = policies(name)
    expected = chunk(policy, 1)
    with vp.prune(policy, keep=1.0, window=1):
        found = [chunk(policy, 1) for _ in range(2)]
    assert all(torch.equal(one, expected) for one in found)
    proves(FAMILY.get(name, "smolvla"), type(policy), "keep=1.0")


@pytest.mark.parametrize("name", FLOW)
def test_reset_of_the_policy_begins_an_episode(policies, name):
    policy = policies(name)
    with vp.prune(policy, keep=0.25, window=1) as session:
        policy.reset()
        for step in range(4):  # a new chunk at 0 and 3
            policy.select_action(batch_of(step, 56))
        assert session.last.steps == (1, 1)
        policy.reset()
        action = policy.select_action(batch_of(9, 56))
        assert session.last.steps == (0, 0) and action.shape == (2, 7)
        assert session.last.warm_up.all()


def test_smolvla_refuses_what_its_loop_cannot_do(policies):
    policy = policies("smolvla")
    with vp.prune(policy, "fastv"), pytest.raises(RuntimeError, match="already has a pruning"):
        vp.prune(policy, "fastv")
    with pytest.raises(NotImplementedError, match="skips none"):
        vp.prune(policy, Ladder(skip=(3,)))


@pytest.mark.parametrize("cached", [True, False])
def test_fast_with_tokens_removed(policies, cached, proves):
    """The inner model alone: the policy around it needs tokenizers of the hub."""
    model = policies("pi0_fast")
    inputs = batch_of(1, 56)
    images = [inputs[f"observation.images.{name}"] * 2 - 1 for name in "ab"]
    masks = [torch.ones(2, dtype=torch.bool), torch.tensor([True, False])]
    words = (inputs["observation.language.tokens"], inputs["observation.language.attention_mask"])
    sample = "sample_actions_fast_kv_cache" if cached else "sample_actions_fast"
    logits, reports, before = {}, {}, fingerprint(model)
    for mode in ("drop", "mask"):
        seen = []
        head = model.paligemma_with_expert.paligemma.lm_head
        hook = head.register_forward_hook(lambda m, args, out, seen=seen: seen.append(out[:, -1]))
        with vp.prune(model, tokens=8, layer=2, window=1, mode=mode) as session:
            for shift in (0.0, 0.1):
                shown = [image + shift for image in images]
                getattr(model, sample)(shown, masks, *words, max_decoding_steps=4)
        hook.remove()
        logits[mode], reports[mode] = torch.stack(seen), session.last
    assert reports["drop"].steps == (1, 1) and reports["drop"].visual_kept == 8
    assert torch.equal(reports["drop"].kept_mask, reports["mask"].kept_mask)
    assert not reports["drop"].kept_mask[1, M:].any()
    near(logits["drop"], logits["mask"], rel=2e-05)
    assert fingerprint(model) == before
    checks = ("reference", "undo", "batch", "padding", "cameras", "missing")
    proves("pi0-policies", type(model), *checks, "dynamic" if cached else "no cache")


def test_the_chunk_is_what_votes(policies):
    from vla_pruner.models.adapters.pi0 import FlowPolicyAdapter

    adapter = FlowPolicyAdapter(policies("pi0"))
    seen = []

    def rows(length, original=adapter.reader_rows):
        seen.append((length, original(length)))
        return seen[-1][1]

    adapter.reader_rows = rows
    with vp.prune(policies("pi0"), keep=0.25, layer=2, adapter=adapter):
        chunk(policies("pi0"), 1)
    assert {length for length, _ in seen} == {CHUNK + 1}
    assert {str(found) for _, found in seen} == {"None", str(slice(1, CHUNK + 1))}
