"""Arguments of decoder layers behind a cut: masks and positions that fit what is left.

A decoder hands every layer the arguments of the whole sequence. Each function makes those of the
tokens that stayed; P are the positions of these in the prefill, `[B, n]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_PER_TOKEN = ("attention_mask", "position_ids", "position_embeddings", "cache_position")


def shortened(
    kwargs: Mapping[str, Any], positions: Tensor, length: int, *, static_cache: bool, compact: bool
) -> dict[str, Any]:
    """Prefill arguments of the n tokens that stay of `length`."""
    short: dict[str, Any] = {}
    rotary = kwargs.get("position_embeddings")
    if compact:
        n = positions.shape[1]
        short["position_embeddings"] = tuple(table[:, :n] for table in _tables(kwargs))
    elif rotary is not None:
        short["position_embeddings"] = tuple(take_rotary(table, positions) for table in rotary)
    if kwargs.get("position_ids") is not None:
        # With rotary tables at hand the ids only mislead: gaps look like packed sequences.
        short["position_ids"] = (
            None if rotary is not None else take(kwargs["position_ids"], positions, dim=-1)
        )
    mask = kwargs.get("attention_mask")
    if mask is not None:
        rows = mask.ndim == 4 and mask.shape[2] == length
        alike = rows and mask.stride(2) == 0  # One row, shown for all of them.
        if rows:
            mask = mask[:, :, :1] if alike else take(mask, positions, dim=2)
        mask = _short_columns(mask, positions, length, static_cache)
        short["attention_mask"] = mask.expand(-1, -1, positions.shape[1], -1) if alike else mask
    if kwargs.get("cache_position") is not None:
        short["cache_position"] = kwargs["cache_position"][: positions.shape[1]]
    return short


def shifted(
    kwargs: Mapping[str, Any], positions: Tensor, length: int, *, static_cache: bool
) -> dict[str, Any]:
    """Decode arguments for a cache that holds n tokens of a prefill of `length`."""
    shifted: dict[str, Any] = {}
    if kwargs.get("attention_mask") is not None:
        mask = kwargs["attention_mask"]
        shifted["attention_mask"] = _short_columns(mask, positions, length, static_cache)
    if kwargs.get("cache_position") is not None:
        shifted["cache_position"] = kwargs["cache_position"] - (length - positions.shape[1])
    return shifted


def queried(
    kwargs: Mapping[str, Any], positions: Tensor, length: int, mask: Tensor
) -> dict[str, Any]:
    """Prefill arguments of n tokens that are computed and still see the keys of all `length`.

    Args:
        kwargs: what the layers get.
        positions: P.
        length: of the prefill.
        mask: `[B|1, 1|H, length|1, N]`.
    """
    if mask.ndim != 4:
        raise NotImplementedError(
            "using keys of the last step again needs a mask that says what each query sees; got "
            f'{tuple(mask.shape)}. Load the model with attn_implementation="sdpa" or "eager".'
        )
    if mask.shape[2] == length:
        mask = take(mask, positions, dim=2)
    found: dict[str, Any] = {"attention_mask": mask}
    rotary = kwargs.get("position_embeddings")
    if rotary is not None:
        found["position_embeddings"] = tuple(take_rotary(table, positions) for table in rotary)
    if kwargs.get("position_ids") is not None:
        # As in `shortened`: with rotary tables at hand, ids with gaps only mislead.
        ids = kwargs["position_ids"]
        found["position_ids"] = None if rotary is not None else take(ids, positions, dim=-1)
    return found


def with_gap(mask: Tensor, positions: Tensor, length: int) -> Tensor:
    """Decode mask of a cache that holds n tokens, then dead slots up to `length`, then the rest."""
    n = positions.shape[1]
    dead = positions[:, :1].expand(-1, length - n)
    later = torch.arange(length, mask.shape[-1], device=mask.device)
    columns = torch.cat([positions, dead, later.expand(positions.shape[0], -1)], dim=1)
    mask = take(mask, columns, dim=-1)
    alive = (torch.arange(length, device=mask.device) < n).expand(positions.shape[0], -1)
    if mask.ndim == 4:
        return hiding(mask, alive)
    return mask * F.pad(alive, (0, mask.shape[-1] - length), value=True)


def renumbered(
    rotary: nn.Module, hidden: Tensor, kwargs: Mapping[str, Any], removed: Tensor | int
) -> dict[str, Any]:
    """Decode positions that continue where `removed` tokens are not counted (int or `[B, 1]`)."""
    ids = kwargs.get("position_ids")
    if ids is None:
        raise NotImplementedError(
            'decoder layers get no `position_ids`, which positions="compact" has to renumber; use '
            'positions="keep".'
        )
    ids = ids - removed
    return {"position_ids": ids, "position_embeddings": rotary(hidden, ids)}


def closed_up(kwargs: Mapping[str, Any], present: Tensor) -> dict[str, Any]:
    """Prefill positions that count only tokens that are `present` `[B, S]`, hidden ones kept."""
    rank = (present.long().cumsum(dim=1) - 1).clamp_min(0)
    tables = tuple(take_rotary(table, rank) for table in _tables(kwargs))
    return {"position_ids": None, "position_embeddings": tables}


def hiding(mask: Tensor, present: Tensor) -> Tensor:
    """A mask `[B|1, 1, Q, N]` with what is not `present` `[B, S]` hidden from everybody."""
    seen = F.pad(present, (0, mask.shape[-1] - present.shape[1]), value=True)[:, None, None]
    if mask.dtype == torch.bool:
        return mask & seen
    return mask.expand(seen.shape[0], -1, -1, -1).masked_fill(~seen, torch.finfo(mask.dtype).min)


def refuse_unknown(kwargs: Mapping[str, Any], length: int) -> None:
    """Refuse per-token arguments that a layer would get at the wrong length."""
    for name, value in kwargs.items():
        if name in _PER_TOKEN or name == "hidden_states" or not isinstance(value, Tensor):
            continue
        if value.ndim >= 2 and value.shape[1] == length:
            raise NotImplementedError(
                f"decoder layers get `{name}` {tuple(value.shape)}, one entry per token, and it is "
                'unknown how to shorten it; use `mode="mask"`, or open an issue with the model.'
            )


def take(tensor: Tensor, index: Tensor, *, dim: int, batch_dim: int = 0) -> Tensor:
    """Rows `index` `[B, n]` of a tensor along `dim`; a batch of 1 serves every row of `index`."""
    dim %= tensor.ndim
    shape = [1] * tensor.ndim
    shape[batch_dim], shape[dim] = index.shape
    target = list(tensor.shape)
    batch = max(index.shape[0], tensor.shape[batch_dim])
    target[batch_dim] = batch
    tensor = tensor.expand(target)
    target[dim] = index.shape[1]
    return tensor.gather(dim, index.view(shape).expand(target))


def take_rotary(table: Tensor, positions: Tensor) -> Tensor:
    """Rows of a cos or sin table `[B, S, D]`, or `[3, B, S, D]` with several position axes."""
    return take(table, positions, dim=-2, batch_dim=table.ndim - 3)


def _tables(kwargs: Mapping[str, Any]) -> tuple[Tensor, ...]:
    tables = kwargs.get("position_embeddings")
    if not isinstance(tables, tuple | list) or any(table.ndim != 3 for table in tables):
        raise NotImplementedError(
            'decoder layers get no rotary tables [B, S, D], which positions="compact" has to '
            'renumber; use positions="keep".'
        )
    return tuple(tables)


def _short_columns(mask: Tensor, positions: Tensor, length: int, static_cache: bool) -> Tensor:
    """Keys behind the cut: what stayed of the prefill, what came later, unused static slots."""
    later = torch.arange(length, mask.shape[-1], device=mask.device)
    columns = torch.cat([positions, later.expand(positions.shape[0], -1)], dim=1)
    mask = take(mask, columns, dim=-1)
    if not static_cache:
        return mask
    forbidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    return F.pad(mask, (0, length - positions.shape[1]), value=forbidden)
