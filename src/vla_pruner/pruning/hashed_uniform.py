"""Random-looking numbers that depend on a seed and a place alone, the same on every device."""

from __future__ import annotations

import torch
from torch import Tensor


def hashed_uniform(seeds: Tensor, places: Tensor, seed: int = 0) -> Tensor:
    """A number for each place, as if drawn from a uniform distribution.

    Neither the global random state, nor the device, nor other rows of a batch have a say.

    Args:
        seeds: `[B]` int64, one number per row.
        places: `[n]` or `[B, n]` int64.
        seed: another seed, another draw.

    Returns:
        `[B, n]` fp32 multiples of `2 ** -24` in [0, 1).
    """
    row = _mix(_mix(seeds.to(places.device)) + seed)[:, None]
    return _shift(_mix(row + places), 40).float() * 2.0**-24


def _shift(value: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _mix(value: Tensor) -> Tensor:
    """Finaliser of the SplitMix64 generator: int64 to well-mixed int64, wrapping around."""
    value = value + (0x9E3779B97F4A7C15 - (1 << 64))
    value = (value ^ _shift(value, 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    value = (value ^ _shift(value, 27)) * (0x94D049BB133111EB - (1 << 64))
    return value ^ _shift(value, 31)


def no_seeds(batch: int, device: torch.device) -> Tensor:
    """Seeds `[B]` of rows that draw alike."""
    return torch.zeros(batch, dtype=torch.int64, device=device)
