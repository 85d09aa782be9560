"""No pruning: every visual token stays, the baseline of every comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vla_pruner.methods.base import Evidence, OneCut


@dataclass(frozen=True, kw_only=True)
class NoPruning(OneCut):
    """Keep every token and cut nowhere. `keep`, `layer` and `budget` are accepted and unused."""

    name: ClassVar[str] = "none"
    summary: ClassVar[str] = "keeps every visual token"

    def cuts(self, num_layers: int) -> tuple[int, ...]:
        """No layer."""
        return ()

    def choose(self, evidence: Evidence, k: int) -> Tensor:
        """All tokens, in order: `[B, n]`."""
        batch, size = evidence.features.shape[:2]
        return torch.arange(size, device=evidence.features.device).expand(batch, size)

    def _resolve(self, views: tuple[int, ...]) -> tuple[int, ...]:
        return (sum(views),) if self.budget == "global" else views
