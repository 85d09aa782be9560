"""pi0 and pi0.5 policies a few kilobytes large, with random weights, and what they look at."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from vla_pruner.models.pi0 import Pi0, Pi0Config, StackConfig, VisionConfig
from vla_pruner.reference.policies import tokenizer

ACTION, STATE, CHUNK = 5, 4, 6
CAMERAS = ("front", "left", "right")
SENTENCES = ("pick up the can", "put the cereal box in its bin")


def statistics() -> dict[str, Any]:
    """Statistics of a made-up robot."""
    rng = np.random.default_rng(0)
    found = {}
    for name, size in (("action", ACTION), ("state", STATE)):
        low = rng.uniform(-2, -1, size)
        high = rng.uniform(1, 3, size)
        found[name] = {
            "q01": low.tolist(),
            "q99": high.tolist(),
            "min": (low - 1).tolist(),
            "max": (high + 1).tolist(),
            "mean": ((low + high) / 2).tolist(),
            "std": ((high - low) / 4).tolist(),
        }
    return found


def make_config(kind: str = "pi0", **changes: Any) -> Pi0Config:
    """Two cameras of 3 x 3 patches, stacks of four layers, three flow steps."""
    settings: dict[str, Any] = {
        "kind": kind,
        "vision": VisionConfig(width=24, depth=2, heads=2, mlp=40, image_size=42),
        "prefix": StackConfig(width=32, mlp=48, depth=4, heads=4, kv_heads=2, head_dim=8),
        "expert": StackConfig(width=16, mlp=24, depth=4, heads=4, kv_heads=2, head_dim=8),
        "vocab_size": 512,
        "cameras": CAMERAS[:2],
        "chunk": CHUNK,
        "max_action_dim": 8,
        "max_state_dim": 7,
        "action_dim": ACTION,
        "proprio_dim": STATE,
        "flow_steps": 3,
        "max_tokens": None,
        "norm_stats": statistics(),
        "noise_seed": 0,
    }
    if kind == "pi05":
        settings |= {"action_scaling": "quantiles", "state_scaling": "quantiles"}
    return Pi0Config(**{**settings, **changes})


def make(kind: str = "pi0", attention: str = "sdpa", **changes: Any) -> Pi0:
    """A policy whose attention is far from uniform, with the tokenizer of the reference task."""
    torch.manual_seed(0)
    model = Pi0.build(make_config(kind, **changes), attn_implementation=attention)
    with torch.no_grad():
        for stack in (model.language_model, model.expert):
            for layer in stack.layers:
                layer.self_attn.q_proj.weight.mul_(1.5)
                layer.self_attn.k_proj.weight.mul_(1.5)
        model.language_model.embed_tokens.weight.mul_(10)
    model.tokenizer = tokens()
    return model


def tokens() -> PreTrainedTokenizerFast:
    """The tokenizer of the reference task."""
    return tokenizer()


def observation(seed: int = 0, cameras: int = 2, missing: tuple[int, ...] = ()) -> dict[str, Any]:
    """Random images [H, W, 3] (None where missing), a sentence and a state."""
    rng = np.random.default_rng(seed)
    images = [
        None if camera in missing else rng.integers(0, 256, (42, 42, 3), dtype=np.uint8)
        for camera in range(cameras)
    ]
    return {
        "images": images,
        "instruction": SENTENCES[seed % 2],
        "proprio": rng.uniform(-1, 1, STATE),
    }
