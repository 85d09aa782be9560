"""Tiny policies that act in a scene without a simulator."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from toy_task import tiny_policy
from vla_pruner.models.openvla import OpenVLA, OpenVLAConfig


@pytest.fixture
def policies() -> Callable[[str], OpenVLA]:
    """A tiny "oft" or "openvla" policy, 4 layers, 2 or 1 x 16 visual tokens."""

    def make(family: str) -> OpenVLA:
        policy: OpenVLA = tiny_policy()
        if family == "openvla":
            source, torch_seed = policy.config, 1
            torch.manual_seed(torch_seed)
            config = OpenVLAConfig(
                towers=source.towers,
                text=source.text,
                empty_token_id=4,
                pad_token_id=3,
                norm_stats=source.norm_stats,
            )
            tokenizer = policy.tokenizer
            policy = OpenVLA.build(config)
            policy.tokenizer = tokenizer
        for layer in policy.language_model.model.layers:  # attention far from uniform
            layer.self_attn.q_proj.weight.mul_(20)
            layer.self_attn.k_proj.weight.mul_(20)
        return policy

    return make


@pytest.fixture
def look() -> Callable[..., dict]:
    """A random observation for a policy."""

    def make(policy: OpenVLA, seed: int = 0) -> dict:
        rng = np.random.default_rng(seed)
        cameras = policy.config.num_images
        seen = {
            "images": [rng.integers(0, 256, (40, 40, 3)).astype(np.uint8) for _ in range(cameras)],
            "instruction": ["pick up the cup", "pick up plate"][seed % 2],
        }
        if hasattr(policy.config, "proprio_dim"):
            seen["proprio"] = rng.uniform(-0.5, 0.5, 8)
        return seen

    return make
