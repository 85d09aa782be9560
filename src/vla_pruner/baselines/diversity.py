"""Choosing tokens for how they differ: max-min diversity (DivPrune), crop-wise quotas (HoloV)."""

from __future__ import annotations

import torch
from torch import Tensor

from vla_pruner.pruning.selection import First, max_min_filter, top_k


@torch.no_grad()
def most_diverse(
    features: Tensor, k: int, *, first: First = "nearest", valid: Tensor | None = None
) -> Tensor:
    """Greedy max-min search over all tokens: each next one is farthest from those chosen.

    Args:
        features: `[B, n, D]`, compared by cosine distance in fp32.
        k: tokens to keep, 1 <= k <= n.
        first: which token starts, see `selection.max_min_filter`.
        valid: `[B, n]` bool, False for tokens that are candidates of nothing. They fill up the
            budget, lowest index first, only where fewer than k tokens are valid.

    Returns:
        `[B, k]` int64, ascending; ties go to the lowest index.

    Raises:
        ValueError: k out of range, or NaN or infinite features among the candidates.
    """
    candidates = None
    if valid is not None:
        # top_k refuses a k out of range; all valid tokens, and as few others as are needed.
        needed = top_k(valid.float(), k)
        candidates = valid | torch.zeros_like(valid).scatter(1, needed, True)
    return max_min_filter(features, k, candidates=candidates, first=first).sort(dim=1).values


def crop_sizes(n: int, crops: int) -> tuple[int, ...]:
    """Sizes of contiguous crops of n tokens: they differ by at most one, larger ones first.

    There are never more crops than tokens.
    """
    crops = min(crops, n)
    return tuple(n // crops + (number < n % crops) for number in range(crops))


@torch.no_grad()
def crop_quotas(
    attention: Tensor,
    features: Tensor,
    k: int,
    *,
    crops: int = 16,
    beta: float = 0.09,
    valid: Tensor | None = None,
) -> Tensor:
    """Share a budget among crops by attention and variety; each keeps its most attended tokens.

    The n tokens are cut into contiguous crops. In a crop of n_p tokens, with S the matrix of
    cosines and zeros on its diagonal:

        u_i     = sum_j S_ij / (n_p - 1)
        var_i   = sum_j (S_ij - u_i)^2 / (n_p - 1)
        token_i = a_i + beta c var_i,   c = mean |a| / (mean |var| + 1e-6)
        crop_p  = mean of token_i

    Crop p gets `floor(k crop_p / sum crop)` places; what is left, and what a crop cannot fill, goes
    one by one to the crops with the largest scores that have room, round after round. Inside a crop
    the tokens with the largest a stay.

    Args:
        attention: `[B, n]`, a, at least 0, of any scale.
        features: `[B, n, D]`, compared in fp32.
        k: tokens to keep, 1 <= k <= n.
        crops: number of crops; at most one per token is made.
        beta: weight of the variety within crops, at least 0.
        valid: `[B, n]` bool, False for tokens that take part in nothing and come last.

    Returns:
        `[B, k]` int64, ascending; ties go to the lowest index.

    Raises:
        ValueError: k out of range, or NaN among attention or features.
    """
    batch, n = attention.shape
    sizes = crop_sizes(n, crops)
    groups, width = len(sizes), max(sizes)
    slot = torch.arange(width, device=attention.device)
    lengths = torch.tensor(sizes, dtype=torch.int64, device=attention.device)
    ends = lengths.cumsum(0)
    starts = ends - lengths
    place = (starts[:, None] + slot).clamp_max(n - 1)  # [G, w], the last one of a short crop twice
    real = (starts[:, None] + slot < ends[:, None]).expand(batch, -1, -1)
    if valid is not None:
        real = real & valid[:, place]

    a = attention.float()[:, place].masked_fill(~real, 0.0)
    score = _crop_scores(a, features[:, place.flatten()].unflatten(1, (groups, width)), real, beta)
    _ = top_k(score, 1)  # Refuses NaN.
    total = score.sum(dim=1, keepdim=True)
    even = torch.full_like(score, 1.0 / groups)
    share = torch.where(total > 0, score / torch.where(total > 0, total, 1.0), even)
    # What is a whole number but for rounding counts as one.
    quota = (k * share + 1e-4).floor().long()

    # Round in which each token would get a place: 0 for a crop's quota, then one token per round.
    ranked = a.masked_fill(~real, float("-inf")).sort(dim=2, descending=True, stable=True).indices
    rank = torch.zeros_like(ranked).scatter(2, ranked, slot.expand_as(ranked))
    turn = (rank - quota[..., None] + 1).clamp_min(0).masked_fill(~real, n + 1)
    by_score = score.sort(dim=1, descending=True, stable=True).indices
    crop = torch.arange(groups, device=score.device).expand(batch, -1)
    standing = torch.zeros_like(by_score).scatter(1, by_score, crop)
    order = (turn * groups + standing[..., None]).flatten(1)
    at = [crop * width + slot for crop, size in enumerate(sizes) for slot in range(size)]
    places = torch.tensor(at, dtype=torch.int64, device=order.device)
    return top_k(-order[:, places].float(), k)


def _crop_scores(a: Tensor, features: Tensor, real: Tensor, beta: float) -> Tensor:
    """`[B, G]` from a `[B, G, w]`, features `[B, G, w, D]`, real `[B, G, w]` bool."""
    with torch.autocast(features.device.type, enabled=False):
        unit = torch.nn.functional.normalize(features.float(), dim=-1)
        cosine = unit @ unit.transpose(2, 3)
    pair = real[..., None] & real[:, :, None]
    cosine = cosine.masked_fill(~pair, 0.0)
    cosine = cosine - torch.diag_embed(cosine.diagonal(dim1=2, dim2=3))
    count = real.sum(dim=2)
    others = (count - 1).clamp_min(1)[..., None]
    mean = cosine.sum(dim=3) / others
    spread = (cosine - mean[..., None]).square().masked_fill(~pair, 0.0).sum(dim=3) / others
    per_token = count.clamp_min(1)
    level = a.sum(dim=2) / per_token
    scale = level / (spread.sum(dim=2) / per_token + 1e-6)
    return ((a + beta * spread * scale[..., None]) * real).sum(dim=2) / per_token
