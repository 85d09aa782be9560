"""How layers behind a cut are called: tokens removed (`Drop`), or hidden from everybody (`Hide`).

A decoder hands every layer the arguments of the whole sequence. Both strategies say which rows go
on, and make the arguments of a prefill and of a later pass from those of the whole.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vla_pruner.core.tokens import Prefill, TokenSet

_PER_TOKEN = ("attention_mask", "position_ids", "cache_position")


class Strategy(Protocol):
    """What happens to tokens that are not kept."""

    def leave(self, prefill: Prefill, left: Tensor, after: TokenSet, number: int) -> None:
        """Write into `after`, the set behind cut `number`, what the tokens at rows `left` mean."""

    def in_prefill(self, call: Call, prefill: Prefill, left: TokenSet) -> dict[str, Any]:
        """Arguments of the layers behind a cut in the prefill itself."""

    def later(self, call: Call, prefill: Prefill, left: TokenSet) -> dict[str, Any]:
        """Arguments of these layers in a pass that continues the cache."""


@dataclass(frozen=True, eq=False)
class Call:
    """A layer's call: hidden states, everything else by name, and what the decoder implies.

    Args:
        kwargs: the layer's arguments by name, without the hidden states.
        hidden: `[B, Q, D]`.
        implied: makes the mask `[1, 1, Q, N]` that stands for None, if it is called.
        static: whether the cache is a static one.
        rotary: the decoder's rotary embedding where tokens are renumbered; None: they are not.
    """

    kwargs: Mapping[str, Any]
    hidden: Tensor
    implied: Callable[[], Tensor]
    static: bool
    rotary: Any

    @property
    def mask(self) -> Tensor | None:
        """`[B|1, 1|H, Q|1, N]`, `[B, N]`, or None."""
        return self.kwargs.get("attention_mask")

    def rotary_tables(self) -> dict[str, Any]:
        """Rotary tables by argument: one tensor, or a tuple of cos and sin."""
        names = [name for name in self.kwargs if name.startswith("position_embeddings")]
        return {name: self.kwargs[name] for name in names if self.kwargs[name] is not None}


class Drop:
    """Tokens that are not kept leave the hidden states, masks, positions and caches."""

    def leave(self, prefill: Prefill, left: Tensor, after: TokenSet, number: int) -> None:
        others = prefill.index.others.expand(left.shape[0], -1)
        after.rows = torch.cat([others, left], dim=1).sort(dim=1).values
        after.columns = torch.searchsorted(after.rows, left)
        past = held(prefill.before, number, prefill.past, left)
        if past is None and prefill.past:
            past = torch.arange(prefill.past, device=left.device).expand(left.shape[0], -1)
        after.offset = 0 if past is None else past.shape[1]
        after.retained = after.rows
        if past is not None:
            own = after.rows + prefill.past
            after.retained = torch.cat([past.expand(left.shape[0], -1), own], dim=1)

    def in_prefill(self, call: Call, prefill: Prefill, left: TokenSet) -> dict[str, Any]:
        rows, retained = left.rows, left.retained
        assert rows is not None and retained is not None
        short: dict[str, Any] = {}
        tables = call.rotary_tables()
        if call.rotary is not None:
            count = rows.shape[1]
            short["position_embeddings"] = tuple(t[:, :count] for t in _one_table(call))
        else:
            for name, table in tables.items():
                short[name] = _each(table, lambda one: take_rotary(one, rows))
        ids = call.kwargs.get("position_ids")
        if ids is not None:
            # With rotary tables at hand the ids only mislead: gaps look like packed sequences.
            short["position_ids"] = None if tables else take(ids, rows, dim=-1)
        mask = call.mask
        if mask is not None:
            full = mask.ndim == 4 and mask.shape[2] == prefill.length
            alike = full and mask.stride(2) == 0  # One row, shown for all of them.
            if full:
                mask = mask[:, :, :1] if alike else take(mask, rows, dim=2)
            mask = _short_columns(mask, retained, prefill.total, call.static)
            short["attention_mask"] = mask.expand(-1, -1, rows.shape[1], -1) if alike else mask
        slots = call.kwargs.get("cache_position")
        if slots is not None:
            moved = prefill.past - left.offset
            short["cache_position"] = (
                slots[: rows.shape[1]] - moved if moved else slots[: rows.shape[1]]
            )
        return short

    def later(self, call: Call, prefill: Prefill, left: TokenSet) -> dict[str, Any]:
        retained = left.retained
        assert retained is not None
        found: dict[str, Any] = {}
        removed = prefill.total - retained.shape[1]
        if call.mask is not None:
            mask = _short_columns(call.mask, retained, prefill.total, call.static)
            found["attention_mask"] = mask
        if call.kwargs.get("cache_position") is not None:
            found["cache_position"] = call.kwargs["cache_position"] - removed
        if call.rotary is not None:
            found |= _renumbered(call, removed)
        return found

    def first_layer_later(self, call: Call, prefill: Prefill, left: TokenSet) -> dict[str, Any]:
        """The same for layer 0 where tokens left before it: its cache holds dead slots for them."""
        assert left.retained is not None
        mask = call.implied() if call.mask is None else call.mask
        found: dict[str, Any] = {"attention_mask": _with_gap(mask, left.retained, prefill.total)}
        names = ("position_embeddings", "position_ids")
        return found | {name: left.arguments[name] for name in names if name in left.arguments}


class Hide:
    """All tokens stay where they are, and nobody sees those that are not kept."""

    def leave(self, prefill: Prefill, left: Tensor, after: TokenSet, number: int) -> None:
        batch, visual = left.shape[0], prefill.layout.visual.expand(left.shape[0], -1)
        assert after.tokens is not None
        stays = torch.zeros_like(visual, dtype=torch.bool).scatter(1, after.tokens, True)
        if prefill.full_rows is not None:
            stays = stays | prefill.full_rows[:, None]
        shape = (batch, prefill.total)
        everything = torch.ones(shape, dtype=torch.bool, device=left.device)
        after.present = everything.scatter(1, visual + prefill.past, stays)
        after.columns, after.offset = left, prefill.past

    def in_prefill(self, call: Call, prefill: Prefill, left: TokenSet) -> dict[str, Any]:
        assert left.present is not None
        found: dict[str, Any] = {"attention_mask": _hiding(_full_mask(call), left.present)}
        if call.rotary is not None:
            rank = (left.present.long().cumsum(dim=1) - 1).clamp_min(0)
            tables = tuple(take_rotary(table, rank) for table in _one_table(call))
            found |= {"position_ids": None, "position_embeddings": tables}
        return found

    def later(self, call: Call, prefill: Prefill, left: TokenSet) -> dict[str, Any]:
        assert left.present is not None
        found: dict[str, Any] = {"attention_mask": _hiding(_full_mask(call), left.present)}
        if call.rotary is not None:
            found |= _renumbered(call, (~left.present).sum(dim=1, keepdim=True))
        return found


STRATEGIES: dict[str, Drop | Hide] = {"drop": Drop(), "hide": Hide()}


def held(earlier: Prefill | None, number: int, past: int, like: Tensor) -> Tensor | None:
    """`[B, N]` positions below `past` that layers after `number` cuts hold; None: all of them."""
    if earlier is None or (retained := earlier.sets[number].retained) is None:
        return None
    later = torch.arange(earlier.total, past, device=like.device)
    return torch.cat([retained, later.expand(retained.shape[0], -1)], dim=1)


# -- how a layer is called -----------------------------------------------------------------------


class Signature:
    """How a decoder layer takes its arguments: hidden states first, everything else by name."""

    def __init__(self, layer: nn.Module) -> None:
        self.kind = type(layer).__name__
        self.names = _names(layer.forward)

    def bind(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Tensor, dict[str, Any]]:
        """Hidden states `[B, n, D]`, and the other arguments by name.

        Raises:
            NotImplementedError: arguments without a name, or a first one that is no hidden states.
        """
        named = dict(kwargs)
        if len(args) > 1:
            if len(args) > len(self.names):
                raise NotImplementedError(
                    f"{self.kind} is called with {len(args)} positional arguments, and its "
                    f"`forward` names {len(self.names)}; pruning has to know which is the mask and "
                    "which the cache. Give the layer's `forward` named parameters."
                )
            named |= dict(zip(self.names[1:], args[1:], strict=False))
        first = self.names[0] if self.names else "hidden_states"
        hidden = args[0] if args else named.pop(first, None)
        if not isinstance(hidden, Tensor) or hidden.ndim != 3:
            raise NotImplementedError(
                f"{self.kind} is not called with hidden states [B, S, D] first (`{first}`); "
                "pruning takes rows out of them. See docs/adding-a-model.md for what a decoder has "
                "to hand its layers."
            )
        return hidden, named

    def back(
        self, args: tuple[Any, ...], hidden: Tensor, kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call's arguments again, with new hidden states."""
        if args or not self.names:
            return (hidden,), kwargs
        return (), {self.names[0]: hidden, **kwargs}


@functools.lru_cache(maxsize=256)
def _names_of(function: Any) -> tuple[str, ...]:
    found = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            found.append(parameter.name)
    return tuple(found)


def _names(forward: Any) -> tuple[str, ...]:
    try:
        return _names_of(forward)
    except (TypeError, ValueError):
        return ()


def cache_in(kwargs: Mapping[str, Any]) -> Any:
    """The cache among a layer's arguments, whatever it is called (`past_key_values`, ...)."""
    found = kwargs.get("past_key_values")
    if found is not None:
        return found
    for value in kwargs.values():
        if hasattr(value, "get_seq_length") and hasattr(value, "update"):
            return value
    return None


def refuse_unknown(kwargs: Mapping[str, Any], length: int, kind: str) -> None:
    """Refuse arguments of layers that have one entry per token, and that nobody shortens.

    Raises:
        NotImplementedError: names the argument.
    """
    for name, value in kwargs.items():
        known = name in _PER_TOKEN or name.startswith("position_embeddings")
        if known and _shortenable(name, value):
            continue
        shape = _per_token(value, length)
        if shape is not None:
            raise NotImplementedError(
                f"decoder layers ({kind}) get `{name}` {shape}, one entry per token, and it is "
                'unknown how to shorten it; use `mode="mask"`, or open an issue with the model.'
            )


def _shortenable(name: str, value: Any) -> bool:
    if isinstance(value, Tensor):
        return not name.startswith("position_embeddings") or value.ndim in (3, 4)
    if isinstance(value, tuple | list) and name.startswith("position_embeddings"):
        return all(isinstance(one, Tensor) and one.ndim in (3, 4) for one in value)
    return value is None


def _per_token(value: Any, length: int) -> tuple[int, ...] | str | None:
    """Shape of a tensor in `value` that has an entry per token; None: there is none."""
    if isinstance(value, Tensor):
        return tuple(value.shape) if length > 1 and length in value.shape[-3:] else None
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, tuple | list):
        for one in value:
            if (found := _per_token(one, length)) is not None:
                return found
        return None
    if type(value).__name__ == "BlockMask":
        return "(a block mask of flex_attention)"
    return None


# -- tensors -------------------------------------------------------------------------------------


def take(tensor: Tensor, index: Tensor, *, dim: int, batch_dim: int = 0) -> Tensor:
    """Rows `index` `[B, n]` of a tensor along `dim`; a batch of 1 serves every row of `index`."""
    dim %= tensor.ndim
    if index.shape[0] == 1 and tensor.shape[batch_dim] == 1:
        return tensor.index_select(dim, index[0])  # Whole rows at once, not number by number.
    shape = [1] * tensor.ndim
    shape[batch_dim], shape[dim] = index.shape
    target = list(tensor.shape)
    batch = max(index.shape[0], tensor.shape[batch_dim])
    target[batch_dim] = batch
    tensor = tensor.expand(target)
    target[dim] = index.shape[1]
    return tensor.gather(dim, index.view(shape).expand(target))


def take_rotary(table: Tensor, rows: Tensor) -> Tensor:
    """Rows of a cos or sin table `[B, S, D]`, or `[3, B, S, D]` with several position axes."""
    return take(table, rows, dim=-2, batch_dim=table.ndim - 3)


def _each(tables: Any, function: Any) -> Any:
    return function(tables) if isinstance(tables, Tensor) else tuple(map(function, tables))


def _one_table(call: Call) -> tuple[Tensor, ...]:
    tables = call.kwargs.get("position_embeddings")
    if not isinstance(tables, tuple | list) or any(table.ndim != 3 for table in tables):
        raise NotImplementedError(
            'decoder layers get no rotary tables [B, S, D], which positions="compact" has to '
            'renumber; use positions="keep".'
        )
    return tuple(tables)


def _renumbered(call: Call, removed: Tensor | int) -> dict[str, Any]:
    """Positions that continue where `removed` tokens are not counted (int or `[B, 1]`)."""
    ids = call.kwargs.get("position_ids")
    if ids is None:
        raise NotImplementedError(
            'decoder layers get no `position_ids`, which positions="compact" has to renumber; use '
            'positions="keep".'
        )
    ids = ids - removed
    return {"position_ids": ids, "position_embeddings": call.rotary(call.hidden, ids)}


def _full_mask(call: Call) -> Tensor:
    mask = call.mask
    if mask is None:
        return call.implied()
    if mask.ndim != 4:
        raise NotImplementedError(
            'hiding tokens (mode="mask", or a batch in which some episodes run on all tokens) '
            'needs attn_implementation="sdpa" or "eager".'
        )
    return mask


def _hiding(mask: Tensor, present: Tensor) -> Tensor:
    """A mask `[B|1, 1, Q, N]` with what is not `present` `[B, S]` hidden from everybody."""
    seen = F.pad(present, (0, mask.shape[-1] - present.shape[1]), value=True)[:, None, None]
    if mask.dtype == torch.bool:
        return mask & seen
    return mask.expand(seen.shape[0], -1, -1, -1).masked_fill(~seen, torch.finfo(mask.dtype).min)


def _short_columns(mask: Tensor, retained: Tensor, total: int, static: bool) -> Tensor:
    """Keys behind the cut: what stayed so far, what came later, unused static slots."""
    later = torch.arange(total, mask.shape[-1], device=mask.device)
    columns = torch.cat([retained, later.expand(retained.shape[0], -1)], dim=1)
    mask = take(mask, columns, dim=-1)
    if not static:
        return mask
    forbidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    return F.pad(mask, (0, total - retained.shape[1]), value=forbidden)


def _with_gap(mask: Tensor, retained: Tensor, total: int) -> Tensor:
    """Mask of a cache that holds N tokens, then dead slots up to `total`, then the rest."""
    n = retained.shape[1]
    dead = retained[:, :1].expand(-1, total - n)
    later = torch.arange(total, mask.shape[-1], device=mask.device)
    columns = torch.cat([retained, dead, later.expand(retained.shape[0], -1)], dim=1)
    mask = take(mask, columns, dim=-1)
    alive = (torch.arange(total, device=mask.device) < n).expand(retained.shape[0], -1)
    if mask.ndim == 4:
        return _hiding(mask, alive)
    return mask * F.pad(alive, (0, mask.shape[-1] - total), value=True)
