"""Density-peak clustering, and the recycling of pruned tokens that is built on it (SparseVLM)."""

from __future__ import annotations

import torch
from torch import Tensor

from vla_pruner.pruning.selection import top_k


@torch.no_grad()
def density_peaks(
    points: Tensor,
    clusters: int,
    *,
    noise: Tensor | None = None,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Cluster points around those that are dense and far from anything denser, in fp64.

    With d_ij the Euclidean distance over sqrt(D) and N_i the `clusters` points nearest to i, i
    itself among them:

        rho_i   = exp(-mean over j in N_i of d_ij^2) + noise_i
        delta_i = min over {j : rho_j > rho_i} of d_ij, or the largest distance of all if none

    Centres are the points with the largest `rho_i delta_i`; every other point joins the nearest
    centre. Ties go to the lowest index.

    Args:
        points: `[B, n, D]`.
        clusters: how many, 1 <= clusters <= n.
        noise: `[B, n]`, small numbers that tell equally dense points apart (with one cluster all
            are equally dense, and the noise alone decides); None: zeros.
        valid: `[B, n]` bool; a False point is a centre only where points run out, and a neighbour
            of nothing.

    Returns:
        centres: `[B, clusters]` int64, ascending.
        cluster: `[B, n]` int64, which of the centres each point belongs to; a centre to itself.

    Raises:
        ValueError: `clusters` out of range, or NaN among the points.
    """
    batch, size, width = points.shape
    with torch.autocast(points.device.type, enabled=False):
        points = points.double()
        exact = "donot_use_mm_for_euclid_dist"
        distance = torch.cdist(points, points, compute_mode=exact) * width**-0.5
    reach = distance
    if valid is not None:
        both = valid[:, None] & valid[:, :, None]
        distance = distance.masked_fill(~both, float("inf"))
        reach = distance.masked_fill(~both, float("-inf"))
    nearest = distance.topk(min(max(clusters, 1), size), dim=2, largest=False).values
    density = torch.exp(-nearest.square().mean(dim=2))
    if noise is not None:
        density = density + noise.to(density.device).double()
    denser = density[:, None] > density[:, :, None]
    if valid is not None:
        denser = denser & valid[:, None]
    apart = distance.masked_fill(~denser, float("inf")).amin(dim=2)
    farthest = reach.amax(dim=(1, 2))[:, None].expand_as(apart)
    peak = density * torch.where(apart.isinf(), farthest, apart)
    if valid is not None:
        peak = peak.masked_fill(~valid, float("-inf"))
    centres = top_k(peak, clusters)
    to_centre = distance.gather(2, centres[:, None].expand(-1, size, -1))
    own = torch.arange(centres.shape[1], device=points.device).expand(batch, -1)
    return centres, to_centre.argmin(dim=2).scatter(1, centres, own)


def recycled_counts(m: int, k: int, *, share: float = 0.3, group: int = 10) -> tuple[int, int, int]:
    """How k places are divided between tokens that stay as they are and recycled ones.

    Of p tokens that do not stay as they are, the best `t = int(share p) + 1` are clustered into
    `c = t // group + 1`. The number v that stay is the largest with `v + c(m - v) = k`; where there
    is none with v >= 1, one stays and the other places are recycled ones.

    Args:
        m: tokens before the cut.
        k: places after it, recycled tokens included, 1 <= k <= m.
        share: share of the p tokens that is clustered, in (0, 1].
        group: tokens per cluster, at least 1.

    Returns:
        v, t, c; `(m, 0, 0)` if k = m.
    """
    if k == m:
        return m, 0, 0

    def pool(stay: int) -> tuple[int, int]:
        gone = m - stay
        best = min(gone, int(share * gone) + 1)
        return best, min(best, best // group + 1)

    for stay in range(k, 0, -1):
        best, clusters = pool(stay)
        if stay + clusters == k:
            return stay, best, clusters
    return 1, pool(1)[0] if k > 1 else 0, k - 1


@torch.no_grad()
def keep_and_recycle(
    score: Tensor,
    hidden: Tensor,
    k: int,
    *,
    share: float = 0.3,
    group: int = 10,
    noise: Tensor | None = None,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The best tokens stay; of the others, the better part is merged into a few.

    See `recycled_counts` for how many. The clustered tokens of one cluster become their plain mean,
    which takes the place of the cluster's centre.

    Args:
        score: `[B, m]`.
        hidden: `[B, m, D]`, what is clustered.
        k: tokens to leave, recycled ones included, 1 <= k <= m.
        share, group: see `recycled_counts`.
        noise: `[B, m]`, see `density_peaks`.
        valid: `[B, m]` bool, False for tokens that come after everything else and in no mean but
            their own.

    Returns:
        kept: `[B, k]` int64, ascending; ties go to the lowest index.
        merge: `[B, k, m]` fp32, rows that sum to 1; None if nothing was merged.

    Raises:
        ValueError: k out of range, or NaN among scores or hidden states.
    """
    batch, m = score.shape
    stay = top_k(score, k, valid=valid)  # Refuses k out of range, and NaN.
    verbatim, pool, clusters = recycled_counts(m, k, share=share, group=group)
    if clusters == 0:
        return stay, None
    stay = top_k(score, verbatim, valid=valid)
    rest = score.float() if valid is None else score.float().masked_fill(~valid, -1e30)
    rest = rest.scatter(1, stay, float("-inf"))
    best = top_k(rest, pool)

    def of_pool(whole: Tensor | None) -> Tensor | None:
        return None if whole is None else whole.gather(1, best)

    index = best[..., None].expand(-1, -1, hidden.shape[2])
    real = of_pool(valid)
    centres, cluster = density_peaks(
        hidden.gather(1, index), clusters, noise=of_pool(noise), valid=real
    )
    member = _one_hot(cluster, clusters)  # [B, pool, clusters]
    if real is not None:
        itself = torch.zeros_like(real).scatter(1, centres, True)
        member = member * (real | itself)[..., None]
    mean = (member / member.sum(dim=1, keepdim=True)).transpose(1, 2)
    kept = torch.cat([stay, best.gather(1, centres)], dim=1)
    rows = torch.zeros(batch, k, m, dtype=torch.float32, device=score.device)
    rows[:, :verbatim] = _one_hot(stay, m)
    spread = best[:, None].expand(-1, clusters, -1)
    rows[:, verbatim:] = torch.zeros_like(rows[:, verbatim:]).scatter(2, spread, mean)
    kept, order = kept.sort(dim=1)
    return kept, rows.gather(1, order[..., None].expand(-1, -1, m))


def _one_hot(index: Tensor, count: int) -> Tensor:
    """fp32 `[..., count]`, 1 at `index` `[...]`; F.one_hot makes the host wait for the largest."""
    return (index[..., None] == torch.arange(count, device=index.device)).float()
