"""Scores that no attention shows: products of queries and keys that a layer is about to make."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from vla_pruner.core.layout import Adapter
from vla_pruner.core.scores import votes
from vla_pruner.core.tokens import Prefill, TokenSet
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
            score = logits(spec, cut.adapter, layer, hidden, prefill, left)
            prefill.scores[reading.number] = score


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
    assert left.columns is not None
    columns = left.columns.expand(hidden.shape[0], -1)
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
