"""OpenVLA: sequence layout, padding, teacher forcing, greedy action tokens, and real sizes."""

import numpy as np
import pytest
import torch
from tiny_openvla import make_oft, make_openvla, sizes

from checks import near
from vla_pruner.models.openvla import OpenVLA, OpenVLAConfig, OpenVLAOFT, OpenVLAOFTConfig
from vla_pruner.models.openvla.modeling import insert_after_bos

BOTH = pytest.mark.parametrize("attention", ["sdpa", "eager"])


def prompts(batch: int = 2, length: int = 9) -> torch.Tensor:
    ids = torch.randint(5, 20, (batch, length), generator=torch.Generator().manual_seed(1))
    ids[:, 0], ids[:, -1] = 1, 4
    return ids


def pixels(batch: int = 2, cameras: int = 1) -> torch.Tensor:
    return torch.randn(batch, 6 * cameras, 32, 32, generator=torch.Generator().manual_seed(2))


def padded(ids: torch.Tensor, pads: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of `ids` cut short at the front by nothing, with `pads` pad tokens before them."""
    longest = ids.shape[1] + max(pads)
    rows, masks = [], []
    for row, pad in zip(ids, pads, strict=True):
        kept = row[: longest - pad]
        filled = longest - len(kept)
        rows.append(torch.cat([torch.full((filled,), 3), kept]))
        masks.append(torch.cat([torch.zeros(filled), torch.ones(len(kept))]).long())
    return torch.stack(rows), torch.stack(masks)


def test_visual_tokens_stand_behind_bos_and_move_with_the_padding() -> None:
    words = torch.arange(1.0, 6.0).view(1, 5, 1).repeat(2, 1, 1)
    visual = torch.tensor([101.0, 102.0, 103.0]).view(1, 3, 1).repeat(2, 1, 1)
    assert insert_after_bos(words, visual)[0, :, 0].tolist() == [1, 101, 102, 103, 2, 3, 4, 5]
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    both = insert_after_bos(words, visual, mask)[:, :, 0].tolist()
    assert both == [[1, 101, 102, 103, 2, 3, 4, 5], [1, 2, 3, 101, 102, 103, 4, 5]]


@BOTH
@torch.no_grad()
def test_left_padding_changes_nothing(attention: str) -> None:
    model = make_openvla(attn_implementation=attention)
    ids, image = prompts(), pixels()
    longer, mask = padded(ids, [4, 1])
    expected = model.training_logits(ids, image)
    logits = model.training_logits(longer, image, mask)
    near(logits[:, 4:], expected)
    assert torch.equal(model.predict_tokens(longer, image, mask), model.predict_tokens(ids, image))


@torch.no_grad()
def test_a_batch_of_different_lengths_is_its_rows_alone() -> None:
    model = make_openvla()
    ids, image = prompts(length=9), pixels()
    short = torch.cat([ids[1:, :5], ids[1:, -1:]], dim=1)
    batch = torch.stack([ids[0], torch.cat([torch.full((3,), 3), short[0]])])
    mask = torch.tensor([[1] * 9, [0] * 3 + [1] * 6])
    logits = model.training_logits(batch, image, mask, last=1)
    torch.testing.assert_close(logits[:1], model.training_logits(ids[:1], image[:1], last=1))
    torch.testing.assert_close(logits[1:], model.training_logits(short, image[1:], last=1))


@torch.no_grad()
def test_teacher_forced_rows_predict_the_next_token() -> None:
    model = make_openvla()
    ids, image = prompts(), pixels()
    logits = model.training_logits(ids, image)
    assert logits.shape == (2, 9, 512)
    for end in (5, 9):  # the prediction after `end` prompt tokens, from a run that sees no more
        alone = model.training_logits(ids[:, :end], image, last=1)
        near(logits[:, end - 1 : end], alone)
    torch.testing.assert_close(model.training_logits(ids, image, last=3), logits[:, -3:])


@torch.enable_grad()
def test_every_parameter_learns() -> None:
    model = make_openvla()
    model.training_logits(prompts(), pixels()).square().mean().backward()
    still = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []


@BOTH
@torch.no_grad()
def test_action_tokens_are_the_greedy_ones_without_a_cache(attention: str) -> None:
    model = make_openvla(attn_implementation=attention)
    ids, image = prompts(), pixels()
    tokens = model.predict_tokens(ids, image)
    assert tokens.shape == (2, 7)
    for _ in range(7):
        ids = torch.cat([ids, model.training_logits(ids, image, last=1)[:, -1:].argmax(-1)], 1)
    assert torch.equal(tokens, ids[:, 9:])


def test_the_decoder_never_sees_the_last_token_and_runs_seven_times() -> None:
    model, lengths = make_openvla(), []
    model.language_model.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(
            next(
                v.shape[1]
                for k in ("input_ids", "inputs_embeds")
                if (v := kwargs.get(k)) is not None
            )
        ),
        with_kwargs=True,
    )
    model.predict_tokens(prompts(), pixels())
    assert lengths == [16 + 9, 1, 1, 1, 1, 1, 1]


@torch.no_grad()
def test_the_image_matters() -> None:
    model, ids = make_openvla(), prompts(1)
    black, white = -torch.ones(1, 6, 32, 32), torch.ones(1, 6, 32, 32)
    first, second = (model.training_logits(ids, image, last=1) for image in (black, white))
    assert (first - second).abs().max() > 1e-3


def test_action_tokens_encode_and_decode() -> None:
    model = make_openvla()
    values = np.array([-1.0, -0.999, 0.0, 0.5, 1.0, 7.0])
    tokens = model.encode_actions(values)
    assert tokens.tolist()[0] == 512 - 64 - 1  # bin 0 is the last token before the padding
    assert tokens.min() == 512 - 64 - 256
    decoded = model.decode_actions(tokens)
    assert np.abs(decoded - np.clip(values, -1, 1)).max() <= 1 / 255 + 1e-12
    assert model.decode_actions(np.array([511, 5])).tolist() == [
        model.bin_centers[0],
        model.bin_centers[-1],
    ]


@pytest.mark.parametrize("change", [torch.bfloat16, torch.float16])
def test_rotary_frequencies_stay_fp32(change: torch.dtype) -> None:
    model = make_openvla()
    before = model.language_model.model.rotary_emb.inv_freq.clone()
    model.to(change)
    assert model.dtype == change
    assert torch.equal(model.language_model.model.rotary_emb.inv_freq, before)


def test_built_in_bf16_without_undefined_memory() -> None:
    model = make_openvla(dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(p.isfinite().all() and p.abs().max() < 10 for p in model.parameters())
    assert torch.equal(
        model.language_model.model.rotary_emb.inv_freq,
        make_openvla().language_model.model.rotary_emb.inv_freq,
    )


def test_published_sizes() -> None:
    model = OpenVLA.from_config("openvla-7b", device="meta")
    assert isinstance(model, OpenVLA) and not isinstance(model, OpenVLAOFT)
    # The published 7,541,237,184 less DINOv2's block 23, SigLIP's block 26 and pooling head, norms.
    assert sum(p.numel() for p in model.parameters()) == 7_541_237_184 - 43_080_480
    assert model.dtype == torch.bfloat16 and model.config.views == (256,)
    state = model.state_dict()
    assert state["vision_backbone.featurizer.pos_embed"].shape == (1, 256, 1024)
    assert state["vision_backbone.featurizer.reg_token"].shape == (1, 4, 1024)
    assert state["vision_backbone.featurizer.blocks.22.ls2.scale_factor"].shape == (1024,)
    assert state["vision_backbone.fused_featurizer.blocks.25.mlp.fc1.weight"].shape == (4304, 1152)
    assert state["projector.fc1.weight"].shape == (8704, 2176)
    assert state["language_model.lm_head.weight"].shape == (32064, 4096)
    assert "vision_backbone.featurizer.blocks.23.norm1.weight" not in state

    oft = OpenVLA.from_config("openvla-oft-7b", device="meta", text_layers=2)
    assert isinstance(oft, OpenVLAOFT)
    state = oft.state_dict()
    assert state["action_head.model.layer_norm1.weight"].shape == (7 * 4096,)
    assert state["action_head.model.mlp_resnet_blocks.1.ffn.1.weight"].shape == (4096, 4096)
    assert state["action_head.model.fc2.weight"].shape == (7, 4096)
    assert state["proprio_projector.fc1.weight"].shape == (4096, 8)
    assert len(oft.language_model.model.layers) == 2 and oft.config.views == (256, 256)


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="openvla-7b, openvla-oft-7b"):
        OpenVLA.from_config("openvla-13b")
    with pytest.raises(ValueError, match="choose one of sdpa, eager"):
        OpenVLA(OpenVLAConfig(**sizes()), attn_implementation="flash")
    with pytest.raises(TypeError, match="OpenVLAOFT is built from a OpenVLAOFTConfig"):
        OpenVLAOFT(OpenVLAConfig(**sizes()))
    with pytest.raises(TypeError, match="OpenVLA is built from a OpenVLAConfig"):
        OpenVLA(OpenVLAOFTConfig(**sizes()))


# ---------------------------------------------------------------------- OpenVLA-OFT
def state(batch: int = 2) -> torch.Tensor:
    return torch.rand(batch, 8, generator=torch.Generator().manual_seed(3)) * 2 - 1


@BOTH
@torch.no_grad()
def test_oft_left_padding_changes_nothing(attention: str) -> None:
    model = make_oft(attn_implementation=attention)
    ids, image = prompts(), pixels(cameras=2)
    actions = model(ids, image, state())
    assert actions.shape == (2, 4, 7)
    longer, mask = padded(ids, [3, 3])
    near(model(longer, image, state(), mask), actions)
    short = torch.cat([ids[1:, :5], ids[1:, -1:]], dim=1)
    batch = torch.stack([ids[0], torch.cat([torch.full((3,), 3), short[0]])])
    mixed = model(batch, image, state(), torch.tensor([[1] * 9, [0] * 3 + [1] * 6]))
    near(mixed[:1], actions[:1])
    alone = model(short, image[1:], state()[1:])
    near(mixed[1:], alone)


@torch.no_grad()
def test_oft_rows_are_one_before_the_slots_or_the_slots() -> None:
    previous, slot = make_oft(), make_oft(read="slot")
    seen: list[torch.Tensor] = []
    for model in (previous, slot):
        model.language_model.model.register_forward_hook(
            lambda module, args, output: seen.append(output.last_hidden_state)
        )
    ids, image = prompts(), pixels(cameras=2)
    first = previous.action_hidden(ids, image, state())
    second = slot.action_hidden(ids, image, state())
    length = 1 + 32 + 1 + 8 + 28 + 1  # BOS, visual, state, rest of the prompt, slots, stop
    assert seen[0].shape[1] == length and torch.equal(seen[0], seen[1])
    last_prompt_token = 1 + 32 + 1 + 8 - 1
    assert torch.equal(
        first.flatten(), seen[0][:, last_prompt_token : last_prompt_token + 28].flatten()
    )
    assert torch.equal(second.flatten(), seen[0][:, -29:-1].flatten())


@torch.no_grad()
def test_oft_embeds_bos_visual_state_prompt_zero_slots_stop() -> None:
    model, inputs = make_oft(), []
    model.language_model.model.register_forward_pre_hook(
        lambda module, args, kwargs: inputs.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    ids, image = prompts(1), pixels(1, cameras=2)
    model(ids, image, state(1))
    table = model.language_model.get_input_embeddings()
    expected = torch.cat(
        [
            table(ids[:, :1]),
            model.visual_embeds(image),
            model.proprio_projector(state(1))[:, None],
            table(ids[:, 1:]),
            torch.zeros(1, 28, 64),
            table(torch.tensor([[2]])),
        ],
        dim=1,
    )
    assert torch.equal(inputs[0], expected)


@BOTH
@torch.no_grad()
def test_oft_sees_in_both_directions(attention: str) -> None:
    model, hidden = make_oft(attn_implementation=attention), []
    model.language_model.model.register_forward_hook(
        lambda module, args, output: hidden.append(output.last_hidden_state)
    )
    ids, image = prompts(1), pixels(1, cameras=2)
    for stop in (2, 17):  # the very last token of the sequence
        object.__setattr__(model.config, "stop_token_id", stop)
        model(ids, image, state(1))
    changed = (hidden[0] - hidden[1]).abs().amax(-1)[0]
    assert (changed > 1e-7).all()


@torch.no_grad()
def test_oft_state_and_every_camera_matter() -> None:
    model = make_oft()
    ids, image = prompts(1), pixels(1, cameras=2)
    actions = model(ids, image, state(1))
    assert (model(ids, image, -state(1)) - actions).abs().max() > 1e-4
    for camera in range(2):
        changed = image.clone()
        changed[:, 6 * camera : 6 * camera + 6] += 1
        assert (model(ids, changed, state(1)) - actions).abs().max() > 1e-4


@torch.enable_grad()
def test_oft_learns() -> None:
    model = make_oft()
    model(prompts(), pixels(cameras=2), state()).abs().mean().backward()
    still = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == ["language_model.lm_head.weight"]


def test_oft_without_a_state_has_no_projector_and_says_so() -> None:
    model = make_oft(proprio_dim=None)
    assert not hasattr(model, "proprio_projector")
    with pytest.raises(ValueError, match="reads no robot state"):
        model(prompts(), pixels(cameras=2), state())
    with pytest.raises(ValueError, match=r"give `proprio` \[B, 8\]"):
        make_oft()(prompts(), pixels(cameras=2))
    with pytest.raises(ValueError, match="'previous' or 'slot'"):
        OpenVLAOFTConfig(**sizes(), read="next")
    with pytest.raises(ValueError, match="'q99' or 'min-max'"):
        OpenVLAOFTConfig(**sizes(), bounds="std")
