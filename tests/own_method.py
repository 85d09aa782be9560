"""A pruning method of a user's own, named as `own_method:FirstTokens`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vla_pruner.methods import Method


@dataclass(frozen=True, kw_only=True)
class FirstTokens(Method):
    """Keeps the first tokens.

    Args:
        skip: tokens at the start that are left out.
    """

    name: ClassVar[str] = "first-tokens"
    summary: ClassVar[str] = "the first tokens"

    layer: int = 1
    skip: int = 0

    def choose(self, features: Tensor, semantic: Any, forecast: Any, k: int, **_: Any) -> Tensor:
        """k tokens behind the first `skip`."""
        start = min(self.skip, features.shape[1] - k)
        return torch.arange(start, start + k).expand(features.shape[0], k)
