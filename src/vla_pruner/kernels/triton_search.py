"""Algorithms 1 and 2 as Triton kernels: imported only where there is Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST = 4096
"""Tokens of a row that one block keeps a number for in registers."""


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


@triton.jit
def pool_kernel(  # type: ignore[no-untyped-def]
    semantic, action, valid, pool, broken, n, k, VALID: tl.constexpr, BLOCK: tl.constexpr
):
    """The top k of both scores: a token is one of them if fewer than k come before it."""
    row = tl.program_id(0).to(tl.int64) * n
    lane = tl.arange(0, BLOCK)
    real = lane < n
    allowed = real
    if VALID:
        allowed = real & (tl.load(valid + row + lane, mask=real, other=0) != 0)
    one = tl.load(semantic + row + lane, mask=allowed, other=float("-inf")).to(tl.float32)
    two = tl.load(action + row + lane, mask=allowed, other=float("-inf")).to(tl.float32)
    if tl.max(((one != one) | (two != two)).to(tl.int32), axis=0) > 0:
        tl.store(broken, 1)
    before_one = tl.zeros((BLOCK,), dtype=tl.int32)
    before_two = tl.zeros((BLOCK,), dtype=tl.int32)
    for other in range(0, n):
        there = other < n
        if VALID:
            there = tl.load(valid + row + other) != 0
        first = tl.load(semantic + row + other, mask=there, other=float("-inf")).to(tl.float32)
        second = tl.load(action + row + other, mask=there, other=float("-inf")).to(tl.float32)
        before_one += ((first > one) | ((first == one) & (other < lane))).to(tl.int32)
        before_two += ((second > two) | ((second == two) & (other < lane))).to(tl.int32)
    chosen = (before_one < k) | (before_two < k)
    tl.store(pool + row + lane, chosen.to(tl.uint8), mask=real)


@triton.jit
def choose_kernel(  # type: ignore[no-untyped-def]
    gram, pool, kept, broken, n, k, NEAREST: tl.constexpr, BLOCK: tl.constexpr
):
    """The k of a pool that are least alike, ascending: where to start, then the greedy loop."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    real = lane < n
    gram += row * n * n
    pool += row * n
    allowed = tl.load(pool + lane, mask=real, other=0) != 0
    square = tl.load(gram + lane.to(tl.int64) * (n + 1), mask=real, other=1.0)
    if tl.max((allowed & ((square != square) | (square > 3.4e38))).to(tl.int32), axis=0) > 0:
        tl.store(broken + 1, 1)
    length = tl.maximum(tl.sqrt(square), 1e-12)
    closest = tl.full((BLOCK,), float("inf"), dtype=tl.float32)
    second = tl.full((BLOCK,), float("inf"), dtype=tl.float32)
    for other in range(0, n):
        candidate = tl.load(pool + other) != 0
        own = tl.maximum(tl.sqrt(tl.load(gram + other * (n + 1).to(tl.int64))), 1e-12)
        product = tl.load(gram + other * n + lane, mask=real, other=0.0)
        away = 1.0 - product / (length * own)
        away = tl.where((away == away) & candidate & (lane != other), away, float("inf"))
        second = tl.minimum(second, tl.maximum(closest, away))
        closest = tl.minimum(closest, away)
    start = closest if NEAREST else second
    pick = tl.argmax(tl.where(allowed, start, float("-inf")), axis=0)
    chosen = lane == pick
    nearest = tl.where(allowed, float("inf"), float("-inf"))
    for _ in range(1, k):
        own = tl.maximum(tl.sqrt(tl.load(gram + pick * (n + 1).to(tl.int64))), 1e-12)
        product = tl.load(gram + pick * n.to(tl.int64) + lane, mask=real, other=0.0)
        away = 1.0 - product / (length * own)
        # Broken features are refused later; until then every step must find a token.
        away = tl.where(away == away, tl.maximum(away, -4.0), float("inf"))
        nearest = tl.where(chosen, float("-inf"), tl.minimum(nearest, away))
        pick = tl.argmax(nearest, axis=0)
        chosen = chosen | (lane == pick)
    place = tl.cumsum(chosen.to(tl.int32), axis=0) - 1
    tl.store(kept + row * k + place, lane.to(tl.int64), mask=chosen)


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


def choose(
    semantic: Tensor, action: Tensor, features: Tensor, valid: Tensor | None, k: int, nearest: bool
) -> tuple[Tensor, Tensor]:
    """`selection.combine_then_filter` in two launches around one product of the features.

    Args:
        semantic, action: `[B, n]`; n is at most `LARGEST`.
        features: `[B, n, d]`.
        valid: `[B, n]` bool; None: all are.
        k: how many.
        nearest: which token starts.

    Returns:
        `[B, k]` int64, ascending; and bool `[2]`, whether scores or features are broken.
    """
    batch, n = semantic.shape
    features = features.float()
    gram = torch.bmm(features, features.transpose(1, 2))
    pool = torch.empty(batch, n, dtype=torch.uint8, device=semantic.device)
    kept = torch.empty(batch, k, dtype=torch.int64, device=semantic.device)
    broken = torch.zeros(2, dtype=torch.uint8, device=semantic.device)
    block, warps = max(16, triton.next_power_of_2(n)), 4 if n <= 1024 else 8
    pool_kernel[(batch,)](
        semantic.contiguous(),
        action.contiguous(),
        pool if valid is None else valid.contiguous().view(torch.uint8),
        pool,
        broken,
        n,
        k,
        VALID=valid is not None,
        BLOCK=block,
        num_warps=warps,
    )
    choose_kernel[(batch,)](
        gram, pool, kept, broken, n, k, NEAREST=nearest, BLOCK=block, num_warps=warps
    )
    return kept, broken.view(torch.bool)
