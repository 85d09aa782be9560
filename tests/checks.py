"""What several test files do to models: give them weights, and compare them with what they were."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def randomise(model: nn.Module) -> nn.Module:
    """Weights large enough that attention is far from uniform."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.15, generator=generator)
    return model.eval()


def fingerprint(model: nn.Module) -> list[tuple[Any, ...]]:
    """Everything that a session could leave behind in a model, module by module.

    Names and identities of the instance's attributes (tensors among them may be the model's own
    notes of its last call), number of hooks, kernel of the attention.
    """
    found: list[tuple[Any, ...]] = []
    for name, module in model.named_modules():
        own = {
            key: "tensor" if isinstance(value, torch.Tensor) else id(value)
            for key, value in vars(module).items()
            if not key.startswith("_")
        }
        config = getattr(module, "config", None)
        kernel = getattr(config, "_attn_implementation", None)
        hooks = (len(module._forward_hooks), len(module._forward_pre_hooks))
        found.append((name, sorted(own.items()), hooks, kernel))
    return found
