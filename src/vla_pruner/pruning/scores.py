"""Attention that visual tokens receive, without ever holding a whole attention matrix (Eq. 1-4)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vla_pruner.kernels import native
from vla_pruner.kernels.native import Attention

try:  # It comes with PyTorch for CUDA.
    from vla_pruner.kernels import triton_scores as _triton
except ImportError:
    _triton = None  # type: ignore[assignment]

Rows = slice | Tensor | None

# Stands in a logit for "hidden": exp() of it is 0, and a row that holds nothing else is no NaN.
_HIDDEN = -1e30

# Probabilities that exist at once, for each batch element.
_CHUNK = 1 << 19

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
    Attention(query, key, scale, mask).check()
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
    chunk: int = _CHUNK,
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
    seen = Attention(query, key, scale, mask, causal, softcap, sinks)
    return column_mean(seen, columns, rows, row_weight, chunk)


@torch.no_grad()
def column_mean(
    seen: Attention, columns: Tensor, rows: Rows, weight: Tensor | None = None, chunk: int = _CHUNK
) -> Tensor:
    """What `attention_column_mean` says of an attention: `[B, M]` fp32."""
    if torch.compiler.is_compiling() or not seen.query.is_cpu:
        return _as_node(seen, columns, rows, weight, chunk)
    number = _row_numbers(rows, seen.query.shape[2], seen.query.device)
    received = native.column_mean(seen, columns, number, weight)
    return _by_operators(seen, columns, rows, weight, chunk) if received is None else received


def _as_node(
    seen: Attention, columns: Tensor, rows: Rows, row_weight: Tensor | None, chunk: int
) -> Tensor:
    """`column_mean` as one node of a graph that is being compiled."""
    picked = rows if isinstance(rows, Tensor) else None
    span = (rows.start, rows.stop) if isinstance(rows, slice) else (None, None)
    options = (seen.mask, row_weight, seen.sinks, seen.scale, seen.causal, seen.softcap, chunk)
    return _column_mean_node(seen.query, seen.key, columns, picked, *span, *options)


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
    mask: Tensor | None,
    row_weight: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    causal: bool,
    softcap: float | None,
    chunk: int,
) -> Tensor:
    """`column_mean` with rows as a tensor, or from `start` to `stop`."""
    seen = Attention(query, key, scale, mask, causal, softcap, sinks)
    voting = slice(start, stop) if rows is None else rows
    if query.is_cpu:
        return column_mean(seen, columns, voting, row_weight, chunk)
    small = _triton is not None and query.shape[3] <= _triton.LARGEST_HEAD
    if not (small and query.is_cuda and query.dtype == key.dtype and query.dtype in _IN_TRITON):
        return _by_operators(seen, columns, voting, row_weight, chunk)
    return _triton.column_mean(
        query,
        key,
        columns,
        range(query.shape[2])[voting] if isinstance(voting, slice) else voting,
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


_IN_TRITON = (torch.float32, torch.bfloat16, torch.float16)


def _by_operators(
    seen: Attention, columns: Tensor, rows: Rows, row_weight: Tensor | None, chunk: int
) -> Tensor:
    """`column_mean` with PyTorch's operators: the reference."""
    query, key, mask, causal, sinks = seen.query, seen.key, seen.mask, seen.causal, seen.sinks
    batch, heads, total, _ = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    group = heads // kv_heads
    key = key.contiguous()  # Models hand over a view of [B, N, H, D], slow to multiply by head.
    number = _row_numbers(rows, total, query.device)
    count = number.shape[-1]
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
                    seen.scale,
                    _of_heads(bias, own),
                    seen.softcap,
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
    every = torch.arange(total, device=device)
    number = rows.to(device) if isinstance(rows, Tensor) else every[rows or slice(None)]
    if number.shape[-1] == 0:
        raise ValueError(f"`rows` names none of the {total} query rows: no row would vote.")
    return number


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
