"""Scores beyond mean attention: the strongest head of each row, and attention before softmax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from vla_pruner.kernels.native import Attention
from vla_pruner.pruning.scores import Rows, attention_rows

Heads = Literal["mean", "max"]

# Query rows whose logits exist at once.
_BLOCK_ROWS = 64


@torch.no_grad()
def attention_column_max(
    query: Tensor,
    key: Tensor,
    columns: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    causal: bool = False,
    rows: Rows = None,
    row_weight: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention that keys receive from each row's most attentive head, mean over rows (FitPrune).

    Args:
        query, key, columns, scale, mask, causal, rows, row_weight, softcap, sinks: see
            `scores.attention_column_mean`.

    Returns:
        `[B, M]` fp32: `sum_i w_i max_h A[h, i, m] / sum_i w_i`; 0 where no row has weight. Rows
        that may attend to nothing add 0.

    Raises:
        ValueError: shapes that do not fit together, or `rows` without a row.
    """
    seen = Attention(query, key, scale, mask, causal, softcap, sinks)
    return column_max(seen, columns, rows, row_weight)


@torch.no_grad()
def column_max(
    seen: Attention, columns: Tensor, rows: Rows = None, row_weight: Tensor | None = None
) -> Tensor:
    """What `attention_column_max` says of an attention: `[B, M]` fp32; 0 for columns of -1."""
    seen.check()
    query, key, mask, causal = seen.query, seen.key, seen.mask, seen.causal
    batch, total, keys = query.shape[0], query.shape[2], key.shape[2]
    number = _numbers(rows, total, query.device)
    columns = columns.to(query.device).expand(batch, -1)

    def received(at: Tensor) -> Tensor:
        block_mask = mask
        if mask is not None and mask.shape[2] != 1:
            block_mask = _rows_of(mask, at, batch)
        if causal:
            reach = at + (keys - total)
            past = torch.arange(keys, device=query.device) <= reach[..., None]
            past = past[:, None]
            if block_mask is None:
                block_mask = past
            elif block_mask.dtype == torch.bool:
                block_mask = block_mask & past
            else:
                lowest = torch.finfo(block_mask.dtype).min
                block_mask = torch.where(past, block_mask, lowest)
        probabilities = attention_rows(
            _rows_of(query, at, batch),
            key,
            scale=seen.scale,
            mask=block_mask,
            softcap=seen.softcap,
            sinks=seen.sinks,
        )
        there = columns.clamp_min(0)[:, None].expand(-1, at.shape[1], -1)
        return probabilities.amax(dim=1).gather(2, there)

    mean = _mean_over_rows(received, number, row_weight, batch, columns.shape[1])
    return mean.masked_fill(columns < 0, 0.0)


@torch.no_grad()
def logit_column_mean(
    query: Tensor,
    key: Tensor,
    *,
    scale: float,
    rows: Rows = None,
    row_weight: Tensor | None = None,
    heads: Heads = "mean",
) -> Tensor:
    """Scaled products of queries and keys, joined over heads, mean over query rows (VLA-ADP).

    Args:
        query: `[B, Hq, Q, D]`.
        key: `[B, Hkv, M, D]`, the keys asked about; Hq is a multiple of Hkv.
        scale: factor on `Q K^T`, usually `D ** -0.5`.
        rows: query rows that vote: None (all), a slice, `[R]` or `[B, R]` int64.
        row_weight: `[B|1, Q]`, weight of each query row; 0 silences padding.
        heads: how heads are joined in each row, before the mean over rows.

    Returns:
        `[B, M]` fp32; 0 where no row has weight.

    Raises:
        ValueError: shapes that do not fit together, or `rows` without a row.
    """
    if query.ndim != 4 or key.ndim != 4 or query.shape[1] % key.shape[1]:
        raise ValueError(
            "query and key must be [B, H, tokens, D], with a multiple of the key heads as query "
            f"heads; got {tuple(query.shape)} and {tuple(key.shape)}."
        )
    batch, total = query.shape[0], query.shape[2]
    number = _numbers(rows, total, query.device)
    keys = key.float().repeat_interleave(query.shape[1] // key.shape[1], dim=1)

    def received(at: Tensor) -> Tensor:
        logits = _rows_of(query, at, batch).float() @ keys.transpose(2, 3) * scale
        return logits.mean(dim=1) if heads == "mean" else logits.amax(dim=1)

    with torch.autocast(query.device.type, enabled=False):
        return _mean_over_rows(received, number, row_weight, batch, key.shape[2])


def _mean_over_rows(
    received: Callable[[Tensor], Tensor],
    number: Tensor,
    row_weight: Tensor | None,
    batch: int,
    columns: int,
) -> Tensor:
    """Weighted mean of `received(rows [1|B, R])` `[B, R, M]` over all rows: `[B, M]`."""
    total = number.new_zeros(batch, columns, dtype=torch.float32)
    weight = number.new_zeros(batch, 1, dtype=torch.float32)
    for start in range(0, number.shape[1], _BLOCK_ROWS):
        at = number[:, start : start + _BLOCK_ROWS]
        vote = torch.ones_like(at, dtype=torch.float32)
        if row_weight is not None:
            whole = row_weight.to(at.device).float()
            rows = max(at.shape[0], whole.shape[0])
            vote = whole.expand(rows, -1).gather(1, at.expand(rows, -1))
        vote = vote.expand(batch, -1)
        total = total + (received(at) * vote[..., None]).sum(dim=1)
        weight = weight + vote.sum(dim=1, keepdim=True)
    return total / torch.where(weight > 0, weight, 1.0)


def _numbers(rows: Rows, total: int, device: torch.device) -> Tensor:
    """Numbers of the rows that vote, `[1, R]` or `[B, R]`."""
    if isinstance(rows, Tensor):
        number = rows.to(device)
        number = number if number.ndim == 2 else number[None]
    else:
        number = torch.arange(total, device=device)[slice(None) if rows is None else rows][None]
    if number.shape[1] == 0:
        raise ValueError(f"`rows` names none of the {total} query rows: no row would vote.")
    return number


def _rows_of(tensor: Tensor, at: Tensor, batch: int) -> Tensor:
    """Entries `at` `[1|B, R]` of a `[B|1, H, Q, N]` tensor along its rows."""
    rows = max(batch if at.shape[0] > 1 else tensor.shape[0], tensor.shape[0])
    index = at[:, None, :, None].expand(rows, tensor.shape[1], -1, tensor.shape[3])
    return tensor.expand(rows, -1, -1, -1).gather(2, index)
