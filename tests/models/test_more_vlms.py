"""Every vision-language model of transformers with an image token is pruned as it is."""

from __future__ import annotations

import pytest
import torch
import transformers as T
from test_hf_vlm import IMAGE, TEXT, VISION, generate

import vla_pruner as vp
from checks import fingerprint, randomise
from hidden_columns import dropped, hidden_behind, same

CLIP = {"model_type": "clip_vision_model", "projection_dim": 16, **VISION}
LLAMA, QWEN2 = {"model_type": "llama", **TEXT}, {"model_type": "qwen2", **TEXT}
MISTRAL = {"model_type": "mistral", "sliding_window": None, **TEXT}
ROPE = {"rope_type": "default", "type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
AXES = {**TEXT, "rope_scaling": ROPE, "rope_parameters": ROPE}
ONES = torch.ones(1, 64, dtype=torch.long)
MARKS = dict(image_token_id=IMAGE, video_token_id=91)
PATCHES = dict(pixel_values=(64, 3 * 2 * 14 * 14), image_grid_thw=torch.tensor([[1, 8, 8]]))


def llava_next():
    config = T.LlavaNextConfig(
        vision_config=CLIP,
        text_config=LLAMA,
        image_token_index=IMAGE,
        image_grid_pinpoints=[[56, 56]],
    )
    size = torch.tensor([[56, 56]])
    call = dict(pixel_values=(1, 2, 3, 56, 56), image_sizes=size)
    return T.LlavaNextForConditionalGeneration(config), 16 + 16 + 4, call


def llava_onevision():
    config = T.LlavaOnevisionConfig(
        vision_config={"model_type": "siglip_vision_model", **VISION},
        text_config=QWEN2,
        image_token_index=IMAGE,
        video_token_index=91,
        image_grid_pinpoints=[[56, 56]],
        vision_feature_select_strategy="full",
    )
    call = dict(pixel_values=(1, 2, 3, 56, 56), image_sizes=torch.tensor([[56, 56]]))
    return T.LlavaOnevisionForConditionalGeneration(config), 16 + 16 + 4, call


def vip_llava():
    vision = {**CLIP, "num_hidden_layers": 2}
    config = T.VipLlavaConfig(
        vision_config=vision,
        text_config=LLAMA,
        image_token_index=IMAGE,
        vision_feature_layers=[-1, -2],
    )
    return T.VipLlavaForConditionalGeneration(config), 16, dict(pixel_values=(1, 3, 56, 56))


def idefics2():
    perceiver = dict(resampler_n_latents=8, resampler_depth=1, resampler_n_heads=2)
    config = T.Idefics2Config(
        vision_config=dict(VISION),
        text_config=MISTRAL,
        perceiver_config={**perceiver, "resampler_head_dim": 8, "num_key_value_heads": 1},
        image_token_id=IMAGE,
    )
    return T.Idefics2ForConditionalGeneration(config), 8, dict(pixel_values=(1, 1, 3, 56, 56))


def mistral3():
    config = T.Mistral3Config(
        vision_config={"model_type": "pixtral", **VISION},
        text_config={**MISTRAL, "head_dim": 8},
        image_token_index=IMAGE,
        spatial_merge_size=2,
    )
    call = dict(pixel_values=(1, 3, 56, 56), image_sizes=torch.tensor([[56, 56]]))
    return T.Mistral3ForConditionalGeneration(config), 4, call


def gemma3():
    kinds = {"layer_types": ["full_attention"] * 5}
    config = T.Gemma3Config(
        vision_config={"model_type": "siglip_vision_model", **VISION},
        text_config={"model_type": "gemma3_text", "head_dim": 8, **kinds, **TEXT},
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=92,
        eoi_token_index=93,
    )
    return T.Gemma3ForConditionalGeneration(config), 4, dict(pixel_values=(1, 3, 56, 56))


def got_ocr2():
    vision = dict(hidden_size=16, output_channels=16, num_hidden_layers=1, num_attention_heads=2)
    vision |= dict(image_size=128, patch_size=16, mlp_dim=32, window_size=4)
    config = T.GotOcr2Config(
        vision_config={**vision, "global_attn_indexes": [0]},
        text_config=QWEN2,
        image_token_index=IMAGE,
    )
    return T.GotOcr2ForConditionalGeneration(config), 4, dict(pixel_values=(1, 3, 128, 128))


def qwen3_vl_moe():
    vision = dict(depth=1, num_heads=2, in_chans=3, patch_size=14, spatial_merge_size=2)
    vision |= dict(hidden_size=16, out_hidden_size=32, intermediate_size=32)
    experts = dict(head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    config = T.Qwen3VLMoeConfig(
        text_config={**AXES, **experts},
        vision_config={
            **vision,
            "deepstack_visual_indexes": [0, 0],
            "num_position_embeddings": 64,
        },
        vision_start_token_id=92,
        vision_end_token_id=93,
        **MARKS,
    )
    return T.Qwen3VLMoeForConditionalGeneration(config), 16, PATCHES


def glm4v():
    vision = dict(depth=1, hidden_size=16, num_heads=2, patch_size=14, image_size=112)
    vision |= dict(spatial_merge_size=2, temporal_patch_size=2)
    config = T.Glm4vConfig(
        text_config=AXES,
        vision_config={**vision, "out_hidden_size": 32, "intermediate_size": 32},
        image_start_token_id=92,
        image_end_token_id=93,
        **MARKS,
    )
    return T.Glm4vForConditionalGeneration(config), 16, PATCHES


def lfm2_vl():
    kinds = ["conv", "full_attention", "full_attention", "full_attention", "full_attention"]
    vision = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    config = T.Lfm2VlConfig(
        vision_config={"model_type": "siglip2_vision_model", "patch_size": 14, **vision},
        text_config={"model_type": "lfm2", "layer_types": kinds, **TEXT},
        image_token_id=IMAGE,
        projector_hidden_size=32,
    )
    call = dict(pixel_values=(1, 64, 3 * 14 * 14), spatial_shapes=torch.tensor([[8, 8]]))
    return T.Lfm2VlForConditionalGeneration(config), 16, {**call, "pixel_attention_mask": ONES}


BUILD = (
    llava_next,
    llava_onevision,
    vip_llava,
    idefics2,
    mistral3,
    gemma3,
    got_ocr2,
    qwen3_vl_moe,
    glm4v,
    lfm2_vl,
)


@pytest.mark.parametrize("build", BUILD, ids=lambda build: build.__name__)
def test_dropped_tokens_are_as_if_nobody_saw_them(build, proves):
    model, count, call = build()
    model = randomise(model)
    ids = torch.tensor([[5, 92, *[IMAGE] * count, 93, 7, 8, 9]])
    inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
    for name, value in call.items():
        inputs[name] = torch.randn(value) if isinstance(value, tuple) else value
    if "image_grid_thw" in call:
        inputs["mm_token_type_ids"] = (ids == IMAGE).int()
    if build is gemma3:
        inputs["token_type_ids"] = (ids == IMAGE).long()
    full, before = generate(model, inputs), fingerprint(model)
    with vp.prune(model, "fastv", keep=0.25, layer=2) as session:
        pruned = generate(model, inputs)
        report = session.last
    assert (report.visual_full, report.visual_kept) == (count, max(1, round(count / 4)))
    with hidden_behind(session.decoder, 2, dropped(report, ids == IMAGE)):
        expected = generate(model, inputs)
    same(torch.stack(pruned.logits), torch.stack(expected.logits))
    assert fingerprint(model) == before
    assert torch.equal(generate(model, inputs).logits[0], full.logits[0])
    proves("hf-vlm", type(model), "reference", "dynamic", "undo")
