"""How layers behind a cut are called, where tokens were removed (`Drop`).

A decoder hands every layer the arguments of the whole sequence. A strategy says which rows go on,
and makes the arguments of a prefill and of a later pass from those of the whole; the other one is
in `hiding.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vla_pruner.core import refusals
from vla_pruner.core.tokens import Prefill, TokenSet

if TYPE_CHECKING:
    from vla_pruner.core.cut import Cut

ROTARY = "position_embeddings"
UNUSED = ("shift_labels", "num_items_in_batch")
"""For the loss: what a caller gives a model is handed on to layers, which take no notice of it."""

_BIASES = ("bias", "alibi", "cu_seq_lens")
"""By distance, or of packed sequences; some are as long as a model can see at all."""

_PER_TOKEN = (*UNUSED, "attention_mask", "position_ids", "cache_position")


class Strategy(Protocol):
    """What happens to tokens that are not kept."""

    def leave(self, prefill: Prefill, visual: Tensor, number: int, hidden: Tensor) -> Tensor:
        """At cut `number` only the visual tokens at rows `visual` `[B, k]` of the prefill stay.

        Writes what that means into the set behind the cut. Returns the hidden states `[B, n, D]`
        that go on, of those that came so far.
        """

    def in_prefill(self, call: Call, prefill: Prefill, left: TokenSet) -> dict[str, Any]:
        """Arguments of layers behind a cut. Errors: NotImplementedError, unknown ones."""

    def later(self, call: Call, prefill: Prefill, left: TokenSet) -> dict[str, Any]:
        """The same in a pass that continues the cache."""


@dataclass(frozen=True, eq=False)
class Call:
    """A call of the first layer behind a cut.

    Args:
        cut: the hooks on the decoder.
        number: cuts that have happened.
        layer: that is called.
        hidden: `[B, Q, D]`.
        kwargs: the layer's other arguments by name.
    """

    cut: Cut
    number: int
    layer: nn.Module
    hidden: Tensor
    kwargs: Mapping[str, Any]


class Drop:
    """Tokens that are not kept leave the hidden states, masks, positions and caches."""

    def leave(self, prefill: Prefill, visual: Tensor, number: int, hidden: Tensor) -> Tensor:
        earlier, left = prefill.sets[number - 1].rows, prefill.sets[number]
        others = prefill.index.others.expand(visual.shape[0], -1)
        rows = torch.cat([others, visual], dim=1).sort(dim=1).values
        left.rows, left.retained = rows, rows
        left.columns = torch.searchsorted(rows, visual)
        if prefill.past:
            past = held(prefill, number, visual)
            left.offset = past.shape[1]
            left.retained = torch.cat([past, rows + prefill.past], dim=1)
        assert left.tokens is not None
        nowhere = torch.full_like(prefill.layout.visual, -1).expand(visual.shape[0], -1)
        left.places = nowhere.scatter(1, left.tokens, left.columns + left.offset)
        stay = rows if earlier is None else torch.searchsorted(earlier, rows)
        return take(hidden, stay, dim=1)

    def in_prefill(self, call: Call, prefill: Prefill, left: TokenSet) -> dict[str, Any]:
        kwargs, rows = call.kwargs, left.rows
        assert rows is not None
        refuse_unknown(kwargs, prefill.length, type(call.layer).__name__)
        short: dict[str, Any] = {}
        tables = [n for n, table in kwargs.items() if n.startswith(ROTARY) and table is not None]
        if call.cut.rotary is not None:
            short[ROTARY] = tuple(table[:, : rows.shape[1]] for table in one_table(call))
        for name in tables if call.cut.rotary is None else ():
            short[name] = take_rotary(kwargs[name], rows)
        if (ids := kwargs.get("position_ids")) is not None:
            places = rows if call.cut.rotary is None else prefill_rows(rows)
            short["position_ids"] = left_ids(call, ids, places, tables=bool(tables))
        if (slots := kwargs.get("cache_position")) is not None:
            short["cache_position"] = slots[: rows.shape[1]] - (prefill.past - left.offset)
        if (mask := kwargs.get("attention_mask")) is not None:
            short["attention_mask"] = _short_mask(mask, prefill, left, call.cut.static_cache)
        return short

    def later(self, call: Call, prefill: Prefill, left: TokenSet) -> dict[str, Any]:
        retained, mask = left.retained, call.kwargs.get("attention_mask")
        assert retained is not None
        found: dict[str, Any] = {}
        removed = prefill.total - retained.shape[1]
        if mask is not None:
            found["attention_mask"] = _short_columns(
                mask, retained, prefill.total, call.cut.static_cache
            )
        if call.kwargs.get("cache_position") is not None:
            found["cache_position"] = call.kwargs["cache_position"] - removed
        return found if call.cut.rotary is None else found | renumbered(call, removed)


def held(prefill: Prefill, number: int, like: Tensor) -> Tensor:
    """`[B, N]` positions before a prefill that layers after `number` cuts hold."""
    earlier = prefill.before
    retained = None if earlier is None else earlier.sets[number].retained
    if earlier is None or retained is None:
        return torch.arange(prefill.past, device=like.device).expand(like.shape[0], -1)
    later = torch.arange(earlier.total, prefill.past, device=like.device)
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
        """Hidden states `[B, n, D]` and the rest by name. Errors: NotImplementedError, no names."""
        if len(args) > max(len(self.names), 1):
            raise refusals.unnamed_arguments(self.kind, len(args), len(self.names))
        named = {**kwargs, **dict(zip(self.names[1:], args[1:], strict=False))}
        first = self.names[0] if self.names else "hidden_states"
        hidden = args[0] if args else named.pop(first, None)
        if not isinstance(hidden, Tensor) or hidden.ndim != 3:
            raise refusals.no_hidden_states(self.kind, first)
        return hidden, named


def _names(forward: Any) -> tuple[str, ...]:
    try:
        parameters = inspect.signature(forward).parameters.values()
    except (TypeError, ValueError):
        return ()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(one.name for one in parameters if one.kind in positional)


def cache_in(kwargs: Mapping[str, Any]) -> Any:
    """The cache among a layer's arguments, whatever it is called (`cache`, `past_key_values`)."""
    if (found := kwargs.get("past_key_values")) is not None:
        return found
    caches = [v for v in kwargs.values() if hasattr(v, "get_seq_length") and hasattr(v, "update")]
    return caches[0] if caches else None


def refuse_unknown(kwargs: Mapping[str, Any], length: int, kind: str) -> None:
    """Refuse arguments with one entry per token or distance, which nobody shortens."""
    for name, value in kwargs.items():
        for one in [] if name in _PER_TOKEN and isinstance(value, Tensor) else _leaves(value):
            shape: Any = tuple(one.shape) if isinstance(one, Tensor) else ()
            table = name.startswith(ROTARY) and len(shape) in (3, 4)
            if length > 1 and length in shape[-3:] and not table:
                raise refusals.unknown_argument(kind, name, shape)
            if type(one).__name__ == "BlockMask" or (shape and any(b in name for b in _BIASES)):
                raise refusals.unknown_argument(kind, name, shape or "(a block mask)")


def _leaves(value: Any) -> list[Any]:
    """What stands in lists and dicts, however deep."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, tuple | list):
        return [leaf for one in value for leaf in _leaves(one)]
    return [value]


# -- tensors -------------------------------------------------------------------------------------


def take(tensor: Tensor, index: Tensor, *, dim: int, batch_dim: int = 0) -> Tensor:
    """Rows `index` `[B, n]` of a tensor along `dim`; a batch of 1 serves every row of `index`."""
    dim %= tensor.ndim
    if index.shape[0] == 1 and tensor.shape[batch_dim] == 1:
        return tensor.index_select(dim, index[0])  # Whole rows at once, not number by number.
    shape, target = [1] * tensor.ndim, list(tensor.shape)
    shape[batch_dim], shape[dim] = index.shape
    target[batch_dim] = max(index.shape[0], tensor.shape[batch_dim])
    tensor = tensor.expand(target)
    target[dim] = index.shape[1]
    return tensor.gather(dim, index.view(shape).expand(target))


def take_rotary(table: Any, rows: Tensor) -> Any:
    """Rows of rotary tables: `[B, S, D]`, `[3, B, S, D]` with several axes, or a tuple of them."""
    if isinstance(table, tuple | list):
        return tuple(take_rotary(one, rows) for one in table)
    return take(table, rows, dim=-2, batch_dim=table.ndim - 3)


def prefill_rows(rows: Tensor) -> Tensor:
    """The first rows, as many: whose positions renumbered tokens take."""
    return torch.arange(rows.shape[1], device=rows.device).expand(rows.shape[0], -1)


def left_ids(call: Call, ids: Tensor, places: Tensor, *, tables: bool) -> Tensor | None:
    """Positions of what is left; None where tables tell and gaps look like packed sequences."""
    return None if tables and (call.cut.flash or ids.ndim != 2) else take(ids, places, dim=-1)


def one_table(call: Call) -> tuple[Tensor, ...]:
    tables = call.kwargs.get(ROTARY)
    if not isinstance(tables, tuple | list) or any(table.ndim != 3 for table in tables):
        raise refusals.no_rotary_tables()
    return tuple(tables)


def renumbered(call: Call, removed: Tensor | int) -> dict[str, Any]:
    """Positions that continue where `removed` tokens are not counted (int or `[B, 1]`)."""
    ids = call.kwargs.get("position_ids")
    if ids is None:
        raise refusals.no_position_ids()
    ids = ids - removed
    return {"position_ids": ids, ROTARY: call.cut.rotary(call.hidden, ids)}


def _short_mask(mask: Tensor, prefill: Prefill, left: TokenSet, static: bool) -> Tensor:
    """A prefill's mask `[B|1, 1|H, S|1, N]` or `[B, N]` for what is left of it."""
    rows, retained = left.rows, left.retained
    assert rows is not None and retained is not None
    full = mask.ndim == 4 and mask.shape[2] == prefill.length
    alike = full and mask.stride(2) == 0  # One row, shown for all of them.
    if full:
        mask = mask[:, :, :1] if alike else take(mask, rows, dim=2)
    mask = _short_columns(mask, retained, prefill.total, static)
    return mask.expand(-1, -1, rows.shape[1], -1) if alike else mask


def _short_columns(mask: Tensor, retained: Tensor, total: int, static: bool) -> Tensor:
    """Keys behind the cut: what stayed so far, what came later, unused static slots."""
    later = torch.arange(total, mask.shape[-1], device=mask.device)
    columns = torch.cat([retained, later.expand(retained.shape[0], -1)], dim=1)
    mask = take(mask, columns, dim=-1)
    if not static:
        return mask
    forbidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    return F.pad(mask, (0, total - retained.shape[1]), value=forbidden)
