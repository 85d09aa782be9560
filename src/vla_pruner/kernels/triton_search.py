"""The greedy loop of Algorithm 1 as one Triton kernel: imported only where there is Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST = 4096
"""Tokens of a row that one block keeps a distance for in registers."""


@triton.jit
def greedy_kernel(distance, score, candidates, picks, n, k, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One block per row of the batch; ties go to the lowest index."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    real = lane < n
    allowed = tl.load(candidates + row * n + lane, mask=real, other=0) != 0
    start = tl.load(score + row * n + lane, mask=real, other=float("-inf"))
    pick = tl.argmax(tl.where(allowed, start, float("-inf")), axis=0)
    tl.store(picks + row * k, pick.to(tl.int64))
    nearest = tl.where(allowed, float("inf"), float("-inf"))
    for step in range(1, k):
        to_pick = tl.load(distance + (row * n + pick) * n + lane, mask=real, other=float("inf"))
        nearest = tl.minimum(nearest, to_pick)
        nearest = tl.where(lane == pick, float("-inf"), nearest)
        pick = tl.argmax(nearest, axis=0)
        tl.store(picks + row * k + step, pick.to(tl.int64))


def greedy(distance: Tensor, score: Tensor, candidates: Tensor, k: int) -> Tensor:
    """The k steps of the search.

    Args:
        distance: `[B, n, n]` fp32, between all tokens; n is at most `LARGEST`.
        score: `[B, n]` fp32, the largest of a candidate's starts.
        candidates: `[B, n]` bool.
        k: how many.

    Returns:
        `[B, k]` int64, in the order picked.
    """
    batch, n = score.shape
    picks = torch.empty(batch, k, dtype=torch.int64, device=score.device)
    greedy_kernel[(batch,)](
        distance.contiguous(),
        score.contiguous(),
        candidates.contiguous().view(torch.uint8),
        picks,
        n,
        k,
        BLOCK=triton.next_power_of_2(n),
        num_warps=4 if n <= 1024 else 8,
    )
    return picks
