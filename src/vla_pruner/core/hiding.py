"""What is there and nobody sees: hidden tokens, dead slots of layer 0; masks for both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vla_pruner.core import refusals
from vla_pruner.core.arguments import (
    ROTARY,
    Call,
    cache_in,
    left_ids,
    one_table,
    renumbered,
    take,
    take_rotary,
)
from vla_pruner.core.scores import hides_future
from vla_pruner.core.tokens import Prefill, TokenSet

if TYPE_CHECKING:
    from vla_pruner.core.cut import Cut


class Hide:
    """All tokens stay where they are, and nobody sees those that are not kept."""

    def leave(self, prefill: Prefill, visual: Tensor, number: int, hidden: Tensor) -> Tensor:
        left, batch = prefill.sets[number], visual.shape[0]
        everywhere = prefill.layout.visual.expand(batch, -1)
        assert left.tokens is not None
        stays = torch.zeros_like(everywhere, dtype=torch.bool).scatter(1, left.tokens, True)
        if prefill.full_rows is not None:
            stays = stays | prefill.full_rows[:, None]
        shape = (batch, prefill.total)
        everything = torch.ones(shape, dtype=torch.bool, device=visual.device)
        left.present = everything.scatter(1, everywhere + prefill.past, stays)
        left.columns, left.offset = visual, prefill.past
        left.places = prefill.sets[0].places
        return hidden

    def in_prefill(self, call: Call, prefill: Prefill, left: TokenSet) -> dict[str, Any]:
        assert left.present is not None
        found: dict[str, Any] = {"attention_mask": hiding(_full_mask(call), left.present)}
        if call.cut.rotary is not None:
            rank = (left.present.long().cumsum(dim=1) - 1).clamp_min(0)
            found[ROTARY] = take_rotary(one_table(call), rank)
            if (ids := call.kwargs.get("position_ids")) is not None:
                found["position_ids"] = left_ids(call, ids, rank, tables=True)
        return found

    def later(self, call: Call, prefill: Prefill, left: TokenSet) -> dict[str, Any]:
        assert left.present is not None
        found: dict[str, Any] = {"attention_mask": hiding(_full_mask(call), left.present)}
        if call.cut.rotary is not None:
            found |= renumbered(call, (~left.present).sum(dim=1, keepdim=True))
        return found


def _full_mask(call: Call) -> Tensor:
    mask: Tensor | None = call.kwargs.get("attention_mask")
    if not call.cut.by_name and (mask is None or mask.dtype == torch.bool):
        raise refusals.no_mask_to_hide_in()  # Who knows whether True means seen or hidden?
    if mask is None:
        return implied_mask(call.cut, call.number, call.hidden, call.kwargs, layer=call.layer)
    if mask.ndim != 4:
        raise refusals.no_mask_to_hide_in()
    return mask


def hiding(mask: Tensor, present: Tensor) -> Tensor:
    """A mask `[B|1, 1, Q, N]` with what is not `present` `[B, S]` hidden from everybody."""
    seen = F.pad(present, (0, mask.shape[-1] - present.shape[1]), value=True)[:, None, None]
    if mask.dtype == torch.bool:
        return mask & seen
    return mask.expand(seen.shape[0], -1, -1, -1).masked_fill(~seen, torch.finfo(mask.dtype).min)


def implied_mask(
    cut: Cut,
    number: int,
    hidden: Tensor,
    kwargs: Mapping[str, Any],
    queries: int | None = None,
    layer: nn.Module | None = None,
) -> Tensor:
    """What attention does when it gets no mask, as a mask `[1, 1, Q, N]`.

    Q is the length of `hidden`, or `queries`; N that of the cache of `layer`, which has not run, or
    of the first after `number` cuts.
    """
    queries = hidden.shape[1] if queries is None else queries
    cache = cache_in(kwargs)
    index = cut.plan.first[number]
    if layer in cut.layers and (own := cut.layers.index(layer)) not in cut.plan.skipped:
        index = own
    if index is None:  # No layer will look at it.
        return torch.ones(1, 1, queries, queries, dtype=torch.bool, device=hidden.device)
    keys = queries
    if cache is not None:
        held = _capacity(cache) if cut.static_cache else cache.get_seq_length(index)
        keys = held if cut.static_cache else queries + held
    mask = torch.ones(queries, keys, dtype=torch.bool, device=hidden.device)
    if hides_future(cut, cut.attention(index), None, queries, kwargs):
        mask = mask.tril(0 if cut.static_cache else keys - queries)
    elif cut.static_cache:
        mask[:, queries:] = False
    if cut.eager:
        additive = torch.zeros_like(mask, dtype=hidden.dtype)
        mask = additive.masked_fill(~mask, torch.finfo(hidden.dtype).min)
    return mask[None, None]


def _capacity(cache: Any) -> int:
    """Slots of a static cache."""
    if hasattr(cache, "get_max_length"):
        return int(cache.get_max_length())
    return int(cache.get_max_cache_shape())


# -- cuts before layer 0, whose cache still has to answer for the whole length -------------------


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
    return mask * F.pad(alive, (0, mask.shape[-1] - total), value=True)
