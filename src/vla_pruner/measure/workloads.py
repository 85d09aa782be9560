"""What is measured: a policy, and one step of it on made-up input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from vla_pruner._short import short
from vla_pruner.models.loading import lacks_bf16, load
from vla_pruner.models.openvla import OpenVLA, OpenVLAOFT, OpenVLAOFTConfig, TowerConfig
from vla_pruner.models.openvla.config import PUBLISHED as OPENVLA
from vla_pruner.models.pi0 import Inputs, Pi0, Pi0Config, VisionConfig
from vla_pruner.models.port import share

PUBLISHED: dict[str, Any] = {**OPENVLA, "pi0": Pi0Config(), "pi05": Pi0Config(kind="pi05")}
"""Names of published sizes, and their configurations."""

# Prompt lengths that give the sequences of LIBERO: 291 tokens of OpenVLA (256 visual + 35), 603 of
# OpenVLA-OFT (512 visual + robot state + 33 + 56 action slots + stop). pi0 pads its prompts.
PROMPTS = {"openvla-7b": 35, "openvla-oft-7b": 33, "pi0": 48, "pi05": 200}
STACKS = ("prefix", "expert")


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
    policy: Any
    step: Callable[[Any], Any]
    tokens: int
    vision: bool

    @property
    def visual(self) -> int:
        """Visual tokens in the prefill."""
        return sum(self.policy.config.views)

    def copy(self) -> Any:
        """The policy once more, with hooks and state of its own and the same weights."""
        return share(self.policy)

    @staticmethod
    def decoder(policy: Any) -> nn.Module:
        """The stack of decoder layers that prefills."""
        language_model: Any = policy.language_model
        return language_model if isinstance(policy, Pi0) else language_model.model

    def stacks(self, policy: Any) -> list[nn.Module]:
        """Every stack that a step runs through: pi0 decodes with a second one."""
        return [self.decoder(policy), *([policy.expert] if isinstance(policy, Pi0) else [])]


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
        name: one of `PUBLISHED` (published sizes, random weights), a policy that
            ships with the package, or a folder or hub id of a checkpoint.
        layers: decoder layers to build; None for all. Only with published sizes.
        vision: False builds toy vision towers, with the right number of visual tokens.
        dtype: None as `load` has it (checkpoints) or bf16, on a CPU that `lacks_bf16` float32
            (published sizes).
        device: where to run.
        seed: of the made-up images, prompt and weights.

    Raises:
        ValueError: sizes that cannot be changed, or a model of another kind.
    """
    torch.manual_seed(seed)
    policy: Any
    step: Callable[[Any], Any]
    if name in PUBLISHED:
        if dtype is None:
            slow = device.type == "cpu" and lacks_bf16()
            dtype = torch.float32 if slow else torch.bfloat16
        policy = _published(name, layers, vision, dtype, device)
    else:
        if layers is not None:
            raise ValueError(
                f"--layers changes the size of published models ({', '.join(PUBLISHED)}); "
                f"{short(name)} comes with its own size, leave --layers out."
            )
        policy, vision = load(name, device=device, dtype=dtype), True
    prompt = PROMPTS.get(name, 24)
    if isinstance(policy, Pi0):
        step, tokens = _flow_step(policy, policy.config.max_tokens or prompt)
    elif isinstance(policy, OpenVLA):
        step, tokens = _step(policy, prompt)
    else:
        raise ValueError(
            f"the bench knows OpenVLA, OpenVLA-OFT and pi0 policies; {short(name)} is a "
            f"{type(policy).__name__}. Time your own step with vla_pruner.measure.timing."
        )
    return Workload(name, policy, step, tokens, vision)


def _published(
    name: str, layers: int | None, vision: bool, dtype: torch.dtype, device: torch.device
) -> OpenVLA | Pi0:
    """A policy of published size with random weights."""
    config = PUBLISHED[name]
    if isinstance(config, Pi0Config):
        if layers is not None:
            stacks = {side: replace(getattr(config, side), depth=layers) for side in STACKS}
            config = replace(config, **stacks)
        if not vision:
            config = replace(config, vision=VisionConfig(width=16, depth=2, heads=1, mlp=16))
        config = replace(config, max_tokens=PROMPTS[name], noise_seed=0)
        return Pi0.build(config, device=device, dtype=dtype)
    if layers is not None:
        config = config.with_text(num_hidden_layers=layers)
    if not vision:
        toy = TowerConfig(width=16, depth=2, heads=1, mlp=16)
        config = replace(config, towers=(toy, toy))
    kind = OpenVLAOFT if isinstance(config, OpenVLAOFTConfig) else OpenVLA
    return kind.build(config, device=device, dtype=dtype)


def _flow_step(policy: Pi0, prompt: int) -> tuple[Callable[[Pi0], Any], int]:
    """One chunk of pi0 on a prompt of `prompt` tokens, and the length of its prefill."""
    config, device = policy.config, policy.device
    cameras, size = config.num_images, config.image_size
    inputs = Inputs(
        images=torch.rand(1, cameras, 3, size, size, dtype=torch.float32, device=device) * 2 - 1,
        image_mask=torch.ones(1, cameras, dtype=torch.bool, device=device),
        tokens=torch.randint(3, min(256, config.vocab_size), (1, prompt), device=device),
        token_mask=torch.ones(1, prompt, dtype=torch.bool, device=device),
        state=torch.rand(1, config.max_state_dim, dtype=torch.float32, device=device),
    )
    return lambda model: model.sample(inputs), sum(config.views) + prompt


def _step(policy: OpenVLA, prompt: int) -> tuple[Callable[[OpenVLA], Any], int]:
    """One step on a prompt of `prompt` tokens, and the length of its prefill."""
    config, device = policy.config, policy.device
    tokens = sum(config.views) + prompt
    size = config.image_size
    pixels = torch.rand(1, 6 * config.num_images, size, size, dtype=torch.float32)
    pixels = pixels.sub(0.5).to(device, policy.dtype)
    words = min(256, config.action_vocab_end - config.n_action_bins)
    input_ids = torch.randint(3, words, (1, prompt))
    input_ids[:, 0], input_ids[:, -1] = 1, config.empty_token_id
    input_ids = input_ids.to(device)

    if not isinstance(config, OpenVLAOFTConfig):
        return lambda model: model.predict_tokens(input_ids, pixels), tokens
    proprio = None
    tokens += config.slots + 1
    if config.proprio_dim is not None:
        proprio = torch.rand(1, config.proprio_dim, dtype=torch.float32).to(device, policy.dtype)
        tokens += 1

    @torch.no_grad()
    def one_chunk(model: OpenVLA) -> Any:
        return model(input_ids, pixels, proprio)

    return one_chunk, tokens
