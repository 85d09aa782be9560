"""Scores of visual tokens, read from queries and keys without changing the attention that runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from vla_pruner.core import refusals
from vla_pruner.core.arguments import take
from vla_pruner.core.plan import Reading
from vla_pruner.core.tokens import Prefill, TokenSet
from vla_pruner.core.watching import OBSERVER, Observer, show_to
from vla_pruner.methods.base import ScoreSpec
from vla_pruner.pruning.received import attention_column_max
from vla_pruner.pruning.scores import attention_column_mean, attention_rows

if TYPE_CHECKING:
    from vla_pruner.core.cut import Cut

Voting = slice | Tensor | None
"""Query rows: a slice, `[B, R]`, or None for the last one."""

Shows = tuple[nn.Module, Tensor, Tensor, Tensor | None, dict[str, Any]]
"""The arguments of an `Observer`."""

_KNOWN_TENSORS = ("position_ids", "cache_position", "s_aux", "position_embeddings")


@dataclass(frozen=True, eq=False)
class Seen:
    """Queries and keys of one attention as its kernel saw them, Q rows and N keys."""

    query: Tensor
    key: Tensor
    mask: Tensor | None
    causal: bool
    scale: float
    softcap: float | None
    sinks: Tensor | None

    @staticmethod
    def of(cut: Cut, shown: Shows, keys: int | None) -> Seen:
        """From what an attention function gets; `keys`, where no mask says how many: None, all.

        Raises:
            NotImplementedError: an argument that changes the attention in an unknown way.
        """
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
        return Seen(query, key, mask, causal, scale, kwargs.get("softcap"), sinks)

    def received(
        self, columns: Tensor, rows: Voting, weight: Tensor | None = None, heads: str = "mean"
    ) -> Tensor:
        """Attention that `columns` `[B|1, m]` (-1: none) get from `rows`: `[B, m]` fp32."""
        query, key, mask = self.query, self.key, self.mask
        columns = columns.expand(query.shape[0], -1)
        if columns.shape[1] == 0:
            return columns.float()
        own: dict[str, Any] = dict(scale=self.scale, softcap=self.softcap, sinks=self.sinks)
        if rows is None:
            mask = None if mask is None else mask[:, :, -1:]
            last_row = query[:, :, -1:]  # It has no future to hide.
            if heads == "mean":
                return attention_column_mean(last_row, key, columns, mask=mask, **own)
            last = attention_rows(last_row, key, mask=mask, **own)[:, :, 0]
            return last.amax(1).gather(1, columns)
        mean = attention_column_mean if heads == "mean" else attention_column_max
        own |= dict(mask=mask, causal=self.causal, rows=rows, row_weight=weight)
        return mean(query, key, columns, **own)


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
        seen = Seen.of(cut, shown, left.offset + queries if in_prefill else None)
        for reading in self.readings if in_prefill else ():
            if reading.number not in prefill.scores:
                rows, weight = votes(reading.spec, prefill, left, seen.query)
                columns = _keys(left.columns, left)
                score = seen.received(columns, rows, weight, reading.spec.heads)
                prefill.scores[reading.number] = score
        if not acting:
            return
        if in_prefill:
            rows = action_rows(prefill, left)
        elif self.acting == "reader":
            rows = cut.adapter.reader_rows(queries)
            if rows is None:
                return
        else:
            rows = slice(None) if queries > 1 else None
        received = seen.received(_places(prefill, left), rows)
        prefill.observed = received if prefill.observed is None else prefill.observed + received
        prefill.watched += 1


def _keys(columns: Tensor | None, left: TokenSet) -> Tensor:
    """`[1|B, m]` where a set's rows `columns` are among the keys of its layers."""
    assert columns is not None
    return columns + left.offset if left.offset else columns


def _places(prefill: Prefill, left: TokenSet) -> Tensor:
    """`[1|B, M]` where each visual token is among the keys of a set's layers; -1 if it was cut."""
    if left.rows is None:
        return _keys(prefill.layout.visual, left)
    if left.places is None:
        assert left.tokens is not None
        nowhere = left.tokens.new_full((len(left.tokens), prefill.layout.visual.shape[1]), -1)
        left.places = nowhere.scatter(1, left.tokens, _keys(left.columns, left))
    return left.places


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
        return place(left, prefill.index.last_row), None
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
        text = place(left, index.text_rows.expand(batch, -1))
        assert text is not None
        rows, weight = text, index.text_valid.expand(batch, -1).float()
        if spec.rows == "weighted":
            assert prefill.query_weights is not None
            weight = weight * prefill.query_weights.float()
    length = prefill.length if left.rows is None else left.rows.shape[1]
    # Padded entries share a row with another; adding leaves the other's weight alone.
    whole = torch.zeros(batch, length, dtype=torch.float32, device=like.device)
    return rows, whole.scatter_add(1, rows, weight)


def spread(prefill: Prefill, left: TokenSet, score: Tensor) -> Tensor:
    """A score `[B, m]` of a set's tokens at their places among all: `[B, M]`, 0 elsewhere."""
    assert left.tokens is not None
    everything = score.new_zeros(score.shape[0], prefill.layout.visual.shape[1])
    return everything.scatter(1, left.tokens.expand(score.shape[0], -1), score)


def place(left: TokenSet, rows: Tensor | None) -> Tensor | None:
    """Where rows of the prefill `[B, R]` that no cut removes are in a token set."""
    if rows is None or left.rows is None:
        return rows
    rows = rows.expand(left.rows.shape[0], -1).contiguous()
    return torch.searchsorted(left.rows, rows)


def action_rows(prefill: Prefill, left: TokenSet) -> Voting:
    """Rows of the prefill that are action queries; None: the last one."""
    rows = prefill.layout.action_rows
    if rows is None:
        return place(left, prefill.index.last_row)
    return _from_the_end(rows, prefill)


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
    """Call `observer` after each attention of one module, until `undo`; see `watching.show_to`."""
    show_to(observer, attention, undo, _probed)


def _probed(attend: Callable[..., Any]) -> Callable[..., Any]:
    def probed_attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> Any:
        output = attend(module, query, key, value, attention_mask, **kwargs)
        observer = getattr(module, OBSERVER, None)
        if observer is not None:
            observer(module, query, key, attention_mask, kwargs)
        return output

    probed_attention.attend = attend  # type: ignore[attr-defined]
    return probed_attention
