"""Which visual tokens may keep the keys and values of the step before, and in which order."""

from __future__ import annotations

import torch
from torch import Tensor

from vla_pruner.pruning.selection import top_k


def reusable(
    similarity: Tensor,
    relevance: Tensor,
    *,
    threshold: float,
    static: int,
    relevant: int,
    most: int,
    valid: Tensor | None = None,
) -> Tensor:
    """Tokens of one camera that look as before and that the instruction is not about.

    Args:
        similarity: `[B, m]`, of each token's patch with the one of the step before.
        relevance: `[B, m]`, attention that it got from the instruction.
        threshold: a patch is static if its similarity is at least this.
        static: at most so many static tokens are candidates, the most similar ones.
        relevant: so many tokens, the most relevant ones, are no candidates.
        most: at most so many candidates are named, the most similar ones.
        valid: `[B, m]` bool, False for tokens that are no candidates; None: all may be.

    Returns:
        `[B, m]` bool. Ties go to the lowest index.

    Raises:
        ValueError: NaN among the scores.
    """
    if valid is not None:
        similarity = similarity.masked_fill(~valid, float("-inf"))
    named = (similarity >= threshold) & _best(similarity, static) & ~_best(relevance, relevant)
    return named & _best(similarity.masked_fill(~named, float("-inf")), most)


def reuse_order(named: Tensor, similarity: Tensor | None = None) -> Tensor:
    """Named tokens first: by position, or the most similar first; then all others.

    Args:
        named: `[B, M]` bool.
        similarity: `[B, M]`; None: by position.

    Returns:
        `[B, M]` int64, each row all of 0..M-1.
    """
    rank = torch.zeros_like(named, dtype=torch.float32) if similarity is None else similarity
    rank = rank.masked_fill(~named, float("-inf"))
    return torch.sort(rank, dim=1, descending=True, stable=True).indices


def reuse_counts(shares: Tensor, available: Tensor) -> Tensor:
    """Tokens that have left after each cut: `max(1, floor(r n))`, but never fewer than before.

    Args:
        shares: `[B, C]`, r of each cut's layer.
        available: `[B]` int64, n tokens that may leave.

    Returns:
        `[B, C]` int64, in 0..n; 0 where n is 0.
    """
    n = available[:, None]
    counts = (shares.float() * n).floor().long().clamp_min(1)
    return torch.minimum(counts.cummax(dim=1).values, n)


def _best(scores: Tensor, k: int) -> Tensor:
    """`[B, m]` bool, the k largest of each row (all of them if there are fewer)."""
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    k = min(k, scores.shape[1])
    return chosen.scatter(1, top_k(scores, k), True) if k > 0 else chosen
