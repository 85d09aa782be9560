"""The same reference for layers of any make: columns are hidden where torch takes a softmax."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class _Hides(TorchFunctionMode):
    """Softmax over keys, by itself or in a fused attention, without some of them."""

    def __init__(self, columns: Sequence[Tensor]) -> None:
        super().__init__()
        self.columns, self.inside, self.hits = columns, False, 0

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self.inside:
            return function(*args, **kwargs)
        if function is F.scaled_dot_product_attention:
            names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
            self.hits += 1
            return function(**self._fused({**dict(zip(names, args, strict=False)), **kwargs}))
        if function in (F.softmax, torch.softmax, Tensor.softmax) and args[0].ndim == 4:
            self.hits += 1
            return function(self._without(args[0]), *args[1:], **kwargs)
        return function(*args, **kwargs)

    def _fused(self, call: dict[str, Any]) -> dict[str, Any]:
        query, key, mask = call["query"], call["key"], call.get("attn_mask")
        shape = (query.shape[2], key.shape[2])
        if mask is None:
            mask = torch.ones(1, 1, *shape, dtype=torch.bool)
            mask = mask.tril() if call.get("is_causal") else mask
        if mask.dtype == torch.bool:
            lowest = torch.finfo(query.dtype).min
            mask = torch.zeros(mask.shape, dtype=query.dtype).masked_fill(~mask, lowest)
        mask = mask.expand(query.shape[0], *mask.shape[1:])
        return {**call, "attn_mask": self._without(mask), "is_causal": False}

    def _without(self, logits: Tensor) -> Tensor:
        """`[B, ..., N]` with each row's columns hidden."""
        logits = logits.clone()
        for row, gone in enumerate(self.columns):
            logits[row, ..., gone] = torch.finfo(logits.dtype).min
        return logits


@contextmanager
def hidden_in_softmax(
    layers: Sequence[nn.Module] | nn.ModuleList, cut: int, columns: Sequence[Tensor]
) -> Iterator[None]:
    """Layers `cut` and later do not see `columns`, absolute positions of each row's sequence."""
    mode = _Hides(columns)

    def enter(*_: Any) -> None:
        mode.inside = True

    def leave(*_: Any) -> None:
        mode.inside = False

    handles = [
        handle
        for layer in list(layers)[cut:]
        for handle in (layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave))
    ]
    try:
        with mode:
            yield
        assert mode.hits, "no softmax was seen: this reference says nothing"
    finally:
        for handle in handles:
            handle.remove()
