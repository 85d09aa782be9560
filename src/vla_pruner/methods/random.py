"""Random pruning: the baseline that a score has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vla_pruner.methods.base import Evidence, OneCut
from vla_pruner.pruning.hashed_uniform import hashed_uniform, no_seeds
from vla_pruner.pruning.options import require_int
from vla_pruner.pruning.selection import top_k


@dataclass(frozen=True, kw_only=True)
class Random(OneCut):
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

    def choose(self, evidence: Evidence, k: int) -> Tensor:
        """The k tokens whose number is largest: `[B, k]`, ascending."""
        batch, size = evidence.features.shape[:2]
        device = evidence.features.device
        seeds = no_seeds(batch, device) if evidence.seeds is None else evidence.seeds
        drawn = hashed_uniform(seeds, torch.arange(size, device=device), self.seed)
        return top_k(drawn, k, valid=evidence.valid)
