"""Scores of visual tokens, read from queries and keys without changing the attention that runs."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vla_pruner.core.arguments import take
from vla_pruner.core.cleanup import Hook
from vla_pruner.core.layout import Adapter
from vla_pruner.core.tokens import Prefill, TokenSet
from vla_pruner.methods.base import ScoreSpec
from vla_pruner.pruning.received import attention_column_max, logit_column_mean
from vla_pruner.pruning.scores import attention_column_mean, attention_rows

if TYPE_CHECKING:
    from vla_pruner.core.cut import Cut

Voting = slice | Tensor | None
"""Query rows: a slice, `[B, R]`, or None for the last one."""

Observer = Callable[[nn.Module, Tensor, Tensor, Tensor | None, dict[str, Any]], None]
"""Called after an attention: module, query [B, Hq, Q, D], key [B, Hkv, N, D], mask, arguments."""

_OBSERVER = "_vla_pruner_observer"
_PREFIX = "vla_pruner_"
_KNOWN_TENSORS = ("position_ids", "cache_position", "s_aux", "position_embeddings")


# -- what is read --------------------------------------------------------------------------------


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
    def of(
        attention: nn.Module,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        kwargs: Mapping[str, Any],
        *,
        keys: int | None,
        causal: bool,
    ) -> Seen:
        """From what an attention function gets.

        Args:
            attention, query, key, mask, kwargs: see `Observer`.
            keys: how many keys there are where no mask says so; None: all.
            causal: whether it hides the future by itself.

        Raises:
            NotImplementedError: an argument that changes the attention in an unknown way.
        """
        for name, value in kwargs.items():
            if isinstance(value, Tensor) and name not in _KNOWN_TENSORS:
                raise NotImplementedError(
                    f"{type(attention).__name__} gives its attention function `{name}` "
                    f"{tuple(value.shape)}, and what that does to the attention is unknown, so "
                    "that it cannot be scored; use a method without scores (divprune, random)."
                )
        if mask is None:
            if keys is not None:
                key = key[:, :, :keys]  # A static cache also shows slots not written yet.
        elif mask.ndim == 2:
            mask = mask[:, None, None, : key.shape[2]].bool()
        else:
            mask = mask[..., : key.shape[2]]
            if mask.stride(2) == 0:
                mask = mask[:, :, :1]  # One row, shown for all of them.
        scale = kwargs.get("scaling")
        if scale is None:
            scale = getattr(attention, "scaling", query.shape[-1] ** -0.5)
        sinks = kwargs.get("s_aux")
        sinks = getattr(attention, "sinks", None) if sinks is None else sinks
        return Seen(query, key, mask, causal, scale, kwargs.get("softcap"), sinks)

    def received(
        self,
        columns: Tensor,
        rows: Voting,
        row_weight: Tensor | None = None,
        heads: str = "mean",
    ) -> Tensor:
        """Attention that `columns` `[B, m]` get from `rows`: `[B, m]` fp32; -1 gets none."""
        if columns.shape[1] == 0:
            return columns.float()
        options: dict[str, Any] = {
            "scale": self.scale,
            "softcap": self.softcap,
            "sinks": self.sinks,
        }
        if rows is None:  # The last row has no future to hide.
            mask = None if self.mask is None else self.mask[:, :, -1:]
            if heads == "mean":
                return attention_column_mean(
                    self.query[:, :, -1:], self.key, columns, mask=mask, **options
                )
            last = attention_rows(self.query[:, :, -1:], self.key, mask=mask, **options)[:, :, 0]
            return last.amax(1).gather(1, columns)
        received = attention_column_mean if heads == "mean" else attention_column_max
        return received(
            self.query,
            self.key,
            columns,
            mask=self.mask,
            causal=self.causal,
            rows=rows,
            row_weight=row_weight,
            **options,
        )


def observe(
    cut: Cut,
    index: int,
    attention: nn.Module,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    kwargs: dict[str, Any],
) -> None:
    """After a watched layer's attention: the scores that are read there, into the prefill."""
    prefill, plan = cut.prefill, cut.plan
    if prefill is None:
        return
    queries, in_prefill = query.shape[2], cut.phase == "prefill"
    number = plan.number[index] if index < plan.depth else 0
    if cut.adapter.reads_output and not in_prefill:
        number = plan.action_cuts
    left = prefill.sets[0 if prefill.mode == "full" else number]
    seen = Seen.of(
        attention,
        query,
        key,
        mask,
        kwargs,
        keys=left.offset + queries if in_prefill else None,
        causal=hides_future(cut, attention, mask, queries, kwargs),
    )
    for reading in plan.readings if in_prefill else ():
        spec = reading.spec
        read_here = spec.layer == index and spec.kind == "attention"
        if read_here and reading.number not in prefill.scores:
            rows, weight = votes(spec, prefill, left, query)
            keys = _keys(left.columns, left, query)
            prefill.scores[reading.number] = seen.received(keys, rows, weight, spec.heads)
    if index not in plan.action_layers or (in_prefill and cut.readers):
        return
    rows = slice(None) if queries > 1 else None
    if in_prefill:
        rows = action_rows(prefill, left)
    elif cut.readers:
        rows = cut.adapter.reader_rows(queries)
        if rows is None:
            return
    received = seen.received(_places(prefill, left, query), rows)
    prefill.observed = received if prefill.observed is None else prefill.observed + received
    prefill.watched += 1


def _keys(columns: Tensor | None, left: TokenSet, like: Tensor) -> Tensor:
    """`[B, m]` where a set's rows `columns` `[1|B, m]` are among the keys of its layers."""
    assert columns is not None
    moved = columns + left.offset if left.offset else columns
    return moved.expand(like.shape[0], -1)


def _places(prefill: Prefill, left: TokenSet, like: Tensor) -> Tensor:
    """`[B, M]` where each visual token is among the keys of a set's layers; -1 if it was cut."""
    if left.rows is None:
        return _keys(prefill.layout.visual, left, like)
    if left.places is None:
        assert left.tokens is not None
        shape = like.shape[0], prefill.layout.visual.shape[1]
        nowhere = left.tokens.new_full(shape, -1)
        tokens = left.tokens.expand(like.shape[0], -1)
        left.places = nowhere.scatter(1, tokens, _keys(left.columns, left, like))
    return left.places


def hides_future(
    cut: Cut, attention: nn.Module, mask: Tensor | None, queries: int, kwargs: Mapping[str, Any]
) -> bool:
    """Whether the attention function itself hides the future: not if a 4-D mask says it all."""
    if queries == 1 or cut.eager or (mask is not None and mask.ndim == 4):
        return False
    causal = kwargs.get("is_causal")
    return bool(getattr(attention, "is_causal", True) if causal is None else causal)


def project(cut: Cut, index: int, number: int, prefill: Prefill, hidden: Tensor) -> None:
    """Before a layer: scores from its queries and keys, after `number` cuts."""
    for reading in cut.plan.readings:
        spec = reading.spec
        if spec.kind != "logits" or spec.layer != index or reading.cuts != number:
            continue
        if reading.number not in prefill.scores:
            left = prefill.sets[0 if prefill.mode == "full" else number]
            prefill.scores[reading.number] = logits(
                spec, cut.adapter, cut.layers[index], hidden, prefill, left
            )


def logits(
    spec: ScoreSpec,
    adapter: Adapter,
    layer: nn.Module,
    hidden: Tensor,
    prefill: Prefill,
    left: TokenSet,
) -> Tensor:
    """Score `[B, m]` from the products of queries and keys that `layer` makes of `hidden`."""
    query, key = adapter.project(layer, hidden)
    columns = _columns(left, hidden.shape[0])
    if columns.shape[1] == 0:
        return columns.float()
    index = columns[:, None, :, None].expand(-1, key.shape[1], -1, key.shape[3])
    rows, weight = votes(spec, prefill, left, hidden)
    scale = getattr(adapter.attention(layer), "scaling", query.shape[-1] ** -0.5)
    return logit_column_mean(
        query,
        key.gather(2, index),
        scale=scale,
        rows=slice(-1, None) if rows is None else rows,
        row_weight=weight,
        heads=spec.heads,
    )


def votes(
    spec: ScoreSpec, prefill: Prefill, left: TokenSet, like: Tensor
) -> tuple[Voting, Tensor | None]:
    """Query rows that vote in a token set, and their weights `[B, n]`; `like` `[B, ..., ...]`."""
    batch, index, layout = like.shape[0], prefill.index, prefill.layout
    if spec.rows == "last":
        return place(left, index.last_row), None
    if spec.rows == "all":
        return slice(None), _real(prefill, left)
    if spec.rows == "visual":
        rows, valid = _columns(left, batch), layout.visual_valid
        if valid is None:
            return rows, None
        assert left.tokens is not None
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
    # Counted from the end, where no cut moves them.
    start, stop = rows.start or 0, rows.stop
    length = prefill.length if start >= 0 or (stop or 0) > 0 else 0
    start = start - length if start >= 0 else start
    if stop is not None and stop >= 0:
        stop = stop - length if stop < length else None
    return slice(start, stop)


def _columns(left: TokenSet, batch: int) -> Tensor:
    assert left.columns is not None
    return left.columns.expand(batch, -1)


def _real(prefill: Prefill, left: TokenSet) -> Tensor | None:
    """Weights of all rows `[B, n]`: 0 for padding and for tokens that an earlier cut hid."""
    valid = prefill.layout.valid_rows
    if left.rows is not None:
        return None if valid is None else take(valid, left.rows, dim=1)
    if left.present is None:
        return valid
    present = left.present[:, prefill.past :]
    return present.float() if valid is None else valid * present


# -- how an attention shows what it compares -----------------------------------------------------


class Shown(nn.Module):
    """Stands for an attention that is no module of its own; whoever runs it calls `show`."""

    observer: Observer | None = None

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(_attn_implementation="eager")

    def show(self, query: Tensor, key: Tensor, mask: Tensor | None, **arguments: Any) -> None:
        """Hand queries `[B, Hq, Q, D]`, keys `[B, Hkv, N, D]` and mask to the observer, if any."""
        if self.observer is not None:
            self.observer(self, query, key, mask, arguments)


def implementation(attention: nn.Module) -> str:
    """Name of the attention implementation ("sdpa", "eager", ...) that a module uses, unprobed.

    Raises:
        TypeError: the module does not choose its attention by name.
    """
    name = getattr(getattr(attention, "config", None), "_attn_implementation", None)
    if not isinstance(name, str):
        raise TypeError(
            f"{type(attention).__name__} has no `config._attn_implementation`, so its attention "
            "cannot be watched; use a decoder of transformers, or a method that needs no scores."
        )
    return name.removeprefix(_PREFIX).partition("@")[0]


def watch(attention: nn.Module, observer: Observer, undo: ExitStack) -> None:
    """Call `observer` after each attention of one module, which keeps its implementation.

    The module gets its own copy of the configuration, with a registered implementation that calls
    the old one first; other modules, which share the configuration, are not touched.

    Raises:
        TypeError: see `implementation`.
        NotImplementedError: an implementation that cannot be wrapped.
    """
    if isinstance(attention, Shown):
        undo.callback(setattr, attention, "observer", None)
        attention.observer = Hook(observer)
        return
    name = implementation(attention)
    if name == "flex_attention":
        raise NotImplementedError(
            "flex_attention hides its masks from pruning; load the model with "
            'attn_implementation="sdpa" or "eager".'
        )
    original = attention.config
    private = copy.copy(original)
    private._attn_implementation_internal = _register(attention, name)  # type: ignore[union-attr]

    undo.callback(setattr, attention, "config", original)
    undo.callback(_forget_observer, attention)
    setattr(attention, _OBSERVER, Hook(observer))
    attention.config = private


def _forget_observer(attention: nn.Module) -> None:
    if hasattr(attention, _OBSERVER):
        delattr(attention, _OBSERVER)


def _register(attention: nn.Module, name: str) -> str:
    """Register the probed version of an implementation; its name keeps the old name in it.

    What is wrapped is looked up anew each time: others may have replaced it in between.
    """
    from transformers import AttentionInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if name == "eager":
        wrapped, home = _eager_attention(attention)
        probed_name = f"{_PREFIX}{name}@{home}"
    else:
        wrapped, probed_name = ALL_ATTENTION_FUNCTIONS[name], _PREFIX + name
    known = ALL_ATTENTION_FUNCTIONS.get(probed_name)
    if getattr(known, "attend", None) is not wrapped:
        AttentionInterface.register(probed_name, _probed(wrapped))
    return probed_name


def _eager_attention(attention: nn.Module) -> tuple[Callable[..., Any], str]:
    """The `eager_attention_forward` beside a module's class, and the name of its file."""
    for kind in type(attention).__mro__:
        home = sys.modules.get(kind.__module__)
        function = getattr(home, "eager_attention_forward", None)
        if inspect.isfunction(function):
            return function, kind.__module__
    raise NotImplementedError(
        f"no eager_attention_forward beside {type(attention).__name__}; load the model with "
        'attn_implementation="sdpa".'
    )


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
        observer = getattr(module, _OBSERVER, None)
        if observer is not None:
            observer(module, query, key, attention_mask, kwargs)
        return output

    probed_attention.attend = attend  # type: ignore[attr-defined]
    return probed_attention
