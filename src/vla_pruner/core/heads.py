"""Queries and keys of a layer that is built like those of Llama."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def queries_and_keys(layer: nn.Module, given: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """See `Adapter.project`; `given` is the layer's attention."""
    attention: Any = given
    norm: Any = getattr(layer, "input_layernorm", None)
    if norm is None or not all(hasattr(attention, n) for n in ("q_proj", "k_proj", "head_dim")):
        raise NotImplementedError(
            f"{type(layer).__name__} has no input_layernorm, q_proj and k_proj, so its logits "
            "cannot be computed; override `Adapter.project`, or use a score of attention."
        )
    found, normed = [], norm(hidden)
    normed = normed[0] if isinstance(normed, tuple) else normed  # pi0's norms add a gate
    for name in ("q", "k"):
        heads = getattr(attention, f"{name}_proj")(normed)
        heads = heads.unflatten(-1, (-1, attention.head_dim))
        per_head_norm = getattr(attention, f"{name}_norm", None)
        heads = heads if per_head_norm is None else per_head_norm(heads)
        found.append(heads.transpose(1, 2))
    return found[0], found[1]
