"""What an untouched policy computes at a step: embeddings and attention, all of it, with hooks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Whole:
    """One row of one prefill."""

    visual: Tensor
    """[M, D] embeddings of visual tokens."""
    attention: list[Tensor]
    """[S, S] of each layer, mean over heads."""
    inputs: list[Tensor]
    """[S, D] of each layer."""

    def from_rows(self, layer: int, rows: Any, first: int = 1) -> Tensor:
        """Mean attention of some rows to each visual token, `[M]`, in one layer."""
        return self.attention[layer][rows, first : first + len(self.visual)].mean(dim=0)


def look(policy: nn.Module, observation: dict, visual: int, first: int = 1) -> Whole:
    """Run an eager policy, whose visual tokens begin at row `first`, and keep everything."""
    decoder = policy.language_model.model
    attention, inputs, handles = [], [], []
    for layer in decoder.layers:
        handles.append(
            layer.self_attn.register_forward_hook(
                lambda module, args, output: attention.append(output[1][0].float().mean(dim=0))
            )
        )
        handles.append(
            layer.register_forward_pre_hook(
                lambda module, args, kwargs: inputs.append(
                    (args[0] if args else kwargs["hidden_states"])[0].float()
                ),
                with_kwargs=True,
            )
        )
    try:
        with torch.no_grad():
            policy.predict_action(**observation)
    finally:
        for handle in handles:
            handle.remove()
    depth = len(decoder.layers)
    return Whole(inputs[0][first : first + visual], attention[:depth], inputs[:depth])


def sharpen(policy: nn.Module) -> nn.Module:
    """Attention far from uniform."""
    with torch.no_grad():
        for layer in policy.language_model.model.layers:
            layer.self_attn.q_proj.weight.mul_(8)
            layer.self_attn.k_proj.weight.mul_(8)
    return policy
