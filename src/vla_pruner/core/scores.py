"""Scores of visual tokens, read from queries and keys without changing the attention that runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from vla_pruner.core import refusals
from vla_pruner.core.arguments import UNUSED, take
from vla_pruner.core.hooks import OBSERVER, Observer, show_to
from vla_pruner.core.plan import Reading
from vla_pruner.core.tokens import Prefill, TokenSet
from vla_pruner.kernels.native import Attention
from vla_pruner.methods.base import ScoreSpec
from vla_pruner.pruning.received import column_max
from vla_pruner.pruning.scores import column_mean

if TYPE_CHECKING:
    from vla_pruner.core.cut import Cut

Voting = slice | Tensor
"""Query rows: a slice, or `[B, R]`."""

_LAST = slice(-1, None)

Shows = tuple[nn.Module, Tensor, Tensor, Tensor | None, dict[str, Any]]
"""The arguments of an `Observer`."""

_KNOWN_TENSORS = (*UNUSED, "position_ids", "cache_position", "s_aux", "position_embeddings")


def see(cut: Cut, shown: Shows, keys: int | None) -> Attention:
    """What an attention function gets; `keys`, where no mask says how many: None, all."""
    attention, query, key, mask, kwargs = shown
    for name, value in kwargs.items():
        if isinstance(value, Tensor) and name not in _KNOWN_TENSORS:
            raise refusals.unknown_attention(attention, name, value)
    causal = hides_future(cut, attention, mask, query.shape[2], kwargs)
    if mask is None:  # A static cache also shows slots not written yet.
        key = key if keys is None else key[:, :, :keys]
    elif mask.ndim == 2:
        mask = mask[:, None, None, : key.shape[2]].bool()
    else:  # Where one row is shown for all of them, that one.
        mask = mask[:, :, : 1 if mask.stride(2) == 0 else None, : key.shape[2]]
    scale, sinks = kwargs.get("scaling"), kwargs.get("s_aux")
    if scale is None:
        scale = getattr(attention, "scaling", query.shape[-1] ** -0.5)
    sinks = getattr(attention, "sinks", None) if sinks is None else sinks
    return Attention(query, key, scale, mask, causal, kwargs.get("softcap"), sinks)


@dataclass(frozen=True, eq=False)
class Watched:
    """What is read in one layer, whose attention calls this when it has run.

    Args:
        cut: the hooks on the decoder.
        number: cuts that have happened.
        readings: scores that are read in a prefill.
        acting: whether action attention is watched: "always", or in the passes of a "reader", which
            come after the prefill; None: never.
    """

    cut: Cut
    number: int
    readings: tuple[Reading, ...]
    acting: Literal["always", "reader"] | None

    def __call__(self, *shown: Any) -> None:
        """Read scores into the prefill; for the arguments see `Observer`."""
        cut, prefill = self.cut, self.cut.prefill
        in_prefill = cut.phase == "prefill"
        acting = self.acting == "always" or (self.acting == "reader" and not in_prefill)
        if prefill is None or not (acting or (in_prefill and self.readings)):
            return
        left = prefill.sets[0 if prefill.mode == "full" else self.number]
        queries = shown[1].shape[2]
        seen = see(cut, shown, left.offset + queries if in_prefill else None)
        assert left.places is not None
        for reading in self.readings if in_prefill else ():
            if reading.number not in prefill.scores:
                rows, weight = votes(reading.spec, prefill, left, seen.query)
                read = column_mean if reading.spec.heads == "mean" else column_max
                prefill.scores[reading.number] = read(seen, left.places, rows, weight)
        acts: Voting | None = slice(None)
        if in_prefill:
            acts = action_rows(prefill, left)
        elif self.acting == "reader":
            acts = cut.adapter.reader_rows(queries)
        if acting and acts is not None:
            received = column_mean(seen, left.places, acts)
            prefill.observed = received if prefill.observed is None else prefill.observed + received
            prefill.watched += 1


def hides_future(
    cut: Cut, attention: nn.Module, mask: Tensor | None, queries: int, kwargs: Mapping[str, Any]
) -> bool:
    """Whether the attention function itself hides the future: not if a 4-D mask says it all."""
    if queries == 1 or cut.eager or (mask is not None and mask.ndim == 4):
        return False
    causal = kwargs.get("is_causal")
    return bool(getattr(attention, "is_causal", True) if causal is None else causal)


def votes(
    spec: ScoreSpec, prefill: Prefill, left: TokenSet, like: Tensor
) -> tuple[Voting, Tensor | None]:
    """Query rows that vote in a token set, and their weights `[B, n]`; `like` `[B, ..., ...]`."""
    if spec.rows == "action":
        return action_rows(prefill, left), None
    if spec.rows == "last":
        return _last(prefill, left), None
    if spec.rows == "all":
        return slice(None), _real(prefill, left)
    return _some_rows(spec, prefill, left, like)


def _some_rows(
    spec: ScoreSpec, prefill: Prefill, left: TokenSet, like: Tensor
) -> tuple[Voting, Tensor | None]:
    """`votes` of visual tokens, or of the instruction's."""
    batch, index, layout = like.shape[0], prefill.index, prefill.layout
    if spec.rows == "visual":
        assert left.tokens is not None and left.columns is not None
        rows, valid = left.columns.expand(batch, -1), layout.visual_valid
        if valid is None:
            return rows, None
        weight = valid.expand(batch, -1).gather(1, left.tokens.expand(batch, -1)).float()
    else:
        assert index.text_rows is not None and index.text_valid is not None
        rows = place(left, index.text_rows.expand(batch, -1))
        weight = index.text_valid.expand(batch, -1).float()
        if spec.rows == "weighted":
            assert prefill.query_weights is not None
            weight = weight * prefill.query_weights.float()
    length = prefill.length if left.rows is None else left.rows.shape[1]
    # Padded entries share a row with another; adding leaves the other's weight alone.
    whole = torch.zeros(batch, length, dtype=torch.float32, device=like.device)
    return rows, whole.scatter_add(1, rows, weight)


def place(left: TokenSet, rows: Tensor) -> Tensor:
    """Where rows of the prefill `[B, R]` that no cut removes are in a token set."""
    if left.rows is None:
        return rows
    rows = rows.expand(left.rows.shape[0], -1).contiguous()
    return torch.searchsorted(left.rows, rows)


def action_rows(prefill: Prefill, left: TokenSet) -> Voting:
    """Rows of the prefill that are action queries; the last one, where it holds none."""
    rows = prefill.layout.action_rows
    return _last(prefill, left) if rows is None else _from_the_end(rows, prefill)


def _last(prefill: Prefill, left: TokenSet) -> Voting:
    """The last real row of each sequence."""
    last = prefill.index.last_row
    return _LAST if last is None else place(left, last)


def _from_the_end(rows: slice, prefill: Prefill) -> slice:
    """Rows of a prefill, counted from the end, where no cut moves them."""
    start, stop = rows.start or 0, rows.stop
    length = prefill.length if start >= 0 or (stop or 0) > 0 else 0
    start = start - length if start >= 0 else start
    if stop is not None and stop >= 0:
        stop = stop - length if stop < length else None
    return slice(start, stop)


def _real(prefill: Prefill, left: TokenSet) -> Tensor | None:
    """Weights of all rows `[B, n]`: 0 for padding and for tokens that an earlier cut hid."""
    valid = prefill.layout.valid_rows
    if left.rows is not None:
        return None if valid is None else take(valid, left.rows, dim=1)
    if left.present is None:
        return valid
    present = left.present[:, prefill.past :]
    return present.float() if valid is None else valid * present


def guides(prefill: Prefill, left: TokenSet, hidden: Tensor) -> dict[str, Tensor]:
    """`Evidence.guides` and `guides_valid`, from `hidden` `[B, n, D]`."""
    index, batch = prefill.index, hidden.shape[0]
    assert index.text_rows is not None and index.text_valid is not None
    text = place(left, index.text_rows.expand(batch, -1))
    found, valid = [take(hidden, text, dim=1)], [index.text_valid.expand(batch, -1)]
    if prefill.layout.action_rows is not None:
        found.append(hidden[:, action_rows(prefill, left)])
        valid.append(valid[0].new_ones(found[1].shape[:2]))
    return {"guides": torch.cat(found, dim=1), "guides_valid": torch.cat(valid, dim=1)}


# -- hooks on attentions -------------------------------------------------------------------------


def watch_layers(cut: Cut, undo: ExitStack) -> None:
    """Watch the attentions in which the plan reads scores, or how action queries look."""
    plan, readers = cut.plan, cut.readers
    for index, layer in enumerate(cut.layers):
        here = [r for r in plan.readings if r.spec.layer == index]
        read = tuple(r for r in here if r.spec.kind == "attention")
        acting = index in plan.action_layers and not readers
        if read or acting:
            watched = Watched(cut, plan.number[index], read, "always" if acting else None)
            watch(cut.adapter.attention(layer), watched, undo)
    for index in plan.action_layers if readers else ():
        # What reads the decoder's output sees what all cuts have left.
        number = plan.action_cuts if cut.adapter.reads_output else plan.number[index]
        watch(cut.adapter.attention(readers[index]), Watched(cut, number, (), "reader"), undo)


def watch(attention: nn.Module, observer: Observer, undo: ExitStack) -> None:
    """Call `observer` after each attention of one module, until `undo`; see `hooks.show_to`."""
    show_to(observer, attention, undo, _probed)


def _probed(attend: Callable[..., Any]) -> Callable[..., Any]:
    def probed_attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Any, attention_mask: Any, **rest: Any
    ) -> Any:
        output = attend(module, query, key, value, attention_mask, **rest)
        observer = getattr(module, OBSERVER, None)
        if observer is not None:
            observer(module, query, key, attention_mask, rest)
        return output

    probed_attention.attend = attend  # type: ignore[attr-defined]
    return probed_attention
