"""Attention that visual tokens receive, without ever holding a whole attention matrix (Eq. 1-4)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vla_pruner import _flags as flags
from vla_pruner.kernels import native

try:  # It comes with PyTorch for CUDA.
    from vla_pruner.kernels import triton_scores as _triton
except ImportError:
    _triton = None  # type: ignore[assignment]

Rows = slice | Tensor | None

# Stands in a logit for "hidden": exp() of it is 0, and a row that holds nothing else is no NaN.
_HIDDEN = -1e30

# Query rows of a block: few enough that a causal mask saves nearly half of the work.
_BLOCK_ROWS = 128


@torch.no_grad()
def attention_rows(
    query: Tensor,
    key: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    causal: bool = False,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention probabilities of a few query rows, `softmax(Q K^T)` of Eq. 1 and 3.

    Args:
        query: `[B, Hq, R, D]`, after RoPE.
        key: `[B, Hkv, N, D]`, after RoPE; Hq is a multiple of Hkv (grouped-query attention).
        scale: factor on `Q K^T`, usually `D ** -0.5`.
        mask: `[B|1, 1|Hq, R|1, N]`, bool (True may attend) or additive. With `causal` both apply.
        causal: row i sees keys up to `N - R + i`.
        softcap: logits become `softcap * tanh(logits / softcap)` (Gemma 2).
        sinks: `[Hq]`, a logit in every softmax of a head that belongs to no key (gpt-oss).

    Returns:
        `[B, Hq, R, N]` fp32; a row that may attend to nothing is all zeros, never NaN.

    Raises:
        ValueError: shapes that do not fit together.
    """
    _check(query, key, mask)
    rows, keys = query.shape[2], key.shape[2]
    last_visible = torch.arange(keys - rows, keys, device=key.device) if causal else None
    shown = max(0, keys - rows + 1) if causal else keys
    with torch.autocast(query.device.type, enabled=False):
        bias, sees = _visibility(mask, last_visible, shown, keys)
        probabilities = _probabilities(query, key, scale, bias, softcap, sinks)
    return probabilities if sees is None else probabilities * sees


@torch.no_grad()
def attention_column_mean(
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
    chunk: int = 1 << 19,
) -> Tensor:
    """Attention that each of some keys receives: mean over heads and query rows (Eq. 2 and 4).

    Works through blocks of heads and rows, so that only about `chunk` probabilities per batch
    element exist at once; with `causal`, keys that no row of a block can see are not computed.

    Args:
        query: `[B, Hq, Q, D]`, after RoPE.
        key: `[B, Hkv, N, D]`, after RoPE; Hq is a multiple of Hkv (grouped-query attention).
        columns: `[B|1, M]` int64, the keys asked about (positions of the visual tokens); -1 for a
            token that is not there and gets 0.
        scale: factor on `Q K^T`, usually `D ** -0.5`.
        mask: `[B|1, 1|Hq, Q|1, N]`, bool (True may attend) or additive. With `causal` both apply.
        causal: query row i sees keys up to `N - Q + i`.
        rows: query rows that vote: None (all), a slice, `[R]` or `[B, R]` int64 (0 <= row < Q).
        row_weight: `[B|1, Q]`, weight of each query row; 0 silences padding.
        softcap: logits become `softcap * tanh(logits / softcap)` (Gemma 2).
        sinks: `[Hq]`, a logit in every softmax of a head that belongs to no key (gpt-oss).
        chunk: probabilities held at once per batch element, 4 bytes each; speed and memory only.

    Returns:
        `[B, M]` fp32. Rows that may attend to nothing add 0; if all weights are 0, so is the mean.

    Raises:
        ValueError: shapes that do not fit together, or `rows` without a row.
    """
    _check(query, key, mask)
    options = (mask, row_weight, sinks, scale, causal, softcap, chunk)
    if torch.compiler.is_compiling() or query.device.type != "cpu" or flags.pretend_device:
        picked = rows if isinstance(rows, Tensor) else None
        span = (rows.start, rows.stop) if isinstance(rows, slice) else (None, None)
        return _column_mean_node(query, key, columns, picked, *span, *options)
    return _column_mean(query, key, columns, rows, *options)


# One operator, so that a compiled graph holds one node for any number of rows and keys.
@torch.library.custom_op(
    "vla_pruner::attention_column_mean",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor columns, Tensor? rows, SymInt? start, SymInt? stop, "
    "Tensor? mask, Tensor? row_weight, Tensor? sinks, float scale, bool causal, float? softcap, "
    "int chunk) -> Tensor",
)
def _column_mean_node(
    query: Tensor,
    key: Tensor,
    columns: Tensor,
    rows: Tensor | None,
    start: int | None,
    stop: int | None,
    *options: Any,
) -> Tensor:
    """`_column_mean` with rows as a tensor, or from `start` to `stop`."""
    voting = slice(start, stop) if rows is None else rows
    wide = query.shape[3] > (0 if _triton is None else _triton.LARGEST_HEAD)
    if wide or not query.is_cuda or query.dtype not in _IN_C or key.dtype != query.dtype:
        return _column_mean(query, key, columns, voting, *options)
    mask, row_weight, sinks, scale, causal, softcap, _ = options
    chosen = voting if isinstance(voting, Tensor) else range(query.shape[2])[voting]
    return _triton.column_mean(
        query,
        key,
        columns,
        chosen,
        mask=mask,
        row_weight=row_weight,
        sinks=sinks,
        scale=scale,
        causal=causal,
        softcap=softcap,
    )


@_column_mean_node.register_fake
def _(query: Tensor, key: Tensor, columns: Tensor, *_: Any) -> Tensor:
    return query.new_empty((query.shape[0], columns.shape[1]), dtype=torch.float32)


_IN_C = (torch.float32, torch.bfloat16, torch.float16)


def _column_mean(
    query: Tensor,
    key: Tensor,
    columns: Tensor,
    rows: Rows,
    mask: Tensor | None,
    row_weight: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    causal: bool,
    softcap: float | None,
    chunk: int,
) -> Tensor:
    """See `attention_column_mean`: in C on the CPU, or with PyTorch's operators."""
    chosen: range | Tensor
    if isinstance(rows, Tensor):
        chosen, count = rows, rows.shape[-1]
    else:
        chosen = range(query.shape[2])[slice(None) if rows is None else rows]
        count = len(chosen)
    if query.dtype in _IN_C and key.dtype == query.dtype and count > 0:
        received = native.column_mean(
            query,
            key,
            columns,
            chosen,
            mask=mask,
            row_weight=row_weight,
            sinks=sinks,
            scale=scale,
            causal=causal,
            softcap=softcap,
        )
        if received is not None:
            return received
    return _column_mean_by_operators(
        query, key, columns, rows, mask, row_weight, sinks, scale, causal, softcap, chunk
    )


def _column_mean_by_operators(
    query: Tensor,
    key: Tensor,
    columns: Tensor,
    rows: Rows,
    mask: Tensor | None,
    row_weight: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    causal: bool,
    softcap: float | None,
    chunk: int,
) -> Tensor:
    """`_column_mean` with PyTorch's operators: the reference."""
    batch, heads, total, _ = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    group = heads // kv_heads
    key = key.contiguous()  # Models hand over a view of [B, N, H, D], slow to multiply by head.
    number = _row_numbers(rows, total, query.device)
    count = number.shape[-1]
    if count == 0:
        raise ValueError(f"`rows` names none of the {total} query rows: no row would vote.")
    weight = None
    if row_weight is not None:
        weight = _pick(row_weight.to(query.device).float(), number, 1).expand(batch, count)
    received = query.new_zeros(batch, keys, dtype=torch.float32)
    row_step = count  # What is little is quickest in one block.
    if heads * count * keys > chunk:
        row_step = min(count, _BLOCK_ROWS, max(1, chunk // (group * keys)))
    head_step = max(1, chunk // (group * row_step * keys))
    # With autocast on, the products below would be taken in half precision.
    with torch.autocast(query.device.type, enabled=False):
        for start in range(0, count, row_step):
            stop = min(start + row_step, count)
            at = _block(rows, number, start, stop, total)
            always_visible, visible, last_visible = keys, keys, None
            if causal:
                always_visible, visible = _causal_span(at, total, keys)
                last_visible = number[..., start:stop] + (keys - total)
            if visible == 0:
                continue
            block_query = _pick(query, at, 2).contiguous()
            block_mask = None if mask is None else mask[..., :visible]
            if block_mask is not None and block_mask.shape[2] != 1:
                block_mask = _pick(block_mask, at, 2)
            bias, sees = _visibility(block_mask, last_visible, always_visible, visible)
            for low in range(0, kv_heads, head_step):
                high = min(low + head_step, kv_heads)
                own = slice(low * group, high * group)
                probabilities = _probabilities(
                    block_query[:, own],
                    key[:, low:high, :visible],
                    scale,
                    _of_heads(bias, own),
                    softcap,
                    None if sinks is None else sinks[own],
                )
                own_weight = None if weight is None else weight[:, start:stop]
                received[:, :visible] += _tally(probabilities, own_weight, _of_heads(sees, own))
    if weight is None:
        mean = received / (count * heads)
    else:
        total_weight = weight.sum(dim=1, keepdim=True) * heads
        mean = received / torch.where(total_weight > 0, total_weight, 1.0)
    columns = columns.to(query.device).expand(batch, -1)
    return mean.gather(1, columns.clamp_min(0)).masked_fill_(columns < 0, 0.0)


def _probabilities(
    query: Tensor,
    key: Tensor,
    scale: float,
    bias: Tensor | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Softmax rows `[B, Hq, R, N]` fp32 of `query` `[B, Hq, R, D]` and `key` `[B, Hkv, N, D]`.

    `bias` `[B|1, 1|Hq, R|1, <= N]` is added to the logits of the last keys.
    """
    batch, heads, rows, dim = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    if query.dtype != key.dtype:  # Under autocast RoPE may widen the one and not the other.
        common = torch.promote_types(query.dtype, key.dtype)
        query, key = query.to(common), key.to(common)
    folded = query.reshape(batch, kv_heads, heads // kv_heads * rows, dim)
    logits = torch.matmul(folded, key.transpose(-1, -2)).view(batch, heads, rows, keys)
    logits = logits.float().mul_(scale)
    if softcap is not None:
        logits = logits.div_(softcap).tanh_().mul_(softcap)
    if bias is not None:
        logits[..., keys - bias.shape[-1] :] += bias
    if sinks is not None:
        sink = sinks.float().view(1, heads, 1, 1).expand(batch, -1, rows, -1)
        return torch.softmax(torch.cat([logits, sink], dim=-1), dim=-1)[..., :-1]
    return torch.softmax(logits, dim=-1)


def _visibility(
    mask: Tensor | None, last_visible: Tensor | None, always_visible: int, keys: int
) -> tuple[Tensor | None, Tensor | None]:
    """What to add to logits so that nobody sees what is hidden, and which rows see anything at all.

    Args:
        mask: see `attention_rows`.
        last_visible: `[R]` or `[B, R]`, the last key that a causal mask shows to each row.
        always_visible: that mask hides none of the first `always_visible` keys from any row.
        keys: their number N.

    Returns:
        `[B|1, 1|Hq, R|1, <= N]` fp32 for the last keys, None for nothing, and bool
        `[B|1, 1|Hq, R|1, 1]`, None where every row sees a key. What stands in the probabilities of
        a row that sees none means nothing.
    """
    future = None
    if last_visible is not None:
        device = last_visible.device
        future = torch.arange(always_visible, keys, device=device) > last_visible[..., None]
        future = future[None, None] if future.ndim == 2 else future[:, None]
    if mask is None:
        if future is None:
            return None, None
        sees = ~future.all(dim=-1, keepdim=True) if always_visible == 0 else None
        return future.float().mul_(_HIDDEN), sees
    hidden = ~mask if mask.dtype == torch.bool else _is_hidden(mask)
    if future is not None:
        hidden = hidden | torch.nn.functional.pad(future, (always_visible, 0))
    bias = hidden.float().mul_(_HIDDEN)
    if mask.dtype != torch.bool:
        bias = bias.add_(mask.float().clamp_min(_HIDDEN))
    return bias, ~hidden.all(dim=-1, keepdim=True)


def _is_hidden(mask: Tensor) -> Tensor:
    """Where an additive mask forbids attending: -inf, or the smallest number that libraries use."""
    return mask <= torch.finfo(mask.dtype).min / 2


def _of_heads(tensor: Tensor | None, heads: slice) -> Tensor | None:
    """What a tensor `[B, 1|H, ...]` says of some heads."""
    return tensor if tensor is None or tensor.shape[1] == 1 else tensor[:, heads]


def _tally(probabilities: Tensor, weight: Tensor | None, sees: Tensor | None) -> Tensor:
    """Sum of `[B, H, R, N]` over heads and rows, rows weighted by `[B, R]`: `[B, N]`."""
    if weight is None and sees is None:
        return probabilities.sum(dim=(1, 2))
    batch, heads, rows, _ = probabilities.shape
    vote = probabilities.new_ones(1, 1, 1) if weight is None else weight[:, None]
    if sees is not None:
        vote = vote * sees[..., 0]
    vote = vote.expand(batch, heads, rows).reshape(batch, 1, heads * rows)
    return torch.bmm(vote, probabilities.flatten(1, 2))[:, 0]


def _row_numbers(rows: Rows, total: int, device: torch.device) -> Tensor:
    """Numbers of the query rows that vote, `[R]` or `[B, R]`."""
    if isinstance(rows, Tensor):
        return rows.to(device)
    every = torch.arange(total, device=device)
    return every if rows is None else every[rows]


def _block(rows: Rows, number: Tensor, start: int, stop: int, total: int) -> slice | Tensor:
    """Entries `start` to `stop` of the chosen rows: a slice where the choice is one."""
    if isinstance(rows, Tensor):
        return number[..., start:stop]
    chosen = range(total)[slice(None) if rows is None else rows][start:stop]
    return slice(chosen.start, chosen.stop, chosen.step)


def _causal_span(at: slice | Tensor, total: int, keys: int) -> tuple[int, int]:
    """Keys that a causal mask shows to every row of a block, and to its last row.

    Where rows are a tensor, their values are not looked at and the answer is the widest one.
    """
    if isinstance(at, Tensor):
        return 0, keys
    numbers = range(total)[at]
    shown = keys - total + 1
    return max(0, shown + numbers[0]), max(0, shown + numbers[-1])


def _pick(tensor: Tensor, at: slice | Tensor, dim: int) -> Tensor:
    """Entries `at` (a slice, `[R]` or `[B, R]`) of `tensor` along `dim`."""
    if isinstance(at, slice):
        return tensor[(slice(None),) * dim + (at,)]
    if at.ndim == 1:
        return tensor.index_select(dim, at)
    batch = max(tensor.shape[0], at.shape[0])
    shape, target = [1] * tensor.ndim, list(tensor.shape)
    shape[0], shape[dim] = at.shape
    target[0], target[dim] = batch, at.shape[1]
    tensor = tensor.expand([batch, *tensor.shape[1:]])
    return tensor.gather(dim, at.view(shape).expand(target))


def _check(query: Tensor, key: Tensor, mask: Tensor | None) -> None:
    if query.ndim != 4 or key.ndim != 4:
        raise ValueError(
            "query and key must be [B, H, tokens, D]; "
            f"got {tuple(query.shape)} and {tuple(key.shape)}."
        )
    if query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        raise ValueError(
            f"query {tuple(query.shape)} and key {tuple(key.shape)} "
            "must agree in batch and head size."
        )
    if query.shape[1] % key.shape[1]:
        raise ValueError(
            f"{query.shape[1]} query heads cannot share {key.shape[1]} key heads: not a multiple."
        )
    if mask is not None and (mask.ndim != 4 or mask.shape[-1] != key.shape[2]):
        raise ValueError(
            f"mask must be [B|1, 1|H, Q|1, N] with N={key.shape[2]} keys; got {tuple(mask.shape)}."
        )
