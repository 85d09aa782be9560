"""Tokens that nobody sees, instead of tokens that are gone; and the masks that this takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vla_pruner.core import refusals
from vla_pruner.core.arguments import (
    ROTARY,
    Call,
    cache_in,
    left_ids,
    one_table,
    renumbered,
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
        return hidden

    def in_prefill(self, call: Call, prefill: Prefill, left: TokenSet) -> dict[str, Any]:
        assert left.present is not None
        found: dict[str, Any] = {"attention_mask": hiding(_full_mask(call), left.present)}
        if call.rotary is not None:
            rank = (left.present.long().cumsum(dim=1) - 1).clamp_min(0)
            found[ROTARY] = take_rotary(one_table(call), rank)
            if (ids := call.kwargs.get("position_ids")) is not None:
                found["position_ids"] = left_ids(call, ids, rank, tables=True)
        return found

    def later(self, call: Call, prefill: Prefill, left: TokenSet) -> dict[str, Any]:
        assert left.present is not None
        found: dict[str, Any] = {"attention_mask": hiding(_full_mask(call), left.present)}
        if call.rotary is not None:
            found |= renumbered(call, (~left.present).sum(dim=1, keepdim=True))
        return found


def _full_mask(call: Call) -> Tensor:
    mask: Tensor | None = call.kwargs.get("attention_mask")
    if mask is None:
        return call.implied()
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
) -> Tensor:
    """What attention does when it gets no mask, as a mask `[1, 1, Q, N]`.

    Q is the length of `hidden`, or `queries`.
    """
    queries = hidden.shape[1] if queries is None else queries
    cache, index = cache_in(kwargs), cut.plan.first[number]
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
