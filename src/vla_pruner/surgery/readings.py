"""Scores of visual tokens, read from queries and keys while a decoder runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vla_pruner.methods.base import ScoreSpec
from vla_pruner.pruning.received import attention_column_max, logit_column_mean
from vla_pruner.pruning.scores import attention_column_mean, attention_rows
from vla_pruner.surgery.arguments import take
from vla_pruner.surgery.layout import Adapter
from vla_pruner.surgery.prompt import Prompt, Stage

Voting = slice | Tensor | None
"""Query rows: a slice, `[B, R]`, or None for the last one."""


@dataclass(frozen=True, eq=False)
class Seen:
    """Queries and keys of one attention as its kernel saw them, Q rows and N keys."""

    query: Tensor
    key: Tensor
    mask: Tensor | None
    causal: bool
    scale: float
    softcap: float | None

    @staticmethod
    def of(
        attention: nn.Module,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        kwargs: Mapping[str, Any],
        *,
        prefill: bool,
        causal: bool,
    ) -> Seen:
        """From what an attention function gets; `causal`: it hides the future by itself."""
        if mask is None:
            if prefill:
                key = key[:, :, : query.shape[2]]  # A static cache also shows slots not written yet
        elif mask.ndim == 2:
            mask = mask[:, None, None, : key.shape[2]].bool()
        else:
            mask = mask[..., : key.shape[2]]
            if mask.stride(2) == 0:
                mask = mask[:, :, :1]  # One row, shown for all of them.
        scale = kwargs.get("scaling")
        if scale is None:
            scale = getattr(attention, "scaling", query.shape[-1] ** -0.5)
        return Seen(query, key, mask, causal, scale, kwargs.get("softcap"))

    def received(
        self,
        columns: Tensor,
        rows: Voting,
        row_weight: Tensor | None = None,
        heads: str = "mean",
    ) -> Tensor:
        """Attention that `columns` `[B, m]` get from `rows`: `[B, m]` fp32."""
        if columns.shape[1] == 0:
            return columns.float()
        options: dict[str, Any] = {"scale": self.scale, "softcap": self.softcap}
        if rows is None:
            # The last row has no future to hide, and one row takes few operations.
            mask = None if self.mask is None else self.mask[:, :, -1:]
            last = attention_rows(self.query[:, :, -1:], self.key, mask=mask, **options)[:, :, 0]
            return (last.mean(1) if heads == "mean" else last.amax(1)).gather(1, columns)
        mean = attention_column_mean if heads == "mean" else attention_column_max
        return mean(
            self.query,
            self.key,
            columns,
            mask=self.mask,
            causal=self.causal,
            rows=rows,
            row_weight=row_weight,
            **options,
        )


def logits(
    spec: ScoreSpec,
    adapter: Adapter,
    layer: nn.Module,
    hidden: Tensor,
    prompt: Prompt,
    stage: Stage,
) -> Tensor:
    """Score `[B, m]` from the products of queries and keys that `layer` makes of `hidden`."""
    query, key = adapter.project(layer, hidden)
    columns = _columns(prompt, stage, hidden.shape[0])
    if columns.shape[1] == 0:
        return columns.float()
    index = columns[:, None, :, None].expand(-1, key.shape[1], -1, key.shape[3])
    rows, weight = votes(spec, prompt, stage, hidden)
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
    spec: ScoreSpec, prompt: Prompt, stage: Stage, like: Tensor
) -> tuple[Voting, Tensor | None]:
    """Query rows that vote in a stage, and their weights `[B, n]`; `like` `[B, ..., ...]`."""
    batch, length = like.shape[0], prompt.length
    if stage.positions is not None:
        length = stage.positions.shape[1]
    if spec.rows == "last":
        return place(stage, prompt.places.last_row), None
    if spec.rows == "all":
        return slice(None), _real(prompt, stage)
    if spec.rows == "visual":
        rows, valid = _columns(prompt, stage, batch), prompt.layout.visual_valid
        if valid is None:
            return rows, None
        weight = valid.expand(batch, -1)
        assert stage.tokens is not None
        weight = weight.gather(1, stage.tokens.expand(batch, -1)).float()
    else:
        assert prompt.places.text_rows is not None and prompt.places.text_valid is not None
        text = place(stage, prompt.places.text_rows.expand(batch, -1))
        assert text is not None
        rows = text
        weight = prompt.places.text_valid.expand(batch, -1).float()
        if spec.rows == "voters":
            assert prompt.voters is not None
            weight = weight * prompt.voters.float()
    # Padded entries share a row with another; adding leaves the other's weight alone.
    whole = torch.zeros(batch, length, dtype=torch.float32, device=like.device)
    whole = whole.scatter_add(1, rows, weight)
    return rows, whole


def spread(prompt: Prompt, stage: Stage, score: Tensor) -> Tensor:
    """A score `[B, m]` of a stage's tokens at their places among all: `[B, M]`, 0 elsewhere."""
    assert stage.tokens is not None
    everything = score.new_zeros(score.shape[0], prompt.layout.visual.shape[1])
    return everything.scatter(1, stage.tokens.expand(score.shape[0], -1), score)


def place(stage: Stage, rows: Tensor | None) -> Tensor | None:
    """Where rows of the prefill `[B, R]` that no cut removes are in a stage."""
    if rows is None or stage.positions is None:
        return rows
    rows = rows.expand(stage.positions.shape[0], -1).contiguous()
    return torch.searchsorted(stage.positions, rows)


def visual_tokens(prompt: Prompt, stage: Stage, hidden: Tensor) -> Tensor:
    """`[B, m, D]` of a stage's visual tokens."""
    return take(hidden, _columns(prompt, stage, hidden.shape[0]), dim=1)


def _columns(prompt: Prompt, stage: Stage, batch: int) -> Tensor:
    assert stage.columns is not None
    return stage.columns.expand(batch, -1)


def _real(prompt: Prompt, stage: Stage) -> Tensor | None:
    """Weights of all rows `[B, n]`: 0 for padding and for tokens that an earlier cut hid."""
    valid = prompt.layout.valid_rows
    if stage.positions is not None:
        return None if valid is None else take(valid, stage.positions, dim=1)
    if stage.present is None:
        return valid
    return stage.present.float() if valid is None else valid * stage.present
