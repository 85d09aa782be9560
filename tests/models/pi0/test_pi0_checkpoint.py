"""Policy folders in both published layouts: read by name, strictly, and written back."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_pi0 import CAMERAS, make, make_config, observation, statistics

import vla_pruner as vp
from vla_pruner.models.pi0 import Pi0, from_pretrained, save_pretrained
from vla_pruner.models.port import CheckpointError

PALIGEMMA = "paligemma_with_expert.paligemma.model"
EXPERT = "paligemma_with_expert.gemma_expert"
# Names as openpi's conversion script and lerobot's checkpoints have them.
NAMES = {
    "pi0": [
        f"{PALIGEMMA}.vision_tower.vision_model.embeddings.patch_embedding.weight",
        f"{PALIGEMMA}.vision_tower.vision_model.embeddings.position_embedding.weight",
        f"{PALIGEMMA}.vision_tower.vision_model.encoder.layers.1.self_attn.out_proj.bias",
        f"{PALIGEMMA}.vision_tower.vision_model.encoder.layers.0.layer_norm2.weight",
        f"{PALIGEMMA}.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight",
        f"{PALIGEMMA}.vision_tower.vision_model.post_layernorm.weight",
        f"{PALIGEMMA}.multi_modal_projector.linear.weight",
        f"{PALIGEMMA}.language_model.embed_tokens.weight",
        f"{PALIGEMMA}.language_model.layers.0.self_attn.q_proj.weight",
        f"{PALIGEMMA}.language_model.layers.3.mlp.gate_proj.weight",
        f"{PALIGEMMA}.language_model.norm.weight",
        f"{EXPERT}.model.layers.0.input_layernorm.weight",
        f"{EXPERT}.model.norm.weight",
        "state_proj.weight",
        "action_in_proj.bias",
        "action_time_mlp_in.weight",
    ],
    "pi05": [
        f"{EXPERT}.model.layers.0.input_layernorm.dense.weight",
        f"{EXPERT}.model.layers.2.post_attention_layernorm.dense.bias",
        f"{EXPERT}.model.norm.dense.weight",
        "time_mlp_in.weight",
        "time_mlp_out.bias",
    ],
}
KINDS = pytest.mark.parametrize("kind", ["pi0", "pi05"])


def sizes(kind):
    """What a published config.json cannot say of a tiny model, as overrides."""
    config = make_config(kind)
    return {"vision": config.vision, "prefix": config.prefix, "expert": config.expert,
            "vocab_size": 512, "max_tokens": None, "noise_seed": 0}  # fmt: skip


def same_actions(one, other):
    seen = observation(cameras=one.config.num_images)
    np.testing.assert_array_equal(one.predict_actions([seen]), other.predict_actions([seen]))


@KINDS
def test_lerobot_round_trip(kind, tmp_path):
    model = make(kind)
    save_pretrained(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert {f"model.{name}" for name in NAMES[kind]} <= set(stored)
    again = vp.models.load(tmp_path)
    assert isinstance(again, Pi0) and not again.training
    assert asdict(again.config) | {"norm_stats": 0} == asdict(model.config) | {"norm_stats": 0}
    for what, entry in model.config.norm_stats.items():
        for name, values in entry.items():
            np.testing.assert_allclose(again.config.norm_stats[what][name], values, rtol=1e-6)
    again.config = model.config
    same_actions(model, again)


def lerobot_folder(folder, model):
    """As lerobot publishes: nothing of ours in config.json, a head beside the tied table."""
    save_pretrained(model, folder)
    raw = json.loads((folder / "config.json").read_text())
    del raw["vla_pruner"]
    raw |= {"paligemma_variant": "gemma_2b", "action_expert_variant": "gemma_300m"}
    (folder / "config.json").write_text(json.dumps(raw))
    state = load_file(folder / "model.safetensors")
    table = f"model.{PALIGEMMA}.language_model.embed_tokens.weight"
    state["model.paligemma_with_expert.paligemma.lm_head.weight"] = state.pop(table)
    state[f"model.{EXPERT}.lm_head.weight"] = torch.zeros(3, 4)
    save_file(state, folder / "model.safetensors")


def openpi_folder(folder, model):
    """As openpi's conversion writes: no prefix before names, statistics under assets."""
    lerobot_folder(folder, model)
    (folder / "policy_preprocessor.json").unlink()
    state = load_file(folder / "model.safetensors")
    save_file({n.removeprefix("model."): v for n, v in state.items()}, folder / "model.safetensors")
    raw = {
        "action_dim": 8,
        "action_horizon": 6,
        "paligemma_variant": "gemma_2b",
        "action_expert_variant": "gemma_300m",
        "precision": "float32",
    }
    (folder / "config.json").write_text(json.dumps(raw))
    found = statistics()
    (folder / "assets" / "robot").mkdir(parents=True)
    text = json.dumps({"norm_stats": {"state": found["state"], "actions": found["action"]}})
    (folder / "assets" / "robot" / "norm_stats.json").write_text(text)


@KINDS
def test_a_folder_as_lerobot_publishes_it(kind, tmp_path):
    model = make(kind)
    lerobot_folder(tmp_path, model)
    loaded = from_pretrained(tmp_path, **sizes(kind))
    assert loaded.config.cameras == CAMERAS[:2]
    assert loaded.config.action_scaling == ("mean-std" if kind == "pi0" else "quantiles")
    loaded.config = model.config
    same_actions(model, loaded)


@KINDS
def test_a_folder_as_openpi_converts_it(kind, tmp_path):
    model = make(kind, cameras=CAMERAS, max_state_dim=8)
    openpi_folder(tmp_path, model)
    loaded = from_pretrained(tmp_path, flow_steps=3, **sizes(kind))
    config = loaded.config
    assert config.kind == kind and config.chunk == 6 and not config.pad_state
    assert config.cameras == ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
    assert (config.action_dim, config.proprio_dim, config.epsilon) == (5, 4, 1e-6)
    assert config.norm_stats == statistics()
    assert config.action_scaling == ("mean-std" if kind == "pi0" else "quantiles")
    loaded.config = model.config
    same_actions(model, loaded)


def test_a_head_of_its_own_does_not_replace_the_table(tmp_path):
    model = make()
    save_pretrained(model, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    table = f"model.{PALIGEMMA}.language_model.embed_tokens.weight"
    state["model.paligemma_with_expert.paligemma.lm_head.weight"] = torch.zeros_like(state[table])
    save_file(state, tmp_path / "model.safetensors")
    same_actions(model, from_pretrained(tmp_path, norm_stats=statistics()))


def test_names_of_newer_transformers_are_understood(tmp_path):
    model = make()
    save_pretrained(model, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    shorter = {n.replace(".vision_model.", "."): v for n, v in state.items()}
    assert shorter.keys() != state.keys()
    save_file(shorter, tmp_path / "model.safetensors")
    same_actions(make(), from_pretrained(tmp_path, norm_stats=statistics()))


def test_shards_are_put_together(tmp_path):
    save_pretrained(make(), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    names = sorted(state)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"model-{number}.safetensors"
        save_file({name: state[name] for name in part}, tmp_path / file)
        weight_map |= dict.fromkeys(part, file)
    (tmp_path / "model.safetensors").unlink()
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    same_actions(make(), from_pretrained(tmp_path, norm_stats=statistics()))
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks model-1\.safetensors"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s: s.pop("model.state_proj.weight"), r"missing tensors \(1\): state_proj.weight"),
        (lambda s: s.update({"model.extra": torch.zeros(1)}), r"unexpected tensors \(1\): extra"),
        (
            lambda s: s.update({"model.state_proj.bias": torch.zeros(3)}),
            r"state_proj.bias \[3\] instead of \[16\]",
        ),
    ],
)
def test_loading_is_strict(change, match, tmp_path):
    save_pretrained(make(), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    change(state)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=match):
        from_pretrained(tmp_path)


def test_pi0_is_not_taken_for_pi05(tmp_path):
    save_pretrained(make(), tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"type": "pi05"}))
    with pytest.raises(CheckpointError, match="does not fit a pi05"):
        from_pretrained(tmp_path)


def test_the_dtype_is_the_checkpoints_unless_said(tmp_path):
    save_pretrained(make(), tmp_path, dtype=torch.bfloat16)
    assert from_pretrained(tmp_path).dtype == torch.bfloat16
    assert from_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32


def test_a_tokenizer_can_come_from_elsewhere(tmp_path):
    model = make()
    save_pretrained(model, tmp_path / "policy")
    (tmp_path / "policy" / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    (tmp_path / "policy" / "tokenizer_config.json").rename(tmp_path / "tokenizer_config.json")
    loaded = from_pretrained(tmp_path / "policy")
    with pytest.raises(ValueError, match="paligemma-3b-pt-224"):
        loaded.predict_actions([observation()])
    loaded = from_pretrained(tmp_path / "policy", tokenizer=tmp_path, norm_stats=statistics())
    same_actions(model, loaded)


def edited(folder, **changes):
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | changes))


def test_bad_folders_are_explained(tmp_path):
    with pytest.raises(CheckpointError, match="neither a folder nor a hub id"):
        from_pretrained(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"it has no config\.json"):
        from_pretrained(tmp_path)
    save_pretrained(make(), tmp_path)
    with pytest.raises(TypeError, match="unknown options"):
        from_pretrained(tmp_path, chunk_size=3)
    edited(tmp_path, normalization_mapping={"ACTION": "LOG"})
    with pytest.raises(CheckpointError, match="'LOG'; supported are QUANTILES"):
        from_pretrained(tmp_path)
    edited(tmp_path, normalization_mapping={}, image_resolution=[42, 56])
    with pytest.raises(CheckpointError, match="square"):
        from_pretrained(tmp_path)
    edited(tmp_path, image_resolution=[42, 42], paligemma_variant="gemma_9b")
    with pytest.raises(CheckpointError, match="'gemma_9b'; supported are gemma_2b"):
        from_pretrained(tmp_path)
    edited(tmp_path, type="act")
    with pytest.raises(CheckpointError, match="is no pi0 policy"):
        from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        from_pretrained(tmp_path)
