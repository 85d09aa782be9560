"""The `mini-pi0` stage: flow matching on action chunks, started from mini-oft.

The prefix takes over mini-oft's decoder (a Llama layer is a Gemma layer but for how the norm stores
its gain) and its SigLIP-like tower; the projector, the last vision block and the expert are new.
Every prefix serves several noisy chunks at once, as the expert is the cheap part.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..models.loading import load
from ..models.openvla.oft import OpenVLAOFT
from ..models.pi0 import Inputs, Pi0, save_pretrained
from ..models.pi0.processing import prompt, tokenize
from . import policies
from .dataset import Batch
from .training import MIDDLE, Trainer, normalised, quantiles

NOISES = 4
"""Noisy chunks per sample of a batch."""


class FlowTrainer(Trainer):
    """The stage `mini-pi0`; begins from mini-oft, or from an exported mini-pi0."""

    stages = ("mini-pi0",)

    def _build(self) -> int:
        self.config = policies.flow_config(self.settings.grid)
        self.model = Pi0.build(self.config, device=self.device)
        self.model.projector.register_forward_hook(self._keep_visual)
        self.model.language_model.layers[MIDDLE - 1].register_forward_hook(self._keep_middle)
        self.model.expert.register_forward_hook(self._keep_suffix)
        self._suffix: list[Tensor] = []
        return self.config.prefix.width

    def _begin(self, start: Path | None) -> None:
        if start is not None and not Path(start).is_dir():
            self.load_weights(start)
            return
        policy: Any = load("mini-oft" if start is None else start)
        if isinstance(policy, OpenVLAOFT):
            take_over(self.model, policy)
        elif isinstance(policy, Pi0):
            self._continue(policy)
        else:
            raise ValueError(f"{start} holds a {type(policy).__name__}; start from mini-oft or pi0")

    def _continue(self, policy: Pi0) -> None:
        """Take an exported mini-pi0's weights and its normalisation."""
        self.model.load_state_dict({k: v.float() for k, v in policy.state_dict().items()})
        statistics = policy.config.norm_stats
        self.action_bounds, self.proprio_bounds = (
            (np.array(statistics[name]["q01"]), np.array(statistics[name]["q99"]))
            for name in ("action", "state")
        )

    def _keep_suffix(self, module: nn.Module, inputs: object, output: Any) -> None:
        self._suffix = [output.last_hidden_state]

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """Flow-matching loss and the helpers' losses."""
        model, cameras = self.model, self.config.num_images
        actions = self._tensor(normalised(batch.actions, self.action_bounds))
        inputs = self.inputs(batch)
        prefix = model.read_prefix(inputs).repeat(NOISES)
        valid = self._tensor(batch.action_valid)[..., None].repeat_interleave(NOISES, dim=0)
        actions = actions.repeat_interleave(NOISES, dim=0)
        state = inputs.state.repeat_interleave(NOISES, dim=0)
        time = self._times(len(actions))
        noise = torch.randn_like(actions)
        share = time[:, None, None]
        # Where the expert's action is not known nothing may be told about it.
        noisy = torch.where(valid, share * noise + (1 - share) * actions, noise)
        said = model.velocity(prefix, state, noisy, time)
        error = (said - (noise - actions)).square()
        near_first = torch.linspace(
            1.5, 0.5, actions.shape[1], dtype=torch.float32, device=self.device
        )[:, None]
        weight = valid.float() * near_first
        acting = (error * weight).sum() / (weight.sum() * error.shape[-1])

        points = self._tensor(batch.points)[:, :cameras].flatten(0, 1)
        pointing, distance = self.helpers.point_loss(self._visual[0], points, self.settings.grid)
        middle = self._middle[0][:, : sum(self.config.views)].unflatten(1, (cameras, -1))
        place = self._tensor(batch.named[:, :cameras])
        named = self.helpers.named_loss(middle, None, place, self.settings.grid)
        # The state's row sees prefix and state alone: the same for every noise.
        row = self.widen(self._suffix[0][::NOISES, 0])
        relation = self.helpers.relation_loss(row, self._tensor(batch.relation))
        loss = acting + 0.1 * pointing + 0.3 * relation + 0.3 * named
        with torch.no_grad():
            guess = noisy - share * said  # actions, if the velocity were right all the way
            away = ((guess - actions).abs() * valid)[:, 0, :6].mean()
        return loss, {
            "flow": acting.item(),
            "l1": away.item(),
            "named": named.item(),
            "points": pointing.item(),
            "error": distance.item(),
            "relation": relation.item(),
        }

    def widen(self, row: Tensor) -> Tensor:
        """An expert row padded with zeros to the prefix's width, which the helpers read."""
        return nn.functional.pad(row, (0, self.config.prefix.width - row.shape[-1]))

    def inputs(self, batch: Batch) -> Inputs:
        """Model inputs of a batch."""
        prompts = [prompt(text, np.zeros(0), self.config) for text in batch.instructions]
        tokens, mask = tokenize(prompts, self.tokenizer, None)
        low, high = self.proprio_bounds
        state = 2 * (batch.proprio - low) / np.maximum(high - low, 1e-6) - 1
        images = self.lit(batch.images) * 2 - 1
        return Inputs(
            images=images,
            image_mask=torch.ones(images.shape[:2], dtype=torch.bool, device=self.device),
            tokens=tokens.to(self.device),
            token_mask=mask.to(self.device),
            state=self._tensor(state.astype(np.float32)),
        )

    def _times(self, count: int) -> Tensor:
        """Times [count] in (0, 1], more of them near noise: pi0's Beta(1.5, 1)."""
        drawn = torch.distributions.Beta(1.5, 1.0).sample((count,))
        return (0.999 * drawn + 0.001).to(self.device)


@torch.no_grad()
def take_over(model: Pi0, policy: OpenVLAOFT) -> None:
    """Copy what the two policies have in common from mini-oft; new vision blocks start as nothing.

    Raises:
        ValueError: policies of different sizes.
    """
    llama = policy.language_model.model
    found = {f"language_model.{name}": value.float() for name, value in llama.state_dict().items()}
    for name in found:
        if name.endswith("norm.weight"):
            found[name] = found[name] - 1  # Gemma's norm multiplies by 1 + weight
    table, width = "language_model.embed_tokens.weight", model.config.prefix.width
    found[table] = found[table] / math.sqrt(width)  # and its embeddings by the root of the width
    tower = policy.vision_backbone.fused_featurizer
    embeddings = "vision_tower.embeddings"
    found[f"{embeddings}.position_embedding.weight"] = tower.pos_embed[0]
    found[f"{embeddings}.patch_embedding.weight"] = tower.patch_embed.proj.weight
    found[f"{embeddings}.patch_embedding.bias"] = tower.patch_embed.proj.bias
    names = {"norm1": "layer_norm1", "norm2": "layer_norm2", "attn.proj": "self_attn.out_proj"}
    for index, block in enumerate(tower.blocks):
        place = f"vision_tower.encoder.layers.{index}"
        for name, value in block.state_dict().items():
            module, _, kind = name.rpartition(".")
            if module == "attn.qkv":
                for part, third in zip("qkv", value.chunk(3), strict=True):
                    found[f"{place}.self_attn.{part}_proj.{kind}"] = third
            else:
                found[f"{place}.{names.get(module, module)}.{kind}"] = value
    state = model.state_dict()
    wrong = [n for n, value in found.items() if n not in state or state[n].shape != value.shape]
    if wrong:
        raise ValueError(
            f"mini-pi0 cannot start from this policy: {', '.join(wrong[:3])} do not fit; use the "
            "mini-oft that ships here, or one trained with the same grid."
        )
    model.load_state_dict({name: value.float() for name, value in found.items()}, strict=False)
    fresh: Any = model.vision_tower.encoder.layers[len(tower.blocks) :]
    for block in fresh:
        block.self_attn.out_proj.weight.zero_()
        block.mlp.fc2.weight.zero_()


def export(checkpoint: Path, folder: Path) -> None:
    """Write the averaged weights of a checkpoint as a policy folder: lerobot's layout, bf16."""
    if not Path(checkpoint).exists():
        raise FileNotFoundError(f"There is no checkpoint {checkpoint}; train that stage first.")
    state = torch.load(checkpoint, weights_only=True, map_location="cpu")
    action_low, action_high, state_low, state_high = state["bounds"]
    statistics = {
        "action": quantiles(action_low, action_high),
        "state": quantiles(state_low, state_high),
    }
    config = policies.flow_config(state["settings"]["grid"])
    model = Pi0.build(replace(config, norm_stats=statistics))
    trained = dict(zip(dict(model.named_parameters()), state["average"], strict=False))
    model.load_state_dict(trained)
    model.tokenizer = policies.tokenizer()
    save_pretrained(model, folder, dtype=torch.bfloat16)
    policies.write_control("mini-pi0", folder)
