"""Hidden states of what a decoder is asked: the instruction, and action queries of the prefill."""

from __future__ import annotations

import torch
from torch import Tensor

from vla_pruner.core.arguments import take
from vla_pruner.core.scores import action_rows, place
from vla_pruner.core.tokens import Prefill, TokenSet


def guides(prefill: Prefill, left: TokenSet, hidden: Tensor) -> dict[str, Tensor]:
    """`Evidence.guides` and `guides_valid`, from `hidden` `[B, n, D]`."""
    index, batch = prefill.index, hidden.shape[0]
    assert index.text_rows is not None and index.text_valid is not None
    text = place(left, index.text_rows.expand(batch, -1))
    assert text is not None
    found, valid = [take(hidden, text, dim=1)], [index.text_valid.expand(batch, -1)]
    if prefill.layout.action_rows is not None:
        found.append(hidden[:, action_rows(prefill, left)])
        valid.append(valid[0].new_ones(found[1].shape[:2]))
    return {"guides": torch.cat(found, dim=1), "guides_valid": torch.cat(valid, dim=1)}
