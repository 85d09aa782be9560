"""The loop of the determinant search as one Triton kernel: imported only where there is Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST = 2048
"""Tokens of a row that one block keeps in registers, beside a tile of earlier rows."""


@triton.jit
def determinant_kernel(  # type: ignore[no-untyped-def]
    cosine, quality, last, factor, picks, n, k, nothing, BLOCK: tl.constexpr, TILE: tl.constexpr
):
    """One block per row of the batch; ties go to the lowest index."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    tile = tl.arange(0, TILE)
    real = lane < n
    weight = tl.load(quality + row * n + lane, mask=real, other=0.0)
    order = tl.load(last + row * n + lane, mask=real, other=float("-inf"))
    rest = tl.where(real, 1.0, 0.0)
    for step in range(0, k):
        gain = weight * weight * rest
        score = tl.where((rest > nothing) & (gain > 0.0) & (order > float("-inf")), gain, order)
        pick = tl.argmax(score, axis=0)
        tl.store(picks + row * k + step, pick.to(tl.int64))
        order = tl.where(lane == pick, float("-inf"), order)
        left = tl.sum(tl.where(lane == pick, rest, 0.0), axis=0)
        new = tl.load(cosine + (row * n + pick) * n + lane, mask=real, other=0.0)
        for start in range(0, step, TILE):
            earlier = row * k + start + tile
            there = start + tile < step
            own = tl.load(factor + earlier * n + pick, mask=there, other=0.0)
            whole = there[:, None] & real[None, :]
            rows = tl.load(factor + earlier[:, None] * n + lane[None, :], mask=whole, other=0.0)
            new -= tl.sum(own[:, None] * rows, axis=0)
        new = tl.where(left > nothing, new / tl.sqrt(tl.maximum(left, nothing)), 0.0)
        tl.store(factor + (row * k + step) * n + lane, new, mask=real)
        tl.debug_barrier()  # Other threads of the block read it in the next step.
        rest -= new * new


def determinant(cosine: Tensor, quality: Tensor, last: Tensor, k: int, nothing: float) -> Tensor:
    """The k steps of the search.

    Args:
        cosine: `[B, n, n]` fp32; n is at most `LARGEST`.
        quality: `[B, n]` fp32 in [0, 1].
        last: `[B, n]` fp32 below 0, the order of tokens that add nothing.
        k: how many.
        nothing: share of a token's squared length that counts as none.

    Returns:
        `[B, k]` int64, in the order picked.
    """
    batch, n = quality.shape
    picks = torch.empty(batch, k, dtype=torch.int64, device=quality.device)
    factor = torch.empty(batch, k, n, dtype=torch.float32, device=quality.device)
    determinant_kernel[(batch,)](
        cosine.contiguous(),
        quality.contiguous(),
        last.contiguous(),
        factor,
        picks,
        n,
        k,
        nothing,
        BLOCK=triton.next_power_of_2(n),
        TILE=8,
        num_warps=4 if n <= 512 else 8,
    )
    return picks
