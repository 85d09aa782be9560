"""GR00T of lerobot, as a double: a head that reads the decoder's output in layers of its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from groot_double import HORIZON, PATCHES, GrootPolicy, observation

import vla_pruner as vp
from checks import fingerprint, randomise
from vla_pruner.measure.doctor import examine
from vla_pruner.models.adapters.groot import GrootAdapter


@pytest.fixture(scope="module")
def policy():
    with torch.no_grad():
        return randomise(GrootPolicy())


def act(model, seed):
    return model.predict_action_chunk(observation(seed))


@pytest.mark.parametrize("method", ["vla-pruner", "fastv", "divprune"])
@pytest.mark.parametrize("layer", [1, 4])
def test_tokens_removed_equals_tokens_hidden(policy, method, layer, proves):
    before, found, reports = fingerprint(policy), {}, {}
    options = {"window": 1} if method == "vla-pruner" else {}
    for mode in ("drop", "mask"):
        with vp.prune(policy, method, keep=0.25, layer=layer, mode=mode, **options) as session:
            found[mode] = torch.stack([act(policy, seed) for seed in (1, 2)])
        reports[mode] = session.last
    dropped, masked = reports["drop"], reports["mask"]
    assert dropped.views == (PATCHES, PATCHES) and dropped.visual_kept == PATCHES // 2
    assert torch.equal(dropped.kept_mask, masked.kept_mask)
    torch.testing.assert_close(found["drop"], found["mask"], rtol=0, atol=1e-5)
    full = act(policy, 2)
    assert (full - found["drop"][1]).abs().max() > 1e-4
    assert fingerprint(policy) == before and torch.equal(act(policy, 2), full)
    checks = ("reference", "undo", "batch", "padding", "cameras", "dynamic")
    proves("groot", GrootPolicy, *checks, double=True)


def test_keeping_everything_changes_nothing(policy, proves):
    expected = act(policy, 1)
    with vp.prune(policy, keep=1.0, window=1):
        found = [act(policy, 1) for _ in range(2)]
    assert all(torch.equal(one, expected) for one in found)
    proves("groot", GrootPolicy, "keep=1.0", double=True)


def test_layers_of_the_head_are_counted_by_themselves(policy):
    """Two of its eight blocks attend to image tokens; the decoder has six layers."""
    with vp.prune(policy, keep=0.25, action_layers=(0, 1)) as session:
        act(policy, 1)
        assert session.last.action.shape == (2, 2 * PATCHES)
    with pytest.raises(ValueError, match="action layer 2 does not exist"):
        vp.prune(policy, keep=0.25, action_layers=(2,))


@pytest.mark.parametrize(("steps", "skipped"), [("latter-half", 2), ("all", 0)])
def test_the_chunk_votes_in_the_steps_that_are_asked_for(policy, steps, skipped):
    adapter, seen = GrootAdapter(policy, flow_steps=steps), []

    def rows(length, original=adapter.reader_rows):
        seen.append(original(length))
        return seen[-1]

    adapter.reader_rows = rows
    with vp.prune(policy, keep=0.25, action_layers=(1,), adapter=adapter) as session:
        act(policy, 1)
    assert seen.count(None) == skipped
    assert {str(found) for found in seen if found} == {str(slice(1, HORIZON + 1))}
    # Blocks that attend to images give them all of their attention.
    assert torch.allclose(session.last.action.sum(1), torch.ones(2), atol=1e-5)


def test_a_prompt_without_images_is_left_alone(policy):
    vlm = policy._groot_model.backbone.model
    with vp.prune(policy, "fastv", keep=0.25, layer=2) as session:
        act(policy, 1)
        assert session.left.rows is not None
        vlm.language_model(inputs_embeds=torch.randn(2, 6, 32))
        assert session.left is None
    assert "past its top module" in session.last.left_alone


def test_doctor_finds_nothing_wrong(policy):
    shown = observation(0)

    def show(frame: np.ndarray):
        image = torch.from_numpy(frame[:32, :32]).permute(2, 0, 1)[None].float() / 255
        return policy.predict_action_chunk({**shown, "pixel_values": image.expand(4, -1, -1, -1)})

    findings = examine(policy, show)
    assert all(finding.well for finding in findings), findings


def test_not_built_like_groot(policy):
    with pytest.raises(TypeError, match="no `backbone` and `action_head`"):
        GrootAdapter(policy._groot_model.backbone)
