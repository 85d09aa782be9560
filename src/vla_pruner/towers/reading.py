"""What the patches of an image receive in a vision tower's own attention, read as it runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vla_pruner.core.hooks import after
from vla_pruner.pruning.scores import attention_column_mean

_MOST_CALLS = 64


@dataclass(frozen=True, eq=False)
class Tower:
    """One vision tower whose patches are the visual tokens, one for one and in their order.

    Args:
        name: for people.
        attentions: self-attentions of its layers, first to last, up to the one whose features the
            decoder gets. Each has `qkv`, or `q_proj` and `k_proj`, and `heads` or `num_heads`, and
            neither positions nor masks within.
        prefix: tokens before the patches: class and register tokens.
    """

    name: str
    attentions: tuple[nn.Module, ...]
    prefix: int = 0


@dataclass(eq=False)
class TowerScores:
    """Listens to some layers of one tower: mean attention over all heads and all rows.

    A tower may run once per call, over all cameras, or once per camera. What its last calls gave
    is kept until `take` fetches it.
    """

    tower: Tower
    layers: Sequence[int]
    calls: dict[int, deque[Tensor]] = field(default_factory=dict)

    def attach(self, undo: ExitStack) -> None:
        """Install the hooks.

        Raises:
            TypeError: an attention that is built otherwise.
        """
        for layer in self.layers:
            self.calls[layer] = deque(maxlen=_MOST_CALLS)
            attention = self.tower.attentions[layer]
            heads = _heads(attention)
            scale = getattr(attention, "scale", None)
            halves: dict[str, Tensor] = {}
            if isinstance(getattr(attention, "qkv", None), nn.Module):
                parts = {"qkv": attention.qkv}
            else:
                parts = {"q": attention.q_proj, "k": attention.k_proj}
            for name, part in parts.items():
                hook = partial(self._see, layer, name, heads, scale, halves)
                after(part, hook, undo)  # type: ignore[arg-type]
        undo.callback(self.calls.clear)

    def _see(
        self,
        layer: int,
        name: str,
        heads: int,
        scale: float | None,
        halves: dict[str, Tensor],
        module: nn.Module,
        args: Any,
        kwargs: Any,
        output: Tensor,
    ) -> None:
        output = output.detach()
        if name == "qkv":
            query, key, _ = output.unflatten(-1, (3, heads, -1)).unbind(2)
        else:
            halves[name] = output.unflatten(-1, (heads, -1))
            if len(halves) < 2:
                return
            query, key = halves.pop("q"), halves.pop("k")
        query, key = query.transpose(1, 2), key.transpose(1, 2)  # [n, H, tokens, d]
        columns = torch.arange(self.tower.prefix, key.shape[2], device=key.device)[None]
        scale = query.shape[3] ** -0.5 if scale is None else float(scale)
        self.calls[layer].append(attention_column_mean(query, key, columns, scale=scale))

    def take(self, rows: int, tokens: int) -> dict[int, Tensor]:
        """What each layer's last calls gave, `[rows, tokens]` fp32, and forget it.

        Raises:
            ValueError: the tower did not run, or its patches are not the visual tokens.
        """
        found = {}
        for layer, calls in self.calls.items():
            parts: list[Tensor] = []
            # Rows may share an image: samples of one prompt, beams.
            while calls and sum(part.numel() for part in parts) < rows * tokens:
                parts.insert(0, calls.pop())
            calls.clear()
            found[layer] = self._joined(parts, rows, tokens)
        return found

    def _joined(self, parts: list[Tensor], rows: int, tokens: int) -> Tensor:
        if parts:
            shown = {len(part) for part in parts}
            joined = torch.cat(parts, dim=1) if len(shown) == 1 else parts[0][:0, 0]
            if len(parts) == 1 and joined.numel() % tokens == 0:
                joined = joined.reshape(-1, tokens)  # all cameras of a row in one call
            if joined.shape[1:] == (tokens,) and len(joined) and rows % len(joined) == 0:
                return joined.repeat_interleave(rows // len(joined), dim=0)
        seen = ", ".join(f"{len(part)} images of {part.shape[1]} patches" for part in parts)
        raise ValueError(
            f"{rows} rows hold {tokens} visual tokens each, and the vision tower "
            f"{self.tower.name!r} showed {seen or 'nothing'} since the last step; it has to run in "
            "each call, and each of its patches has to become one visual token. Use a method that "
            "does not read the tower."
        )


def _heads(attention: Any) -> int:
    """Heads of an attention, after a look at what is in it."""
    heads = getattr(attention, "heads", None) or getattr(attention, "num_heads", None)
    fused = isinstance(getattr(attention, "qkv", None), nn.Module)
    split = all(isinstance(getattr(attention, n, None), nn.Module) for n in ("q_proj", "k_proj"))
    other = [
        name
        for name in ("q_norm", "k_norm", "rope", "rotary_emb")
        if not isinstance(getattr(attention, name, None), nn.Identity | None)
    ]
    if not isinstance(heads, int) or not (fused or split) or other:
        found = f"it also has {', '.join(other)}" if other else "something is missing"
        raise TypeError(
            f"{type(attention).__name__} of the vision tower is not built as expected (`qkv`, or "
            f"`q_proj` and `k_proj`, and a number of heads; nothing between them and the softmax): "
            f"{found}. Use a method that does not read the tower."
        )
    return heads
