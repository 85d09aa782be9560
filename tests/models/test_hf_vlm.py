"""Unmodified vision-language models of transformers, pruned inside `generate`."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn

import vla_pruner as vp
from checks import fingerprint, near
from ladder import Ladder

IMAGE, M, KEEP = 90, 16, 5
TEXT = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=5,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=97,
    max_position_embeddings=256,
)
VISION = dict(
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=56,
    patch_size=14,
)


def paligemma():
    config = transformers.PaliGemmaConfig(
        vision_config={"model_type": "siglip_vision_model", "projection_dim": 32, **VISION},
        text_config={"model_type": "gemma", "head_dim": 8, **TEXT},
        projection_dim=32,
        hidden_size=32,
        image_token_index=IMAGE,
    )
    ids = [IMAGE] * M + [2, 7, 8, 9]
    return transformers.PaliGemmaForConditionalGeneration(config), ids, (3, 56, 56)


def llava():
    config = transformers.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", "projection_dim": 16, **VISION},
        text_config={"model_type": "llama", **TEXT},
        image_token_index=IMAGE,
    )
    ids = [1, 5] + [IMAGE] * M + [7, 8, 9]
    return transformers.LlavaForConditionalGeneration(config), ids, (3, 56, 56)


def smolvlm():
    config = transformers.SmolVLMConfig(
        vision_config=dict(VISION),
        text_config={"model_type": "llama", **TEXT},
        image_token_id=IMAGE,
        scale_factor=1,
    )
    ids = [1] + [IMAGE] * M + [7, 8, 9]
    return transformers.SmolVLMForConditionalGeneration(config), ids, (1, 3, 56, 56)


def idefics3():
    config = transformers.Idefics3Config(
        vision_config=dict(VISION),
        text_config={"model_type": "llama", **TEXT},
        image_token_id=IMAGE,
        scale_factor=1,
    )
    ids = [1] + [IMAGE] * M + [7, 8, 9]
    return transformers.Idefics3ForConditionalGeneration(config), ids, (1, 3, 56, 56)


def internvl():
    size = {"image_size": [56, 56], "patch_size": [7, 7]}
    config = transformers.InternVLConfig(
        vision_config={**VISION, **size},
        text_config={"model_type": "qwen2", **TEXT},
        image_token_id=IMAGE,
        downsample_ratio=0.5,
    )
    ids = [1, 92] + [IMAGE] * M + [93, 7, 8, 9]
    return transformers.InternVLForConditionalGeneration(config), ids, (3, 56, 56)


def qwen(version):
    rope = {"rope_type": "default", "type": "default", "mrope_section": [1, 1, 2]}
    text = {**TEXT, "rope_scaling": rope, "rope_parameters": {**rope, "rope_theta": 1e4}}
    vision = dict(depth=1, num_heads=2, in_chans=3, patch_size=14, spatial_merge_size=2)
    if version == "3":
        kinds = (transformers.Qwen3VLConfig, transformers.Qwen3VLForConditionalGeneration)
        text["head_dim"] = 8
        vision.update(
            hidden_size=16,
            out_hidden_size=32,
            intermediate_size=32,
            deepstack_visual_indexes=[0, 0],
            num_position_embeddings=64,
        )
    elif version == "2":
        kinds = (transformers.Qwen2VLConfig, transformers.Qwen2VLForConditionalGeneration)
        vision.update(embed_dim=16, hidden_size=32)
    else:
        kinds = (transformers.Qwen2_5_VLConfig, transformers.Qwen2_5_VLForConditionalGeneration)
        vision.update(
            hidden_size=16,
            out_hidden_size=32,
            intermediate_size=32,
            fullatt_block_indexes=[0],
            window_size=56,
        )
    config = kinds[0](
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=91,
        vision_start_token_id=92,
        vision_end_token_id=93,
    )
    ids = [5, 92] + [IMAGE] * M + [93, 7, 8, 9]
    return kinds[1](config), ids, (64, 3 * 2 * 14 * 14)


BUILD = {
    "paligemma": paligemma,
    "llava": llava,
    "smolvlm": smolvlm,
    "idefics3": idefics3,
    "internvl": internvl,
    "qwen2-vl": lambda: qwen("2"),
    "qwen2.5-vl": lambda: qwen("2.5"),
    "qwen3-vl": lambda: qwen("3"),
}


def inputs_for(model, ids, pixels, batch=1):
    """Keyword arguments of a call with one image in each row."""
    ids = torch.tensor([ids] * batch)
    shape = (batch * pixels[0], *pixels[1:]) if len(pixels) == 2 else (batch, *pixels)
    inputs = dict(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=torch.randn(shape, generator=torch.Generator().manual_seed(3)),
    )
    accepted = inspect.signature(model.forward).parameters
    if "image_grid_thw" in accepted:
        inputs["image_grid_thw"] = torch.tensor([[1, 8, 8]] * batch)
    if "mm_token_type_ids" in accepted:
        inputs["mm_token_type_ids"] = (ids == IMAGE).int()
    if "token_type_ids" in accepted:
        inputs["token_type_ids"] = torch.zeros_like(ids)
    return inputs


@pytest.fixture(scope="module", params=BUILD)
def vlm(request):
    with torch.no_grad():
        model, ids, pixels = BUILD[request.param]()
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15, generator=generator)
    return SimpleNamespace(model=model.eval(), ids=ids, pixels=pixels)


def generate(model, inputs, **options):
    return model.generate(
        **inputs,
        max_new_tokens=4,
        min_new_tokens=4,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )


@pytest.mark.parametrize("at", [(0, 3), (2, 4)])
def test_several_cuts_with_everything(vlm, at):
    """Merging, a skipped layer, weighted words, and renumbering where positions are one number."""
    vlm.model.set_attn_implementation("sdpa")
    inputs = inputs_for(vlm.model, vlm.ids, vlm.pixels, batch=2)
    options = dict(
        at=at,
        left=(9, 4),
        skip=(1,),
        merging=True,
        score_layer=0,
        spec=(("rows", "weighted"), ("kind", "attention" if at[0] else "logits")),
        watch=(2, 4),
    )
    kind = type(vlm.model).__name__
    if "Qwen" in kind:
        with pytest.raises((NotImplementedError, ValueError), match=r"positions=\"keep\"|layer=0"):
            vp.prune(vlm.model, Ladder(places="compact", **options))
    else:
        options["places"] = "compact"
    if at[0] == 0 and "Qwen3" in kind:
        return
    found, reports = [], []
    for mode in ("drop", "mask"):
        with vp.prune(vlm.model, Ladder(**options), mode=mode) as session:
            found.append(generate(vlm.model, inputs))
        reports.append(session.last)
    assert torch.equal(reports[0].kept_mask, reports[1].kept_mask)
    assert reports[0].kept_mask.sum(1).tolist() == [4, 4]
    near(reports[0].action, reports[1].action)
    dropped, hidden = (torch.stack(made.logits) for made in found)
    near(dropped, hidden)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_generate_with_tokens_removed(vlm, attention, proves):
    vlm.model.set_attn_implementation(attention)
    inputs = inputs_for(vlm.model, vlm.ids, vlm.pixels, batch=2)
    inputs["pixel_values"][: len(inputs["pixel_values"]) // 2] += 0.5
    found, reports = [], []
    for mode in ("drop", "mask"):
        with vp.prune(vlm.model, tokens=KEEP, layer=2, window=1, mode=mode) as session:
            for step in range(2):
                frame = {**inputs, "pixel_values": inputs["pixel_values"] + step}
                found.append(generate(vlm.model, frame))
            reports.append(session.last)
    dropped, masked = reports
    assert dropped.steps == (1, 1) and dropped.views == (M,)
    assert dropped.kept_mask.sum(1).tolist() == [KEEP, KEEP]
    assert (dropped.tokens_full, dropped.tokens_kept) == (len(vlm.ids), len(vlm.ids) - M + KEEP)
    assert torch.equal(dropped.kept_mask, masked.kept_mask)
    near(dropped.action, masked.action)
    for step in (0, 1):
        a, b = found[step], found[2 + step]
        assert torch.equal(a.sequences, b.sequences)
        near(torch.stack(a.logits), torch.stack(b.logits))
    full = generate(vlm.model, {**inputs, "pixel_values": inputs["pixel_values"] + 1})
    assert (full.logits[0] - found[1].logits[0]).abs().max() > 1e-3
    proves("hf-vlm", type(vlm.model), "reference", "batch", "dynamic")


def test_keeping_everything_and_leaving_nothing_behind(vlm, proves):
    inputs = inputs_for(vlm.model, vlm.ids, vlm.pixels)
    expected, before = vlm.model(**inputs).logits, fingerprint(vlm.model)
    with vp.prune(vlm.model, keep=1.0, layer=2, window=1):
        for _ in range(2):
            assert torch.equal(vlm.model(**inputs).logits, expected)
    with vp.prune(vlm.model, tokens=KEEP, layer=2, window=1) as session:
        for _ in range(2):
            pruned = vlm.model(**inputs).logits
        assert session.last.visual_kept == KEEP
    assert not torch.equal(pruned, expected)
    assert torch.equal(vlm.model(**inputs).logits, expected)
    assert fingerprint(vlm.model) == before
    proves("hf-vlm", type(vlm.model), "keep=1.0", "undo")


def test_text_alone_is_left_alone(vlm):
    ids = torch.tensor([[1, 7, 8, 9]])
    text = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in inspect.signature(vlm.model.forward).parameters:
            text[name] = torch.zeros_like(ids)
    before = generate(vlm.model, text)
    with vp.prune(vlm.model, tokens=KEEP, layer=2) as session:
        inside = generate(vlm.model, text)
        assert session.last is None
        generate(vlm.model, inputs_for(vlm.model, vlm.ids, vlm.pixels))
        assert session.last.visual_full == M
    assert torch.equal(torch.stack(before.logits), torch.stack(inside.logits))


def test_left_padding(proves):
    model, ids, pixels = llava()
    inputs = inputs_for(model.eval(), ids, pixels)
    padded = dict(inputs)
    padded["input_ids"] = torch.cat([torch.zeros(1, 3, dtype=torch.long), inputs["input_ids"]], 1)
    padded["attention_mask"] = (torch.arange(len(ids) + 3) >= 3).long()[None]
    kept, logits = [], []
    for arguments in (inputs, padded):
        with vp.prune(model, "fastv", tokens=KEEP, layer=2) as session:
            logits.append(torch.stack(generate(model, arguments).logits))
            kept.append(session.last.kept_mask)
    assert torch.equal(*kept)
    near(*logits)
    proves("hf-vlm", type(model), "padding")


def test_each_image_is_a_view(proves):
    model, _, pixels = llava()
    ids = torch.tensor([[1, *[IMAGE] * M, 5, *[IMAGE] * M, 7, 8]])
    images = torch.randn(2, *pixels)
    with vp.prune(model.eval(), "fastv", keep=0.25, layer=2) as session:
        model(input_ids=ids, pixel_values=images)
        assert session.last.views == (M, M) and session.last.visual_kept == M // 2
    proves("hf-vlm", type(model), "cameras")


def test_image_tokens_without_an_image():
    model, ids, _ = llava()
    with (
        vp.prune(model.eval(), "fastv", tokens=KEEP, layer=2) as session,
        pytest.raises(ValueError, match="16 of 16 image tokens hold no image features"),
    ):
        model(input_ids=torch.tensor([ids]))
    assert session.last is None


def test_different_numbers_of_image_tokens():
    model, ids, pixels = llava()
    adapter = vp.models.ImageTokenVLM(model)
    rows = torch.tensor([ids, [1, 5] + [7] * M + [7, 8, 9]])
    with (
        vp.prune(model, "fastv", tokens=KEEP, layer=2, adapter=adapter),
        pytest.raises(ValueError, match=r"\[16, 0\] image tokens"),
    ):
        model(input_ids=rows, pixel_values=torch.randn(1, *pixels))


def test_early_layers_that_get_image_features_see_every_token():
    model, *_ = qwen("3")
    with pytest.raises(ValueError, match="use `layer` >= 2"):
        vp.prune(model, "fastv", tokens=KEEP, layer=1)
    vp.prune(model, "fastv", tokens=KEEP, layer=2).remove()


def test_image_token_may_be_given():
    model, *_ = llava()
    assert vp.models.ImageTokenVLM(model).token_ids[0] == IMAGE
    adapter = vp.models.ImageTokenVLM(model, image_token_id=7)
    assert adapter.token_ids == (7,) and len(adapter.layers) == 5


def test_models_without_image_tokens():
    with pytest.raises(TypeError, match="no language model"):
        vp.models.ImageTokenVLM(nn.Linear(1, 1))
    model, *_ = llava()
    model.config = transformers.LlamaConfig()
    with pytest.raises(TypeError, match="image_token_id"):
        vp.models.ImageTokenVLM(model)
