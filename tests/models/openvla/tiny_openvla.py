"""Tiny OpenVLA policies with every feature of the published ones, and a tokenizer for them."""

from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from vla_pruner.models.openvla import OpenVLA, OpenVLAConfig, OpenVLAOFT, OpenVLAOFTConfig
from vla_pruner.models.openvla.config import IMAGENET_MEAN, IMAGENET_STD, TowerConfig

WORDS = ": ? action should the robot take to pick up lift can milk now slowly"
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<empty>"]


def towers(**changes: Any) -> tuple[TowerConfig, TowerConfig]:
    size: dict[str, Any] = {"heads": 2, "patch": 8, "image_size": 32} | changes
    first = TowerConfig(
        **size,
        width=32,
        depth=3,
        mlp=64,
        class_token=True,
        register_tokens=4,
        layer_scale=0.5,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    )
    return first, TowerConfig(**size, width=48, depth=4, mlp=80)


def statistics(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    low, high = -rng.uniform(0.1, 1, 7), rng.uniform(0.1, 1, 7)
    state = rng.uniform(0.5, 1, 8)
    return {
        "action": {
            "q01": low.tolist(),
            "q99": high.tolist(),
            "min": (2 * low).tolist(),
            "max": (2 * high).tolist(),
            "mask": [True] * 6 + [False],
        },
        "proprio": {
            "q01": (-state).tolist(),
            "q99": state.tolist(),
            "min": (-2 * state).tolist(),
            "max": (2 * state).tolist(),
        },
    }


def sizes(layers: int = 4) -> dict[str, Any]:
    return {
        "towers": towers(),
        "text": {
            "model_type": "llama",
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "pad_token_id": 3,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        "empty_token_id": 4,
        "pad_token_id": 3,
        "norm_stats": {"pick_place": statistics(0), "libero_spatial_no_noops": statistics(1)},
    }


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS.split()])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", padding_side="left")


def make_openvla(seed: int = 0, **options: Any) -> OpenVLA:
    torch.manual_seed(seed)
    model = OpenVLA.build(OpenVLAConfig(**sizes()), **options)
    model.tokenizer = tokenizer()
    return model


def make_oft(seed: int = 0, attn_implementation: str = "sdpa", **changes: Any) -> OpenVLAOFT:
    torch.manual_seed(seed)
    config = OpenVLAOFTConfig(**(sizes() | {"chunk": 4} | changes))
    model = OpenVLAOFT.build(config, attn_implementation=attn_implementation)
    model.tokenizer = tokenizer()
    return model


def picture(seed: int, height: int = 48, width: int = 48) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def observation(seed: int, cameras: int = 1, instruction: str = "Pick up the can") -> dict:
    seen: dict[str, Any] = {
        "images": [picture(10 * seed + camera) for camera in range(cameras)],
        "instruction": instruction,
        "unnorm_key": "pick_place",
    }
    if cameras > 1:
        seen["proprio"] = np.random.default_rng(seed).uniform(-0.5, 0.5, 8)
    return seen
