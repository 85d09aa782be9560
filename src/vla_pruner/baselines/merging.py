"""Merging tokens into the ones that stay, so that none is dropped without a home (TEAM-VLA)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def merge_into(hidden: Tensor, kept: Tensor, valid: Tensor | None = None) -> Tensor:
    """Weights that share the other tokens out among the kept ones.

    With S the kept tokens, T the others, d the width and R(x) = x / rms(x):

        W[t, s] = softmax over s of R(h_t) . R(h_s) / sqrt(d)
        new_s   = (h_s + sum_t W[t, s] h_t) / (1 + sum_t W[t, s])

    Args:
        hidden: `[B, m, D]`, compared in fp32.
        kept: `[B, k]` int64, S, k >= 1.
        valid: `[B, m]` bool; other tokens that are False are shared out to nobody.

    Returns:
        `[B, k, m]` fp32, rows that sum to 1: `new = weights @ h`.
    """
    batch, m, width = hidden.shape
    with torch.autocast(hidden.device.type, enabled=False):
        unit = F.normalize(hidden.float(), dim=-1)
        centre = unit.gather(1, kept[..., None].expand(-1, -1, width))
        # The product of two vectors of rms 1 is D times their cosine.
        share = torch.softmax(width**0.5 * centre @ unit.transpose(1, 2), dim=1)  # [B, k, m]
    own = torch.zeros(batch, kept.shape[1], m, dtype=torch.float32, device=hidden.device)
    own = own.scatter(2, kept[..., None], 1.0)
    there = own.sum(dim=1) == 0
    there = there if valid is None else there & valid
    weights = own + share * there[:, None]
    return weights / weights.sum(dim=2, keepdim=True)
