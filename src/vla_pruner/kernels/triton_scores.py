"""Attention that columns receive, as one Triton kernel: imported only where there is Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST_HEAD = 256
"""Width of a head that one block holds."""

_ROWS, _KEYS = 16, 64


@triton.jit
def logits_of(query, key, visible, bias, scale, softcap, CAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Logits `[rows, keys]` in fp32, -1e30 where nothing is to be seen."""
    logits = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
    if CAP:
        logits = softcap * (2.0 * tl.sigmoid(2.0 * logits / softcap) - 1.0)
    return tl.where(visible, logits + bias, -1e30)


@triton.jit
def shown(  # type: ignore[no-untyped-def]
    mask, row, column, there, mask_row, hidden_below, last, MASK: tl.constexpr, CAUSAL: tl.constexpr
):
    """Whether a query sees a key, and what the mask adds: `[rows, keys]` each."""
    visible = there
    bias = tl.zeros(there.shape, dtype=tl.float32)
    if MASK != 0:
        entry = tl.load(mask + row[:, None] * mask_row + column[None, :], mask=there, other=0)
        if MASK == 1:
            visible = visible & (entry != 0)
        else:
            bias = entry.to(tl.float32)
            visible = visible & (bias > hidden_below)
    if CAUSAL:
        visible = visible & (column[None, :] <= row[:, None] + last)
    return visible, bias


@triton.jit
def column_kernel(  # type: ignore[no-untyped-def]
    query,
    key,
    columns,
    rows,
    weight,
    mask,
    sinks,
    received,
    query_batch,
    query_head,
    query_row,
    key_batch,
    key_head,
    key_row,
    mask_batch,
    mask_head,
    mask_row,
    columns_batch,
    rows_batch,
    weight_batch,
    heads,
    group,
    keys,
    width,
    voting,
    asked,
    first,
    step,
    last,
    scale,
    softcap,
    hidden_below,
    LISTED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    MASK: tl.constexpr,
    SINKS: tl.constexpr,
    CAUSAL: tl.constexpr,
    CAP: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """One block of rows of one head: two walks over the keys, one for the softmax, one to add up.

    Every block writes sums of its own, so that the order of additions is always the same.
    """
    part, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    number = part * ROWS + tl.arange(0, ROWS)
    real = number < voting
    if LISTED:
        row = tl.load(rows + batch * rows_batch + number, mask=real, other=0).to(tl.int32)
    else:
        row = first + step * number
    lane = tl.arange(0, WIDTH)
    query += batch * query_batch + head * query_head
    key += batch * key_batch + (head // group) * key_head
    mask += batch * mask_batch + head * mask_head
    own = tl.load(
        query + row[:, None] * query_row + lane[None, :],
        mask=real[:, None] & (lane[None, :] < width),
        other=0.0,
    )
    highest = tl.full((ROWS,), -1e30, dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    for start in range(0, keys, KEYS):
        column = start + tl.arange(0, KEYS)
        inside = column < keys
        other = tl.load(
            key + column[:, None] * key_row + lane[None, :],
            mask=inside[:, None] & (lane[None, :] < width),
            other=0.0,
        )
        there = real[:, None] & inside[None, :]
        visible, bias = shown(mask, row, column, there, mask_row, hidden_below, last, MASK, CAUSAL)
        logits = logits_of(own, other, visible, bias, scale, softcap, CAP)
        higher = tl.maximum(highest, tl.max(logits, axis=1))
        shares = tl.where(visible, tl.exp(logits - higher[:, None]), 0.0)
        total = total * tl.exp(highest - higher) + tl.sum(shares, axis=1)
        highest = higher
    if SINKS:
        sink = tl.load(sinks + head).to(tl.float32)
        higher = tl.maximum(highest, sink)
        total = total * tl.exp(highest - higher) + tl.exp(sink - higher)
        highest = higher
    vote = tl.where(total > 0, 1.0 / total, 0.0)
    voters = voting.to(tl.float32)
    if WEIGHTED:
        voters = 0.0
        for start in range(0, voting, KEYS):
            one = start + tl.arange(0, KEYS)
            inside = one < voting
            if LISTED:
                place = tl.load(rows + batch * rows_batch + one, mask=inside, other=0)
            else:
                place = first + step * one
            voters += tl.sum(tl.load(weight + batch * weight_batch + place, mask=inside, other=0.0))
        vote *= tl.load(weight + batch * weight_batch + row, mask=real, other=0.0)
        voters = tl.where(voters > 0, voters, 1.0)
    vote /= voters * heads
    parts = tl.num_programs(0)
    received += ((batch * heads + head) * parts + part) * asked
    for start in range(0, asked, KEYS):
        place = start + tl.arange(0, KEYS)
        column = tl.load(columns + batch * columns_batch + place, mask=place < asked, other=-1)
        column = column.to(tl.int32)
        inside = column >= 0
        other = tl.load(
            key + column[:, None] * key_row + lane[None, :],
            mask=inside[:, None] & (lane[None, :] < width),
            other=0.0,
        )
        there = real[:, None] & inside[None, :]
        visible, bias = shown(mask, row, column, there, mask_row, hidden_below, last, MASK, CAUSAL)
        logits = logits_of(own, other, visible, bias, scale, softcap, CAP)
        shares = tl.where(visible, tl.exp(logits - highest[:, None]), 0.0) * vote[:, None]
        tl.store(received + place, tl.sum(shares, axis=0), mask=place < asked)


def column_mean(
    query: Tensor,
    key: Tensor,
    columns: Tensor,
    rows: range | Tensor,
    *,
    mask: Tensor | None,
    row_weight: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    causal: bool,
    softcap: float | None,
) -> Tensor:
    """`scores.attention_column_mean` of tensors on a GPU (see there), with `rows` spelled out.

    Two launches: the kernel, and the sum over its blocks. Heads are at most `LARGEST_HEAD` wide.
    """
    batch, heads, queries, width = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    query = query if query.stride(3) == 1 else query.contiguous()
    key = key if key.stride(3) == 1 else key.contiguous()
    listed = rows if isinstance(rows, Tensor) else None
    voting = len(rows) if listed is None else listed.shape[-1]
    hidden_below, steps = 0.0, [0, 0, 0]
    if mask is not None:
        mask = mask if mask.stride(3) == 1 else mask.contiguous()
        if mask.dtype != torch.bool:
            hidden_below = torch.finfo(mask.dtype).min / 2
        else:
            mask = mask.view(torch.uint8)
        steps = [0 if mask.shape[dim] == 1 else mask.stride(dim) for dim in range(3)]
    kind = 0 if mask is None else 1 if mask.dtype == torch.uint8 else 2
    weight = None if row_weight is None else row_weight.float()
    asked = columns.shape[1]
    parts = triton.cdiv(voting, _ROWS)
    received = torch.empty(batch, heads * parts, asked, dtype=torch.float32, device=query.device)
    column_kernel[(parts, heads, batch)](
        query,
        key,
        columns,
        columns if listed is None else listed,
        received if weight is None else weight,
        received if mask is None else mask,
        received if sinks is None else sinks,
        received,
        *query.stride()[:3],
        *key.stride()[:3],
        *steps,
        columns.stride(0) if len(columns) > 1 else 0,
        0 if listed is None or listed.ndim == 1 or len(listed) == 1 else listed.stride(0),
        0 if weight is None or len(weight) == 1 else weight.stride(0),
        heads,
        heads // kv_heads,
        keys,
        width,
        voting,
        asked,
        *((0, 0) if isinstance(rows, Tensor) else (rows.start, rows.step)),
        keys - queries,
        scale,
        softcap or 0.0,
        hidden_below,
        LISTED=listed is not None,
        WEIGHTED=weight is not None,
        MASK=kind,
        SINKS=sinks is not None,
        CAUSAL=causal,
        CAP=softcap is not None,
        WIDTH=max(16, triton.next_power_of_2(width)),
        ROWS=_ROWS,
        KEYS=_KEYS,
        num_warps=4,
    )
    return received.sum(dim=1)
