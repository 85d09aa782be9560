"""Measures of attention over an episode: overlaps, pools, forecasts and their errors."""

from __future__ import annotations

import numpy as np
import torch

from vla_pruner.pruning.history import Count, HistorySpec
from vla_pruner.pruning.selection import top_k


def top_sets(scores: np.ndarray, k: int) -> np.ndarray:
    """The k best tokens of each step: bool `[T, M]` from scores `[T, M]`; ties: lowest index.

    Raises:
        ValueError: NaN among the scores, or k outside 1..M.
    """
    chosen = np.zeros(scores.shape, dtype=bool)
    if len(scores):
        best = top_k(torch.from_numpy(np.asarray(scores, dtype=np.float32)), k)
        np.put_along_axis(chosen, best.numpy(), True, axis=1)
    return chosen


def overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """|A and B| / |A| of each step (Fig. 2), `[T]`, for sets bool `[T, M]` of equal sizes.

    Raises:
        ValueError: sets of different or no size, for which the ratio depends on the order.
    """
    size = a.sum(axis=1)
    if not np.array_equal(size, b.sum(axis=1)) or not size.all():
        raise ValueError("overlap compares sets of equal size, none of them empty; use `jaccard`")
    return (a & b).sum(axis=1) / size


def jaccard(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """|A and B| / |A or B| of each step, `[T]`, for sets bool `[T, M]`; 1 for two empty sets."""
    union = (a | b).sum(axis=1)
    return np.where(union > 0, (a & b).sum(axis=1) / np.maximum(union, 1), 1.0)


def pool_ratio(semantic: np.ndarray, forecast: np.ndarray, k: int) -> np.ndarray:
    """|C_dual| / |C_vl| of each step (Fig. 11), `[T]`, in [1, 2].

    C_vl holds the k best tokens by prefill score, C_dual also the k best by forecast action score
    (section 4.2).

    Args:
        semantic, forecast: `[T, M]`.
        k: the budget.
    """
    return (top_sets(semantic, k) | top_sets(forecast, k)).sum(axis=1) / k


def forecasts(observed: np.ndarray, spec: HistorySpec) -> np.ndarray:
    """What a memory predicts for each step from all steps before it, every token being visible.

    Args:
        observed: `[T, M]` action scores of an episode.
        spec: how they are remembered (Eq. 6 or 7).

    Returns:
        `[T, M]` fp32; zeros at step 0.
    """
    steps, tokens = observed.shape
    history = torch.zeros(1, spec.slots, tokens, dtype=torch.float32)
    count: Count = 0
    predicted = np.zeros((steps, tokens), dtype=np.float32)
    for step, row in enumerate(torch.from_numpy(np.asarray(observed, dtype=np.float32))):
        predicted[step] = spec.forecast(history, count)[0].numpy()
        history, count = spec.update(history, count, row[None])
    return predicted


def distance(predicted: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """Total variation between two scores as distributions over tokens: `[T]` in [0, 1].

    Half the sum of |p - q|, where p and q are `[T, M]` divided by their sums; their scales do not
    matter. 1 where a score is zero everywhere.
    """
    sums = predicted.sum(axis=1), observed.sum(axis=1)
    usable = (sums[0] > 0) & (sums[1] > 0)
    p = predicted / np.where(usable, sums[0], 1.0)[:, None]
    q = observed / np.where(usable, sums[1], 1.0)[:, None]
    return np.where(usable, np.abs(p - q).sum(axis=1) / 2, 1.0)
