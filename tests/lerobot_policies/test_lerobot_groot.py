"""GR00T of lerobot, pruned without changing it. `make test-lerobot` runs these."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

import vla_pruner as vp
from checks import fingerprint, near

pytest.importorskip("lerobot.policies", reason="needs lerobot; run `make test-lerobot`")
if find_spec("lerobot.policies.groot") is None or find_spec("diffusers") is None:
    pytest.skip("needs GR00T of lerobot: lerobot[groot]", allow_module_level=True)

from tiny_groot import CHUNK, IMAGE, PATCHES, groot_batch, n15, n17

from vla_pruner.models.adapters.groot import GrootAdapter

VERSION = "n15" if find_spec("lerobot.policies.groot.groot_n1") is not None else "n17"
# N1.7's head looks at text and at images in turn; N1.5's, and an option of N1.7's, at both at once.
NAMES = ["n15"] if VERSION == "n15" else ["alternating", "mixing"]
HEADS = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    made = {}

    def get(name):
        if name not in made:
            with pytest.MonkeyPatch.context() as patch, torch.no_grad():
                folder = tmp_path_factory.mktemp(name)
                if name == "n15":
                    made[name] = n15(patch)
                else:
                    made[name] = n17(folder, alternate=name == "alternating")
        return made[name]

    return get


def chunk(policy, seed, **options):
    """The chunk that a policy predicts from the same noise for the same observations."""
    torch.manual_seed(seed)
    return policy.predict_action_chunk(groot_batch(seed, VERSION, **options))


@HEADS
def test_tokens_removed_equals_tokens_hidden(policies, name, proves):
    """In the backbone, in the head's self-attention over its output, and in the transformer."""
    policy = policies(name)
    chunk(policy, 0)  # Its first call leaves notes in the backbone.
    before, found, reports = fingerprint(policy), {}, {}
    for mode in ("drop", "mask"):
        with vp.prune(policy, keep=0.25, layer=2, window=1, mode=mode) as session:
            found[mode] = [chunk(policy, seed) for seed in (1, 2)]
        reports[mode] = session.last
    dropped, masked = reports["drop"], reports["mask"]
    assert dropped.views == (PATCHES, PATCHES) and dropped.steps == (1, 1)
    assert dropped.tokens_full - dropped.tokens_kept == 2 * PATCHES - PATCHES // 2
    assert torch.equal(dropped.kept_mask, masked.kept_mask)
    assert dropped.action is not None and float(dropped.action.sum()) > 0
    near(dropped.action, masked.action)
    assert not dropped.action[~dropped.kept_mask].any()
    for a, b in zip(found["drop"], found["mask"], strict=True):
        near(a, b)
    full = [chunk(policy, seed) for seed in (1, 2)]
    assert torch.equal(full[0], found["drop"][0])  # the warm-up step
    assert (full[1] - found["drop"][1]).abs().max() > 1e-4
    assert fingerprint(policy) == before
    checks = ("reference", "undo", "batch", "padding", "cameras", "dynamic")
    proves("groot", type(policy), *checks)


def test_the_head_gets_what_is_left(policies):
    policy = policies(NAMES[0])
    lengths = []
    head = policy._groot_model.action_head
    handle = head.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["encoder_hidden_states"].shape[1]),
        with_kwargs=True,
    )
    with vp.prune(policy, "fastv", keep=0.5, layer=2) as session:
        chunk(policy, 1)
    handle.remove()
    assert set(lengths) == {session.last.tokens_kept}


@HEADS
def test_keeping_everything_changes_nothing(policies, name, proves):
    policy = policies(name)
    expected = chunk(policy, 1)
    with vp.prune(policy, keep=1.0, layer=2, window=1):
        found = [chunk(policy, 1) for _ in range(2)]
    assert all(torch.equal(one, expected) for one in found)
    proves("groot", type(policy), "keep=1.0")


def test_a_batch_in_which_one_episode_warms_up(policies):
    """Its rows see everything, the others what they see alone."""
    policy = policies(NAMES[0])
    with vp.prune(policy, keep=0.25, layer=2, window=1) as session:
        session.episodes(["a", "b"])
        chunk(policy, 1)
        pruned = chunk(policy, 2)
        session.reset(["b"])
        mixed = chunk(policy, 2)
        assert session.last.warm_up.tolist() == [False, True]
    full = chunk(policy, 2)
    near(mixed[1], full[1])
    assert (mixed[0] - full[0]).abs().max() > 1e-4 and (pruned[1] - full[1]).abs().max() > 1e-4


@HEADS
def test_action_score_is_the_attention_of_the_chunk(policies, name):
    """Against probabilities worked out from the blocks' own inputs, one by one."""
    policy = policies(name)
    transformer = policy._groot_model.action_head.model
    # Every second block attends to itself; alternating heads look at text in every fourth.
    watched = [6] if name == "alternating" else [4, 6]
    steps = []

    def record(index):
        def hook(attention, args, kwargs, output):
            query = attention.to_q(args[0]).unflatten(-1, (4, 8)).transpose(1, 2)
            key = attention.to_k(kwargs["encoder_hidden_states"])
            key = key.unflatten(-1, (4, 8)).transpose(1, 2)
            logits = query @ key.mT / 8**0.5
            mask = kwargs["attention_mask"]
            if mask is not None:
                logits = logits.masked_fill(~mask[:, None, None], -torch.inf)
            steps.append(logits.softmax(-1)[:, :, -CHUNK:].mean(dim=(1, 2)))

        return transformer.transformer_blocks[index].attn1.register_forward_hook(
            hook, with_kwargs=True
        )

    undo = [record(index) for index in watched]
    with vp.prune(policy, keep=0.25, layer=2) as session:
        chunk(policy, 1)
        found = session.last.action
    for handle in undo:
        handle.remove()
    ids = next(value for key, value in groot_batch(1, VERSION).items() if "input_ids" in key)
    expected = torch.stack(steps)[-2 * len(watched) :].mean(0)  # the last two of four flow steps
    expected = expected[ids == IMAGE].view(2, 2 * PATCHES)
    near(found, expected)


def test_reset_of_the_policy_begins_an_episode(policies):
    policy = policies(NAMES[0])
    with vp.prune(policy, keep=0.25, layer=2, window=1) as session:
        policy.reset()
        for step in range(4):  # a new chunk at 0 and 3
            policy.select_action(groot_batch(step, VERSION))
        assert session.last.steps == (1, 1)
        policy.reset()
        action = policy.select_action(groot_batch(9, VERSION))
        assert session.last.steps == (0, 0) and action.shape == (2, 7)
        assert session.last.warm_up.all()


@pytest.mark.skipif(VERSION == "n15", reason="N1.5 adds image features in no layer")
def test_refuses_a_cut_before_image_features_are_added(policies):
    with pytest.raises(ValueError, match="use `layer` >= 1"):
        vp.prune(policies(NAMES[0]), "random", keep=0.25, layer=0)


def test_refuses_a_head_that_numbers_its_tokens(policies):
    policy = policies(NAMES[0])
    block = policy._groot_model.action_head.vl_self_attention.transformer_blocks[0]
    block.pos_embed = torch.nn.Identity()
    try:
        with pytest.raises(NotImplementedError, match="adds positions"):
            vp.prune(policy, keep=0.25)
    finally:
        block.pos_embed = None


def test_refuses_another_choice_of_flow_steps(policies):
    with pytest.raises(ValueError, match="latter-half"):
        GrootAdapter(policies(NAMES[0]), flow_steps="first")
