"""Choosing tokens that stand for all others: greedy facility location (SCOPE)."""

from __future__ import annotations

import torch
from torch import Tensor

from vla_pruner.pruning.selection import top_k


@torch.no_grad()
def most_covering(
    features: Tensor, k: int, *, weight: Tensor | None = None, valid: Tensor | None = None
) -> Tensor:
    """Greedy search for k tokens to one of which every token is similar.

    With `s_ij = cos(v_i, v_j)` and `c_i` the largest similarity of token i to a chosen one (0 at
    first, and never below), each step takes

        argmax_j  w_j sum_i max(0, s_ij - c_i)

    Without weights the greedy sum of c is at least 1 - 1/e of the largest.

    Args:
        features: `[B, n, D]`, compared by cosine in fp32.
        k: tokens to keep, 1 <= k <= n.
        weight: `[B, n]`, w >= 0; None: 1 for all.
        valid: `[B, n]` bool, False for tokens that need not be covered and fill up the budget,
            lowest index first, only where fewer than k tokens are valid.

    Returns:
        `[B, k]` int64, ascending; ties go to the lowest index, and where no token gains anything
        any more, to the largest weight.

    Raises:
        ValueError: k out of range, or NaN among features or weights.
    """
    there = torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)
    there = there if valid is None else valid
    w = there.float() if weight is None else weight.float().masked_fill(~there, 0.0)
    length = features.float().square().sum(dim=-1).masked_fill(~there, 0.0)
    _ = top_k(w + length, k)  # Refuses NaN, and a k out of range.
    return _covering_search(features.detach(), w, there, k).sort(dim=1).values


# One operator, so that a compiled graph holds one node instead of k unrolled steps.
@torch.library.custom_op(
    "vla_pruner::covering_search",
    mutates_args=(),
    schema="(Tensor features, Tensor weight, Tensor valid, int k) -> Tensor",
)
def _covering_search(features: Tensor, weight: Tensor, valid: Tensor, k: int) -> Tensor:
    """`features` [B, n, D], `weight` fp32 and `valid` bool [B, n] -> [B, k] in the order picked."""
    with torch.autocast(features.device.type, enabled=False):
        whole = features.float().masked_fill(~valid[..., None], 0.0)
        unit = torch.nn.functional.normalize(whole, dim=-1)
        cosine = unit @ unit.transpose(1, 2)
    most = weight.amax(dim=1, keepdim=True)
    share = torch.where(most > 0, weight / torch.where(most > 0, most, 1.0), weight)
    last = torch.where(valid, share - 2.0, -3.0)
    covered, free, picks = torch.zeros_like(share), valid, []
    for _ in range(k):
        gain = share * (cosine - covered[..., None]).clamp_min(0.0).sum(dim=1)
        pick = torch.where(free & (gain > 0), gain, last).argmax(dim=1, keepdim=True)
        picks.append(pick)
        last, free = last.scatter(1, pick, float("-inf")), free.scatter(1, pick, False)
        row = cosine.gather(1, pick[..., None].expand(-1, -1, cosine.shape[2]))[:, 0]
        covered = torch.maximum(covered, row)
    return torch.cat(picks, dim=1)


@_covering_search.register_fake
def _(features: Tensor, weight: Tensor, valid: Tensor, k: int) -> Tensor:
    return features.new_empty((features.shape[0], k), dtype=torch.int64)
