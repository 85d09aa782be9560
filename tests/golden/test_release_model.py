"""On a whole decoder, the release's methods keep the tokens and give the logits that it recorded.

`README.md` says where the data comes from.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import vla_pruner as vp
from checks import near
from vla_pruner.methods import HistorySpec, Method
from vla_pruner.methods.fastv import FastV
from vla_pruner.methods.sparsevlm_release import SparseVLMRelease
from vla_pruner.methods.vla_pruner_release import VLAPrunerRelease

DATA = np.load(Path(__file__).with_name("official.npz"), allow_pickle=False)
CASES = json.loads(bytes(DATA["cases"]))


def tensor(name: str) -> Tensor:
    return torch.from_numpy(DATA[name])


@pytest.fixture(scope="module")
def model() -> nn.Module:
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=512,
        max_position_embeddings=1024,
        rms_norm_eps=1e-6,
    )
    model = LlamaForCausalLM(config).eval()
    weights = {name[2:]: tensor(name) for name in DATA.files if name.startswith("w/")}
    model.load_state_dict(weights, strict=True)
    return model


class Recorded(HistorySpec):
    """A memory that always predicts the action score that the release was given."""

    def forecast(self, history: Tensor, count: Tensor) -> Tensor:
        return GIVEN["history"][None]


GIVEN: dict[str, Tensor] = {}


class Release(VLAPrunerRelease):
    """The preset from its first step on, with the recorded action score."""

    warmup = 0

    @property
    def history(self) -> HistorySpec:
        return Recorded(layers="middle")


def method(mode: str, keep: float, layer: int) -> Method:
    if mode == "fastv":
        return FastV(keep=keep, layer=layer)
    if mode == "sparsevlm":
        return SparseVLMRelease(keep=keep, layer=layer)
    return Release(keep=keep, layer=layer, semantic=mode)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['id']}-{case['mode']}")
def test_same_tokens_and_same_logits(model, case, attention):
    name, mode = f"c{case['id']}", case["mode"]
    embeds = tensor(f"{name}/embeds")[None]
    GIVEN["history"] = tensor(f"{name}/history")
    model.set_attn_implementation(attention)
    adapter = vp.models.Decoder(visual=slice(*case["span"]))
    chosen = method(mode, 1 - case["prune_ratio"], case["layer"])
    with vp.prune(model, chosen, adapter=adapter) as session:
        logits = model(inputs_embeds=embeds).logits[0, -1]
    kept = torch.ones(embeds.shape[1], dtype=torch.bool)
    kept[slice(*case["span"])] = session.last.kept_mask[0]
    assert torch.equal(kept.nonzero()[:, 0], tensor(f"{name}/kept"))
    near(logits, tensor(f"{name}/last_logits"), rel=0.0001)
    full = model(inputs_embeds=embeds).logits[0, -1]
    assert (full - logits).abs().max() > 1e-2


def test_raters_are_some_of_the_words():
    """They leave out the first and the last one; not all of the others vote."""
    for case in CASES:
        embeds = tensor(f"c{case['id']}/embeds")[None]
        visual, text = embeds[:, slice(*case["span"])], embeds[:, case["span"][1] :]
        everything = torch.ones(text.shape[:2], dtype=torch.bool)
        votes = SparseVLMRelease().query_weights(visual, text, everything)[0]
        inner = text[:, 1:-1]
        similarity = torch.softmax(visual @ inner.transpose(1, 2), dim=-1).mean(dim=1)[0]
        assert torch.equal(votes[1:-1].bool(), similarity >= similarity.mean())
        assert votes[0] == votes[-1] == 0 and 0 < votes.sum() < len(votes) - 2
