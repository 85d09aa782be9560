"""Visual tokens whose own rows the caller reads: they stay, and take their places of the budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from vla_pruner.core import refusals
from vla_pruner.core.arguments import take
from vla_pruner.core.tokens import Prefill, TokenIndex
from vla_pruner.methods.base import Choice, Evidence, Method


def choose_beside(
    ask: Callable[[Evidence], Choice],
    evidence: Evidence,
    prefill: Prefill,
    method: Method,
    cuts: int,
) -> Choice:
    """What a method chooses of the others, joined with the tokens that stay anyway.

    Args:
        ask: what it chooses of some evidence.
        evidence: of all tokens that are left at this cut.
        prefill: whose layout says which stay (`Layout.read`).
        method: that is asked.
        cuts: how often it cuts.
    """
    tokens = evidence.tokens
    assert tokens is not None
    read, rest = _places(evidence.number, prefill.index, tokens)
    others = _of_others(evidence, rest, read.shape[1], prefill.layout.read, method, cuts)
    nothing = Choice(tokens.new_zeros(tokens.shape[0], 0))
    choice = nothing if others.keep_count == 0 else ask(others)
    return _with_read(choice, read, tokens.shape[1])


def _places(number: int, index: TokenIndex, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Places among `tokens` `[B, m]` of those that stay anyway `[B, R]`, and of the others."""
    batch, read, free = tokens.shape[0], index.read, index.free
    assert read is not None and free is not None
    if number == 0:
        return read.expand(batch, -1), free.expand(batch, -1)
    place = torch.searchsorted(tokens, read.expand(batch, -1).contiguous())
    return place, _others(place, tokens.shape[1])


def _others(place: Tensor, size: int) -> Tensor:
    """Indices in 0..size-1 that are not among `place` `[B, R]`, ascending: `[B, size - R]`."""
    stays = torch.zeros(place.shape[0], size, dtype=torch.bool, device=place.device)
    stays = stays.scatter(1, place, True)
    return stays.int().sort(dim=1, stable=True).indices[:, : size - place.shape[1]]


def _of_others(
    evidence: Evidence,
    rest: Tensor,
    taken: int,
    always: tuple[int, ...],
    method: Method,
    cuts: int,
) -> Evidence:
    """The evidence of the tokens at `rest` `[B, n]`, with the budget that `taken` tokens leave."""
    views: tuple[int, ...] = (rest.shape[1],)
    if len(evidence.views) > 1 and method.budget == "view":
        if cuts > 1:
            raise refusals.read_under_views(method.name)
        ends = list(accumulate(evidence.views))
        views = tuple(
            size - sum(end - size <= token < end for token in always)
            for size, end in zip(evidence.views, ends, strict=True)
        )
    assert evidence.keep_count is not None
    count = min(max(evidence.keep_count - taken, 0), rest.shape[1])
    others = evidence.of(lambda tensor: take(tensor, rest, dim=1), views)
    return replace(others, keep_count=count)


def _with_read(choice: Choice, read: Tensor, size: int) -> Choice:
    """A choice among the others, joined with the tokens `[B, R]` that stay anyway."""
    batch, kept, rest = read.shape[0], choice.kept, _others(read, size)
    joined, order = torch.cat([rest.gather(1, kept), read], dim=1).sort(dim=1)
    if choice.merge is None:
        return Choice(joined)
    merge = choice.merge
    whole = merge.new_zeros(batch, kept.shape[1], size)
    whole = whole.scatter(2, rest[:, None].expand(-1, kept.shape[1], -1), merge)
    alone = merge.new_zeros(batch, read.shape[1], size).scatter(2, read[..., None], 1.0)
    both = torch.cat([whole, alone], dim=1)
    return Choice(joined, both.gather(1, order[..., None].expand(-1, -1, size)))


def in_place(prefill: Prefill, output: Any) -> Any:
    """A decoder's output, with every token in its row in the hidden states of its layers.

    Rows that had left are zeros. Hidden states are what a field of that name holds, or, where the
    output has no names, the lists of tensors `[B, n, D]` in it.
    """
    if isinstance(output, tuple | list) and type(output) in (tuple, list):
        parts = (_all(prefill, x) if isinstance(x, tuple | list) else x for x in output)
        return type(output)(parts)
    for name in ("hidden_states", "decoder_hidden_states"):
        states = output.get(name) if isinstance(output, dict) else getattr(output, name, None)
        if isinstance(states, tuple | list):
            put = output.__setitem__ if isinstance(output, dict) else partial(setattr, output)
            put(name, _all(prefill, states))
    return output


def _all(prefill: Prefill, states: tuple[Any, ...] | list[Any]) -> tuple[Any, ...] | list[Any]:
    found = [_in_place(prefill, one) for one in states]
    return found if isinstance(states, list) else tuple(found)


def _in_place(prefill: Prefill, hidden: Any) -> Any:
    for one in prefill.sets:
        rows = one.rows
        if rows is None or not isinstance(hidden, Tensor) or hidden.ndim != 3:
            continue
        if hidden.shape[:2] == rows.shape:
            full = hidden.new_zeros(hidden.shape[0], prefill.length, hidden.shape[-1])
            return full.scatter(1, rows[..., None].expand_as(hidden), hidden)
    return hidden


def all_kept(prefill: Prefill, batch: int) -> tuple[Choice, ...]:
    """Choices that keep every token at every cut, for caches that were shortened before."""
    everything = prefill.index.tokens.expand(batch, -1)
    return (Choice(everything),) * (len(prefill.sets) - 1)
