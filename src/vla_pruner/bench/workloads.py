"""What is measured: a policy of the OpenVLA kind, and one step of it on made-up input."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from vla_pruner.models.loading import load
from vla_pruner.models.openvla import OpenVLA, OpenVLAOFT, OpenVLAOFTConfig, TowerConfig
from vla_pruner.models.openvla.config import PUBLISHED

# Prompt lengths that give the sequences of LIBERO: 291 tokens of OpenVLA (256 visual + 35), 603 of
# OpenVLA-OFT (512 visual + robot state + 33 + 56 action slots + stop).
PROMPTS = {"openvla-7b": 35, "openvla-oft-7b": 33}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Workload:
    """A policy with a step to time.

    Args:
        name: what was asked for.
        policy: the model; variants of the bench run on copies that share its weights.
        step: runs one step of a (possibly pruned) copy, from tensors to tensors.
        tokens: length of the prefill.
        vision: False when the vision towers were replaced by toy ones, so that a step is the
            language model and little else.
    """

    name: str
    policy: OpenVLA
    step: Callable[[OpenVLA], Any]
    tokens: int
    vision: bool

    @property
    def visual(self) -> int:
        """Visual tokens in the prefill."""
        return sum(self.policy.config.views)

    def copy(self) -> OpenVLA:
        """The policy once more, with hooks and state of its own and the same weights."""
        tensors = itertools.chain(self.policy.parameters(), self.policy.buffers())
        return copy.deepcopy(self.policy, {id(tensor): tensor for tensor in tensors})

    @staticmethod
    def decoder(policy: OpenVLA) -> nn.Module:
        """The stack of decoder layers inside a policy."""
        return policy.language_model.model


def build_workload(
    name: str,
    *,
    layers: int | None,
    vision: bool,
    dtype: torch.dtype | None,
    device: torch.device,
    seed: int = 0,
) -> Workload:
    """The policy called `name` and its step.

    Args:
        name: "openvla-7b" or "openvla-oft-7b" (published sizes, random weights), a policy that
            ships with the package, or a folder or hub id of a checkpoint.
        layers: decoder layers to build; None for all. Only with published sizes.
        vision: False builds toy vision towers, with the right number of visual tokens.
        dtype: None for bf16 (published sizes) or as stored (checkpoints).
        device: where to run.
        seed: of the made-up images, prompt and weights.

    Raises:
        ValueError: sizes that cannot be changed, or a model that is not of the OpenVLA kind.
    """
    torch.manual_seed(seed)
    if name in PUBLISHED:
        config, prompt = PUBLISHED[name], PROMPTS[name]
        if layers is not None:
            config = config.with_text(num_hidden_layers=layers)
        if not vision:
            toy = TowerConfig(width=16, depth=2, heads=1, mlp=16)
            config = replace(config, towers=(toy, toy))
        kind = OpenVLAOFT if isinstance(config, OpenVLAOFTConfig) else OpenVLA
        policy = kind.build(config, device=device, dtype=dtype or torch.bfloat16)
    else:
        if layers is not None:
            raise ValueError(
                f"--layers changes the size of published models ({', '.join(PUBLISHED)}); "
                f"{name!r} comes with its own size, leave --layers out."
            )
        loaded = load(name, device=device, dtype=dtype)
        if not isinstance(loaded, OpenVLA):
            raise ValueError(
                f"the bench knows OpenVLA and OpenVLA-OFT policies; {name!r} is a "
                f"{type(loaded).__name__}. Time your own step with vla_pruner.bench.measure."
            )
        policy, prompt, vision = loaded, 24, True
    step, tokens = _step(policy, prompt)
    return Workload(name, policy, step, tokens, vision)


def _step(policy: OpenVLA, prompt: int) -> tuple[Callable[[OpenVLA], Any], int]:
    """One step on a prompt of `prompt` tokens, and the length of its prefill."""
    config, device = policy.config, policy.device
    tokens = sum(config.views) + prompt
    size = config.image_size
    pixels = torch.rand(1, 6 * config.num_images, size, size).sub(0.5).to(device, policy.dtype)
    words = min(256, config.action_vocab_end - config.n_action_bins)
    input_ids = torch.randint(3, words, (1, prompt))
    input_ids[:, 0], input_ids[:, -1] = 1, config.empty_token_id
    input_ids = input_ids.to(device)

    if not isinstance(config, OpenVLAOFTConfig):
        return lambda model: model.predict_tokens(input_ids, pixels), tokens
    proprio = None
    tokens += config.slots + 1
    if config.proprio_dim is not None:
        proprio = torch.rand(1, config.proprio_dim).to(device, policy.dtype)
        tokens += 1

    @torch.no_grad()
    def one_chunk(model: OpenVLA) -> Any:
        return model(input_ids, pixels, proprio)

    return one_chunk, tokens
