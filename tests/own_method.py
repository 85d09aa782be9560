"""A pruning method of a user's own, named as `own_method:FirstTokens`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vla_pruner.methods import Evidence, OneCut


@dataclass(frozen=True, kw_only=True)
class FirstTokens(OneCut):
    """Keeps the first tokens.

    Args:
        skip: tokens at the start that are left out.
    """

    name: ClassVar[str] = "first-tokens"
    summary: ClassVar[str] = "the first tokens"

    layer: int = 1
    skip: int = 0

    def choose(self, evidence: Evidence, k: int) -> Tensor:
        """k tokens behind the first `skip`."""
        batch, size = evidence.features.shape[:2]
        start = min(self.skip, size - k)
        return torch.arange(start, start + k).expand(batch, k)
