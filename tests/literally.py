"""Algorithm 1 as the paper writes it, and a judge of searches whose distances are rounded."""

from __future__ import annotations

import torch
from torch import Tensor

# What fp32 may hide in a cosine distance of some thousand entries.
ROUNDING = 2e-6


def cosine_distance(features: Tensor) -> Tensor:
    """Eq. 9 in fp32: normalise, multiply, subtract from 1."""
    unit = torch.nn.functional.normalize(features.float(), dim=-1)
    return 1.0 - unit @ unit.T


def algorithm_1(distance: Tensor, candidates: list[int], k: int, first: str) -> list[int]:
    """Redundancy-minimization filtering as the paper writes it, line by line, without shortcuts."""
    assert k <= len(candidates)
    rank = 1 if first == "second-nearest" else 0
    best, start = None, -1
    for i in candidates:
        near = sorted(float(distance[i, j]) for j in candidates if j != i)
        score = near[rank] if len(near) > rank else float("inf")
        if best is None or score > best:
            best, start = score, i
    chosen = [start]
    while len(chosen) < k:
        best, pick = None, -1
        for j in candidates:
            if j in chosen:
                continue
            nearest = min(float(distance[i, j]) for i in chosen)
            if best is None or nearest > best:
                best, pick = nearest, j
        chosen.append(pick)
    return chosen


def worst_step(features: Tensor, picks: list[int], nearest: bool) -> float:
    """How much farther away, at worst, another token was than the one picked, in float64.

    Zero for an exact search by Algorithm 1; one that rounds may lose what rounding can hide.
    """
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    distance = 1 - unit @ unit.T
    others = distance.clone().fill_diagonal_(float("inf"))
    rank = 0 if nearest else min(1, len(features) - 1)
    score = others.sort(dim=1).values[:, rank]
    worst = float(score.max() - score[picks[0]]) if len(features) > 2 else 0.0
    left = torch.ones(len(features), dtype=torch.bool)
    for step, pick in enumerate(picks):
        if step:
            score = distance[picks[:step]].amin(dim=0)
            worst = max(worst, float(score[left].max() - score[pick]))
        left[pick] = False
    return worst
