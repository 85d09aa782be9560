"""Visual tokens whose own rows the caller reads: they stay, and take their places of the budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vla_pruner.core import refusals
from vla_pruner.core.arguments import take
from vla_pruner.core.tokens import Prefill
from vla_pruner.methods.base import Choice, Evidence, Method


def choose_beside(
    ask: Callable[[Evidence], Choice],
    evidence: Evidence,
    prefill: Prefill,
    method: Method,
    cuts: int,
) -> Choice:
    """What a method chooses of the others, joined with the tokens that stay anyway.

    The method sees these, too, as what it cannot choose: grids and numbers of tokens stay as they
    are.

    Args:
        ask: what it chooses of some evidence.
        evidence: of all tokens that are left at this cut.
        prefill: whose layout says which stay (`Layout.read`).
        method: that is asked.
        cuts: how often it cuts.
    """
    tokens, read, taken = evidence.tokens, prefill.index.read, len(prefill.layout.read)
    assert tokens is not None and read is not None and evidence.keep_count is not None
    if len(evidence.views) > 1 and method.budget == "view" and cuts > 1:
        raise refusals.read_under_views(method.name)
    stays = read.expand(len(tokens), -1).gather(1, tokens)
    count = max(evidence.keep_count - taken, 0)
    others = replace(evidence, valid=except_for(stays, evidence.valid), keep_count=count)
    return _joined(Choice(tokens[:, :0]) if count == 0 else ask(others), stays, taken)


def except_for(stays: Tensor | None, valid: Tensor | None) -> Tensor | None:
    """Tokens `[B|1, m]` bool that are there to be chosen; None: all are."""
    if stays is None:
        return valid
    return ~stays if valid is None else valid & ~stays


def _joined(choice: Choice, stays: Tensor, taken: int) -> Choice:
    """A choice, and the `taken` tokens of each row that stay anyway, `[B, m]` bool.

    Where a method has chosen one of these itself, the first of the others takes its place.
    """
    chosen, size = choice.kept, stays.shape[1]
    rank = (2 * stays.int()).scatter_add(1, chosen, torch.ones_like(chosen, dtype=torch.int32))
    order = rank.sort(dim=1, descending=True, stable=True).indices
    kept = order[:, : min(chosen.shape[1] + taken, size)].sort(dim=1).values
    if choice.merge is None:
        return Choice(kept)
    alone = torch.eye(size, dtype=choice.merge.dtype, device=kept.device).expand(len(kept), -1, -1)
    merge = alone.scatter(1, chosen[..., None].expand_as(choice.merge), choice.merge)
    return Choice(kept, take(torch.where(stays[..., None], alone, merge), kept, dim=1))


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
