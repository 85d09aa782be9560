"""The independent reference: an un-pruned model whose later layers cannot see some columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def hidden_behind(decoder: nn.Module, cut: int, columns: Sequence[Tensor]) -> Iterator[None]:
    """Layers `cut` and later do not see `columns`, absolute positions of each row's sequence.

    A query that would see nothing at all sees itself. Nothing of vla_pruner is used.
    """

    def narrow(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        queries = hidden.shape[1]
        cache = kwargs.get("cache", kwargs.get("past_key_values"))  # Since transformers 5.24.
        past = 0 if cache is None else int(cache.get_seq_length(layer.self_attn.layer_idx))
        given = kwargs.get("attention_mask")
        keys = past + queries if given is None else given.shape[-1]
        if given is None:
            sees = torch.ones(1, 1, queries, keys, dtype=torch.bool).tril(keys - queries)
        else:
            sees = given if given.dtype == torch.bool else given == 0
        sees = sees.expand(hidden.shape[0], -1, -1, -1).clone()
        for row, gone in enumerate(columns):
            sees[row, :, :, gone[gone < keys]] = False
        sees |= ~sees.any(-1, keepdim=True)
        eager = layer.self_attn.config._attn_implementation == "eager"
        if eager or (given is not None and given.dtype != torch.bool):
            lowest = torch.finfo(hidden.dtype).min
            sees = torch.zeros(sees.shape, dtype=hidden.dtype).masked_fill(~sees, lowest)
        return args, {**kwargs, "attention_mask": sees}

    handles = [
        layer.register_forward_pre_hook(narrow, with_kwargs=True)
        for layer in list(decoder.layers)[cut:]  # type: ignore[arg-type, call-overload]
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def dropped(report: Any, is_visual: Tensor) -> list[Tensor]:
    """Positions of the visual tokens that a report says are gone; `is_visual` `[B, S]` bool."""
    return [
        row.nonzero()[:, 0][~kept]
        for row, kept in zip(is_visual, report.kept_mask.cpu(), strict=True)
    ]


def same(got: Tensor, expected: Tensor, rel: float = 1e-5) -> None:
    """Equal up to a share of the largest value."""
    size = float(expected.abs().max())
    assert size > 1e-3 and got.shape == expected.shape
    assert float((got - expected).abs().max()) <= rel * size
