"""Sizes, tokenizer and control settings of the policies that are trained here."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ..models.openvla.base import SMOLLM2, find
from ..models.openvla.config import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    OpenVLAConfig,
    OpenVLAOFTConfig,
    TowerConfig,
)
from ..models.openvla.processing import PROMPT
from ..models.pi0.config import Pi0Config, StackConfig, VisionConfig
from ..scenes.pick_place_task import (
    ACTION_DIM,
    CAMERAS,
    INSTRUCTION_TEMPLATES,
    OBJECT_NAMES,
    PROPRIO_DIM,
)
from .libero.suites import INSTRUCTIONS

VOCABULARY = 512
"""Embedding rows: words first, then 256 action tokens, then 64 rows of padding."""

_WORDS = VOCABULARY - 64 - 256
_SPECIAL = ("<unk>", "<s>", "</s>", "<pad>")
_ALPHABET = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;?!'-\n▁"


_PICK_PLACE = ["robosuite_pickplace"]
_LIBERO = ["libero_spatial", "libero_object", "libero_goal", "libero_10"]
_BOTH = ["agentview", "wrist"]

CONTROL: dict[str, dict[str, Any]] = {
    "mini-openvla": {"suites": _PICK_PLACE, "cameras": ["agentview"], "execute": 1},
    "mini-oft": {"suites": _PICK_PLACE, "cameras": _BOTH, "execute": 2},
    "mini-oft-libero": {"suites": _LIBERO, "cameras": _BOTH, "execute": 8},
    "mini-pi0": {"suites": _PICK_PLACE, "cameras": _BOTH, "execute": 2},
    "smol-oft": {"suites": _PICK_PLACE, "cameras": _BOTH, "execute": 2},
}
"""How each policy is driven, and where; `episodes.control.Control` says what the entries mean."""

STATISTICS = {
    "mini-openvla": "pick_place",
    "mini-oft": "pick_place",
    "mini-oft-libero": "libero",
    "smol-oft": "pick_place",
}
"""What the statistics that normalise actions and state are called in each policy."""


def towers(grid: int = 10) -> tuple[TowerConfig, TowerConfig]:
    """Two small vision towers with `grid` x `grid` patches of 14 pixels."""
    size: dict[str, Any] = {
        "width": 96,
        "depth": 4,
        "heads": 3,
        "mlp": 384,
        "image_size": 14 * grid,
    }
    first = TowerConfig(
        **size,
        class_token=True,
        register_tokens=1,
        layer_scale=1.0,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    )
    return first, TowerConfig(**size)


def config(name: str, grid: int = 10) -> OpenVLAConfig:
    """Configuration of one of the policies in `CONTROL`."""
    shared = {
        "towers": towers(grid),
        "text": {
            "model_type": "llama",
            "vocab_size": VOCABULARY,
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 1024,
            "rms_norm_eps": 1e-6,
            "initializer_range": 0.06,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 3,
        },
        "empty_token_id": tokenizer(name).convert_tokens_to_ids("▁"),
        "stop_token_id": 2,
        "pad_token_id": 3,
        "crop_first": True,
    }
    if name == "mini-openvla":
        return OpenVLAConfig(**shared)
    if name in ("mini-oft", "mini-oft-libero"):
        return OpenVLAOFTConfig(**shared, num_images=2, chunk=8, head_blocks=1)
    raise ValueError(f"There is no reference policy `{name}`; choose from {', '.join(CONTROL)}.")


SMOL_LAYERS = 16
"""Of the 30 layers of SmolLM2; the first ones are kept."""


def smol_config(layers: int = SMOL_LAYERS) -> OpenVLAOFTConfig:
    """Configuration of "smol-oft": mini-oft's towers on 16 x 16 patches of 10 px, then SmolLM2."""
    small = [replace(tower, image_size=160, patch=10) for tower in towers()]
    return OpenVLAOFTConfig(
        towers=(small[0], small[1]),
        text={**SMOLLM2.text, "num_hidden_layers": layers},
        empty_token_id=216,  # a lone space
        stop_token_id=2,
        pad_token_id=2,
        crop_first=True,
        base="SmolLM2-135M-Instruct",
        num_images=2,
        chunk=8,
        head_blocks=1,
    )


def flow_config(grid: int = 10) -> Pi0Config:
    """Configuration of "mini-pi0": the prefix takes over the weights of mini-oft's decoder."""
    stack: dict[str, Any] = {"depth": 8, "heads": 4, "kv_heads": 4, "head_dim": 32}
    return Pi0Config(
        vision=VisionConfig(width=96, depth=4, heads=3, mlp=384, image_size=14 * grid),
        prefix=StackConfig(width=128, mlp=384, **stack),
        expert=StackConfig(width=96, mlp=256, **stack),
        vocab_size=VOCABULARY,
        activation="silu",
        cameras=CAMERAS,
        chunk=8,
        max_action_dim=ACTION_DIM,
        max_state_dim=PROPRIO_DIM,
        action_dim=ACTION_DIM,
        proprio_dim=PROPRIO_DIM,
        flow_steps=5,
        max_tokens=None,
        action_scaling="quantiles",
        state_scaling="quantiles",
        crop_area=0.9,
        resample="lanczos",
        noise_seed=0,
    )


def tokenizer(policy: str = "mini-oft") -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer trained on the prompts of a policy's tasks; deterministic.

    LIBERO says four times as many words. A policy for it has no action tokens, and uses their rows
    for words.
    """
    corpus = [
        PROMPT.format(instruction=template.format(object=name))
        for template in INSTRUCTION_TEMPLATES
        for name in OBJECT_NAMES
    ]
    words = _WORDS
    if policy == "mini-oft-libero":
        corpus += [
            PROMPT.format(instruction=text)
            for suite in INSTRUCTIONS
            for text in INSTRUCTIONS[suite]
        ]
        words = VOCABULARY - 64
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    core.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="first")
    trainer = trainers.BpeTrainer(
        vocab_size=words,
        initial_alphabet=sorted(set(_ALPHABET)),
        special_tokens=[AddedToken(token, special=True) for token in _SPECIAL],
        show_progress=False,
    )
    core.train_from_iterator(corpus, trainer)
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        padding_side="left",
    )


def smol_tokenizer() -> PreTrainedTokenizerFast:
    """SmolLM2's tokenizer, with BOS in front and padding on the left."""
    path = find(SMOLLM2)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    core = tokenizer.backend_tokenizer
    bos = core.id_to_token(SMOLLM2.text["bos_token_id"])
    core.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, SMOLLM2.text["bos_token_id"])]
    )
    end = core.id_to_token(SMOLLM2.text["eos_token_id"])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=bos, eos_token=end, pad_token=end, padding_side="left"
    )


def write_control(name: str, folder: Path) -> None:
    """Record in a policy folder's config.json how the policy is to be driven."""
    path = Path(folder) / "config.json"
    values = json.loads(path.read_text())
    values["control"] = CONTROL[name]
    path.write_text(json.dumps(values, indent=2) + "\n")
