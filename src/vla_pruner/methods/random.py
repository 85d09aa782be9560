"""Random pruning: the baseline that a score has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vla_pruner.methods.base import Method, require_int
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
        """The k tokens whose hash is largest: `[B, k]`, ascending."""
        batch, size = features.shape[:2]
        if seeds is None:
            seeds = torch.zeros(batch, dtype=torch.int64, device=features.device)
        token = torch.arange(size, device=features.device)
        mixed = _mix(_mix(_mix(seeds.to(features.device)) + self.seed)[:, None] + token)
        return top_k(_shift(mixed, 40).float(), k, valid=valid)


def _shift(value: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _mix(value: Tensor) -> Tensor:
    """Finaliser of the SplitMix64 generator: int64 to well-mixed int64, wrapping around."""
    value = value + (0x9E3779B97F4A7C15 - (1 << 64))
    value = (value ^ _shift(value, 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    value = (value ^ _shift(value, 27)) * (0x94D049BB133111EB - (1 << 64))
    return value ^ _shift(value, 31)
