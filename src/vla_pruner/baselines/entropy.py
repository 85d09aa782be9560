"""How spread attention is in each layer, and which share of the reusable tokens follows from it."""

from __future__ import annotations

import torch
from torch import Tensor

from vla_pruner.pruning.scores import attention_rows

_BLOCK_ROWS = 128


@torch.no_grad()
def attention_entropy(
    query: Tensor,
    key: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    causal: bool = False,
    row_weight: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Entropy (base e) of each query's attention, averaged over heads first: mean over queries.

        e = mean_i - sum_j p[i, j] log p[i, j],   p = mean over heads of the attention

    Works through blocks of 128 rows.

    Args:
        query: `[B, Hq, Q, D]`, after RoPE.
        key: `[B, Hkv, N, D]`, after RoPE; Hq is a multiple of Hkv.
        scale, softcap: see `pruning.scores.attention_rows`.
        mask: `[B|1, 1|Hq, Q|1, N]`, bool (True may attend) or additive. With `causal` both apply.
        causal: query row i sees keys up to `N - Q + i`.
        row_weight: `[B|1, Q]`, weight of each query row; 0 silences padding. None: all are alike.

    Returns:
        `[B]` fp32. Rows that see nothing have entropy 0; if all weights are 0, so is the mean.
    """
    batch, rows, keys = query.shape[0], query.shape[2], key.shape[2]
    weight = query.new_ones(batch, rows, dtype=torch.float32)
    if row_weight is not None:
        weight = row_weight.float().to(query.device).expand(batch, -1)
    total = query.new_zeros(batch, dtype=torch.float32)
    for start in range(0, rows, _BLOCK_ROWS):
        stop = min(start + _BLOCK_ROWS, rows)
        seen = keys - rows + stop if causal else keys
        part = mask
        if part is not None:
            part = part[..., :seen]
            part = part if part.shape[2] == 1 else part[:, :, start:stop]
        attention = attention_rows(
            query[:, :, start:stop],
            key[:, :, :seen],
            scale=scale,
            mask=part,
            causal=causal,
            softcap=softcap,
        ).mean(dim=1)
        total += (torch.special.entr(attention).sum(dim=-1) * weight[:, start:stop]).sum(dim=1)
    votes = weight.sum(dim=1)
    return total / torch.where(votes > 0, votes, 1.0)


def layer_shares(entropy: Tensor, growth: float) -> Tensor:
    """Share of the reusable tokens that a layer may do without, from all layers' entropy.

        r_l = 1 - (e_l - min e) / (max e - min e)
        from left to right, where r_l > r_{l-1}:  r_l <- r_{l-1} + growth (r_l - r_{l-1})

    Args:
        entropy: `[B, T]`.
        growth: how much of a rise is followed, in [0, 1].

    Returns:
        `[B, T]` fp32 in [0, 1]; all 1 where every layer has the same entropy.
    """
    low = entropy.float().amin(dim=1, keepdim=True)
    spread = entropy.float().amax(dim=1, keepdim=True) - low
    share = 1 - (entropy.float() - low) / torch.where(spread > 0, spread, 1.0)
    smooth = [share[:, 0]]
    for now in share.unbind(dim=1)[1:]:
        before = smooth[-1]
        smooth.append(torch.where(now > before, before + growth * (now - before), now))
    return torch.stack(smooth, dim=1)
