"""Scores that no attention shows: products of queries and keys that a layer is about to make."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vla_pruner.core.scores import votes
from vla_pruner.core.tokens import TokenSet
from vla_pruner.methods.base import ScoreSpec
from vla_pruner.pruning.received import logit_column_mean

if TYPE_CHECKING:
    from vla_pruner.core.cut import Cut


def project(cut: Cut, index: int, number: int, layer: nn.Module, args: Any, kwargs: Any) -> None:
    """Before a layer of a prefill: scores from its queries and keys, after `number` cuts."""
    prefill = cut.prefill
    if prefill is None or cut.phase != "prefill":
        return
    hidden, _ = cut.signatures[layer].bind(args, kwargs)
    left = prefill.sets[0 if prefill.mode == "full" else number]
    for reading in cut.plan.readings:
        spec = reading.spec
        if spec.kind != "logits" or spec.layer != index or reading.cuts != number:
            continue
        if reading.number not in prefill.scores:
            prefill.scores[reading.number] = _logits(spec, cut, layer, hidden, left)


def _logits(spec: ScoreSpec, cut: Cut, layer: nn.Module, hidden: Tensor, left: TokenSet) -> Tensor:
    """Score `[B, M]` from the products of queries and keys that `layer` makes of `hidden`."""
    query, key = cut.adapter.project(layer, hidden)
    prefill, batch = cut.prefill, hidden.shape[0]
    assert prefill is not None and left.columns is not None and left.tokens is not None
    everywhere = hidden.new_zeros(batch, prefill.layout.visual.shape[1], dtype=torch.float32)
    if left.columns.shape[1] == 0:
        return everywhere
    index = left.columns.expand(batch, -1)[:, None, :, None]
    rows, weight = votes(spec, prefill, left, hidden)
    attention = cut.adapter.attention(layer)
    score = logit_column_mean(
        query,
        key.gather(2, index.expand(-1, key.shape[1], -1, key.shape[3])),
        scale=getattr(attention, "scaling", query.shape[-1] ** -0.5),
        rows=rows,
        row_weight=weight,
        heads=spec.heads,
    )
    return everywhere.scatter(1, left.tokens.expand(batch, -1), score)
