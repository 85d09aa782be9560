"""What several test files do to models: give them weights, and compare them with what they were."""

from __future__ import annotations

from typing import Any

import numpy as np
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


def near(found: Any, expected: Any, rel: float = 1e-5) -> None:
    """Equal up to `rel` of the largest expected value: processors and their kernels round.

    An absolute bound would say nothing about values near 100, and too much about values near 1e-3.
    """
    if not isinstance(found, torch.Tensor) or not isinstance(expected, torch.Tensor):
        found = np.asarray(found, dtype=np.float64)
        expected = np.broadcast_to(np.asarray(expected, dtype=np.float64), found.shape)
        found, expected = torch.tensor(found), torch.tensor(expected)
    finite = expected.detach()[torch.isfinite(expected)]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    torch.testing.assert_close(found, expected, rtol=0, atol=rel * largest)
