"""How much of two scores a set of tokens holds, and the smallest that holds enough (PACT)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vla_pruner.pruning.selection import top_k


@torch.no_grad()
def shares(score: Tensor, valid: Tensor | None = None) -> Tensor:
    """Scores `[B, n]` divided by their sum over valid tokens, fp32; 0 where that sum is 0.

    Raises:
        ValueError: NaN among the scores.
    """
    score = score.float()
    _ = top_k(score, 1)  # Refuses NaN.
    if valid is not None:
        score = score.masked_fill(~valid, 0.0)
    total = score.sum(dim=1, keepdim=True)
    return torch.where(total > 0, score / torch.where(total > 0, total, 1.0), 0.0)


@torch.no_grad()
def conflict(p: Tensor, a: Tensor) -> Tensor:
    """Jensen-Shannon divergence of two distributions `[B, n]` over ln 2: `[B]` in [0, 1]."""
    middle = (p + a) / 2
    return (_divergence(p, middle) + _divergence(a, middle)) / (2 * math.log(2))


@torch.no_grad()
def covering_level(p: Tensor, a: Tensor, counts: Sequence[int], theta: Tensor) -> Tensor:
    """The first of some budgets whose tokens hold enough of two distributions.

    The tokens of a budget B are the B with the largest `max(p, a)`; ties go to the lowest index.

    Args:
        p, a: `[B, n]`, rows that sum to 1.
        counts: budgets, ascending, in 1..n.
        theta: `[B]`, share of both that has to be held.

    Returns:
        `[B]` int64, indices into `counts`; the last if none is enough.
    """
    order = torch.maximum(p, a).sort(dim=1, descending=True, stable=True).indices
    ends = torch.tensor([count - 1 for count in counts], dtype=torch.int64, device=p.device)
    held = torch.minimum(
        p.gather(1, order).cumsum(dim=1)[:, ends], a.gather(1, order).cumsum(dim=1)[:, ends]
    )
    enough = held >= theta[:, None]
    enough[:, -1] = True
    return enough.int().argmax(dim=1)


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    """Kullback-Leibler divergence `[B]` of p from q, which is positive where p is."""
    return torch.where(p > 0, p * (p / torch.where(q > 0, q, 1.0)).log(), 0.0).sum(dim=1)
