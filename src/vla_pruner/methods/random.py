"""Random pruning: the baseline that a score has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vla_pruner.methods.base import Method, require_int
from vla_pruner.pruning.lots import lots, no_seeds
from vla_pruner.pruning.selection import top_k


@dataclass(frozen=True, kw_only=True)
class Random(Method):
    """Keep a random subset, drawn anew at every step.

    What is drawn depends on `seed` and on the row's own number in `Evidence.seeds` alone: not on
    the device, on the global random state, or on the other rows of the batch.

    Args:
        seed: another seed, another draw.
    """

    name: ClassVar[str] = "random"
    summary: ClassVar[str] = "a random subset at every step"

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_int("seed", self.seed, 0)

    def choose(
        self,
        features: Tensor,
        semantic: Tensor | None,
        forecast: Tensor | None,
        k: int,
        *,
        valid: Tensor | None = None,
        seeds: Tensor | None = None,
    ) -> Tensor:
        """The k tokens whose lot is largest: `[B, k]`, ascending."""
        batch, size = features.shape[:2]
        if seeds is None:
            seeds = no_seeds(batch, features.device)
        token = torch.arange(size, device=features.device)
        return top_k(lots(seeds, token, self.seed), k, valid=valid)
