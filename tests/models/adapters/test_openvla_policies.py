"""The OpenVLA classes of their authors, as doubles, pruned without changing them."""

from __future__ import annotations

import pytest
import torch
from openvla_doubles import (
    BOS,
    EMPTY,
    SLOTS,
    OpenVLAForActionPrediction,
    OpenVLAForActionPredictionOFT,
    PrismaticConfig,
    head,
)

import vla_pruner as vp
from checks import fingerprint, near, randomise
from vla_pruner.measure.doctor import examine

FAMILY, M, KEEP = "openvla-remote", 16, 5
PROMPT = torch.tensor([[BOS, 7, 8, 9, 10]])


@pytest.fixture(scope="module")
def openvla():
    with torch.no_grad():
        return randomise(OpenVLAForActionPrediction(PrismaticConfig()))


def frame(seed: int, images: int = 1) -> torch.Tensor:
    return torch.randn(1, 3 * images, 32, 32, generator=torch.Generator().manual_seed(seed))


def act(model, pixels):
    return model.predict_action(
        PROMPT, pixel_values=pixels, attention_mask=torch.ones(1, 6, dtype=torch.long)
    )


def test_without_a_session_newer_transformers_hide_the_image(openvla):
    assert torch.equal(act(openvla, frame(1)), act(openvla, frame(2)))


def test_the_image_is_seen_while_attached(openvla, proves):
    before = fingerprint(openvla)
    blind = act(openvla, frame(1))
    with vp.prune(openvla, "none") as session:
        first, second = act(openvla, frame(1)), act(openvla, frame(2))
        assert session.last.visual_full == M and session.last.steps == (1,)
    assert not torch.equal(first, second)
    inputs = dict(input_ids=torch.cat([PROMPT, torch.full((1, 1), EMPTY)], 1), use_cache=True)
    output = openvla(**inputs, pixel_values=frame(1))
    written = [int(output.logits[0, -1].argmax())]
    for _ in range(6):
        token = torch.tensor([[written[-1]]])
        output = openvla(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        written.append(int(output.logits[0, -1].argmax()))
    assert first.tolist() == written
    assert fingerprint(openvla) == before
    assert torch.equal(act(openvla, frame(1)), blind)
    proves(FAMILY, OpenVLAForActionPrediction, "undo", double=True)


def test_doctor_finds_the_hidden_image_and_what_mends_it(openvla):
    def show(pixels):
        return act(openvla, torch.from_numpy(pixels[:32, :32]).permute(2, 0, 1)[None] / 255)

    family, blind, mended = examine(openvla, show)
    assert family.well and not blind.well and "image never reaches" in blind.advice
    assert mended.well and f"{M} visual tokens" in mended.found and "empty cache" in mended.advice


@pytest.mark.parametrize("method", ["vla-pruner", "fastv"])
def test_openvla_with_tokens_removed(openvla, method, proves):
    logits, reports = {}, {}
    for mode in ("drop", "mask"):
        seen: list[torch.Tensor] = []
        hook = openvla.language_model.register_forward_hook(
            lambda module, args, output, seen=seen: seen.append(output.logits[:, -1])
        )
        options = {"window": 1} if method == "vla-pruner" else {}
        with vp.prune(openvla, method, tokens=KEEP, layer=2, mode=mode, **options) as session:
            for seed in (1, 2):
                act(openvla, frame(seed))
        hook.remove()
        logits[mode], reports[mode] = torch.stack(seen), session.last
    assert reports["drop"].tokens_kept == 1 + KEEP + 5
    assert torch.equal(reports["drop"].kept_mask, reports["mask"].kept_mask)
    near(logits["drop"], logits["mask"])
    proves(FAMILY, OpenVLAForActionPrediction, "reference", "dynamic", double=True)


def test_a_class_that_puts_the_image_elsewhere(openvla):
    def swapped(module, args, output):
        return output.flip(1).clone()

    with vp.prune(openvla, "fastv", tokens=KEEP, layer=2):
        hook = openvla.projector.register_forward_hook(swapped)
        with pytest.raises(ValueError, match="did not put its 16 image tokens"):
            act(openvla, frame(1))
        hook.remove()


@pytest.fixture(scope="module")
def oft():
    with torch.no_grad():
        return randomise(OpenVLAForActionPredictionOFT(PrismaticConfig(), images=2))


@pytest.mark.parametrize("steps", [(), (0.9, 0.5, 0.1)], ids=["l1", "diffusion"])
@pytest.mark.parametrize("proprio", [False, True])
def test_oft_with_tokens_removed(oft, steps, proprio, proves):
    tools = head(steps)
    arguments = dict(
        attention_mask=torch.ones_like(PROMPT),
        action_head=tools,
        noisy_action_projector=tools.noisy,
    )
    if proprio:
        arguments |= dict(proprio=torch.randn(1, 4), proprio_projector=tools.proprio)
    full = oft.predict_action(PROMPT, pixel_values=frame(2, images=2), **arguments)
    # transformers put its own hooks on the layers in that call, as hidden states were asked for.
    before, found, reports = fingerprint(oft), {}, {}
    for mode in ("drop", "mask"):
        with vp.prune(oft, keep=0.25, layer=2, window=1, mode=mode) as session:
            for seed in (1, 2):
                pixels = frame(seed, images=2)
                found[mode] = oft.predict_action(PROMPT, pixel_values=pixels, **arguments)
        reports[mode] = session.last
    dropped, masked = reports["drop"], reports["mask"]
    assert dropped.views == (M, M) and dropped.steps == (1,)
    assert dropped.tokens_full == 2 * M + proprio + bool(steps) + PROMPT.shape[1] + SLOTS + 1
    assert dropped.tokens_full - dropped.tokens_kept == 2 * M - M // 2
    assert torch.equal(dropped.kept_mask, masked.kept_mask)
    near(dropped.action, masked.action)
    for a, b in zip(found["drop"], found["mask"], strict=True):
        near(a, b)
    assert (full[1] - found["drop"][1]).abs().max() > 1e-3
    assert fingerprint(oft) == before
    after = oft.predict_action(PROMPT, pixel_values=frame(2, images=2), **arguments)
    assert all(torch.equal(a, b) for a, b in zip(after, full, strict=True))
    proves(FAMILY, type(oft), "reference", "undo", "cameras", "no cache", double=True)


def test_oft_action_rows_are_those_that_feed_the_head(oft):
    from vla_pruner.models.adapters.openvla import OpenVLAPolicyAdapter

    found = []

    class Noting(OpenVLAPolicyAdapter):
        def layout(self, inputs, kwargs):
            found.append(super().layout(inputs, kwargs))
            return found[-1]

    tools = head()
    with vp.prune(oft, "none", adapter=Noting(oft)):
        oft.predict_action(
            PROMPT,
            pixel_values=frame(1, images=2),
            attention_mask=torch.ones_like(PROMPT),
            action_head=tools,
        )
    length = 2 * M + PROMPT.shape[1] + SLOTS + 1
    first = 2 * M + PROMPT.shape[1] - 1  # the last word of the prompt
    rows = list(range(length))[found[0].action_rows]
    assert rows == list(range(first, first + SLOTS))
    words = found[0].text_rows
    assert words[words >= 0].tolist() == list(range(2 * M + 1, first + 1))
