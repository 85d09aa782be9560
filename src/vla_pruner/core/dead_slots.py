"""Cuts before layer 0: its cache gets dead slots, so that it still answers for the whole length."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vla_pruner.core.arguments import cache_in, take
from vla_pruner.core.hiding import hiding, implied_mask
from vla_pruner.core.tokens import Prefill

if TYPE_CHECKING:
    from vla_pruner.core.cut import Cut


def _has_any(prefill: Prefill) -> bool:
    return prefill.mode == "drop" and prefill.length_at(1) < prefill.length


def before_layer_0(cut: Cut, layer: nn.Module, args: tuple[Any, ...], kwargs: Any) -> Any:
    """`Cut.at_cut`, but that layer 0 itself sees a cache with dead slots in later passes."""
    found, prefill = cut.at_cut(1, layer, args, kwargs), cut.prefill
    if found is None or prefill is None or cut.phase == "prefill" or not _has_any(prefill):
        return found
    hidden, named = cut.signatures[layer].bind(args, kwargs)
    left, mask = prefill.sets[1], named.get("attention_mask")
    assert left.retained is not None
    mask = implied_mask(cut, 1, hidden, named) if mask is None else mask
    named["attention_mask"] = _with_gap(mask, left.retained, prefill.total)
    positions = ("position_embeddings", "position_ids")
    return (hidden,), named | {n: left.arguments[n] for n in positions if n in left.arguments}


def fill_up(cut: Cut, layer: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
    """After layer 0 of a prefill, which the decoder asks how many tokens there were."""
    prefill, cache = cut.prefill, cache_in(kwargs)
    if prefill is None or cut.phase != "prefill" or cache is None or not _has_any(prefill):
        return
    n, keys, values = prefill.length_at(1), cache.layers[0].keys, cache.layers[0].values
    shape = (keys.shape[0], keys.shape[1], prefill.length - n)
    slots = torch.arange(prefill.past + n, prefill.total, device=keys.device)
    # Ones: static caches of transformers 4 count slots that hold anything but zeros.
    cache.update(
        keys.new_ones(*shape, keys.shape[-1]),
        values.new_ones(*shape, values.shape[-1]),
        0,
        {"cache_position": slots},
    )


def _with_gap(mask: Tensor, retained: Tensor, total: int) -> Tensor:
    """Mask of a cache that holds N tokens, then dead slots up to `total`, then the rest."""
    n = retained.shape[1]
    dead = retained[:, :1].expand(-1, total - n)
    later = torch.arange(total, mask.shape[-1], device=mask.device)
    columns = torch.cat([retained, dead, later.expand(retained.shape[0], -1)], dim=1)
    mask = take(mask, columns, dim=-1)
    alive = (torch.arange(total, device=mask.device) < n).expand(retained.shape[0], -1)
    if mask.ndim == 4:
        return hiding(mask, alive)
    return mask * torch.nn.functional.pad(alive, (0, mask.shape[-1] - total), value=True)
