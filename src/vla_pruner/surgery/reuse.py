"""Hooks that put keys and values of the last step in the place of tokens that leave.

A reused token leaves the hidden states before one of the cut layers. From there on the attention of
all others still sees its key and value: those of the last step, at the token's own place. A cache
then holds every token in every layer, so that decoding needs no help at all.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vla_pruner.methods.base import ScoreSpec
from vla_pruner.pruning.entropy import attention_entropy
from vla_pruner.surgery import arguments, probe, readings
from vla_pruner.surgery.arguments import take
from vla_pruner.surgery.cut import Cut, hidden_states
from vla_pruner.surgery.memory import Recalled
from vla_pruner.surgery.prompt import Prompt, Stage


class Reusing(Cut):
    """The hooks of a method that recalls: a `Cut` whose tokens stay visible."""

    def attach(self, undo: ExitStack) -> None:
        """Install the hooks; `undo` takes them away."""
        for index, layer in enumerate(self.layers):
            attention = self._attention(index)
            name = probe.implementation(attention)
            if name not in ("sdpa", "eager"):
                raise NotImplementedError(
                    f"method {self.method.name!r} needs masks that say what each query sees; load "
                    f'the model with attn_implementation="sdpa" or "eager", not {name!r}.'
                )
            self.eager = name == "eager"
            probe.install(attention, partial(self._observe, index), undo)
            if index >= self.plan.cuts[0]:
                hook = partial(self._enter, index)
                undo.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
        undo.callback(self.layers[-1].register_forward_hook(self._restore_length).remove)

    def _enter(
        self, index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Before a layer: let tokens leave, and hand it a cache that knows their keys."""
        prompt = self.prompt
        if prompt is None or self.phase != "prefill":
            return None
        number = self.plan.stage(index)
        stage, hidden = prompt.stages[number], hidden_states(args, kwargs)
        if index in self.plan.cuts and stage.positions is not None:
            arguments.refuse_unknown(kwargs, prompt.length)
            before = prompt.stages[number - 1].positions
            stay = stage.positions
            hidden = take(
                hidden, stay if before is None else torch.searchsorted(before, stay), dim=1
            )
            mask = kwargs.get("attention_mask")
            if mask is None:
                mask = self._implied_mask(number, hidden, kwargs, queries=prompt.length)
            stage.overrides = arguments.queried(kwargs, stay, prompt.length, mask)
        exchange = partial(self._exchange, index, prompt, stage)
        cache = _Store(kwargs.get("past_key_values"), exchange)
        kwargs = {**kwargs, **stage.overrides, "past_key_values": cache}
        if args:
            return (hidden, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden}

    def _exchange(
        self, index: int, prompt: Prompt, stage: Stage, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, Hkv, n, D]` of what a layer computes, to those of all S tokens."""
        visual = prompt.layout.visual.expand(key.shape[0], -1)
        fresh = []
        for computed in (key, value):
            if stage.positions is not None:
                shape = (*computed.shape[:2], prompt.length, computed.shape[3])
                where = _over(stage.positions, computed)
                computed = computed.new_zeros(shape).scatter(2, where, computed)
            fresh.append(computed)
        seen = [take(every, visual, dim=2) for every in fresh]
        if stage.reused is not None and prompt.recalled is not None:
            old = prompt.recalled.keys_values(index)
            gone = stage.reused[:, None, :, None]
            seen = [torch.where(gone, o, s) for o, s in zip(old, seen, strict=True)]
            fresh = [f.scatter(2, _over(visual, s), s) for f, s in zip(fresh, seen, strict=True)]
        if prompt.record is not None:
            prompt.record.keys[index] = seen[0].detach()
            prompt.record.values[index] = seen[1].detach()
        return fresh[0], fresh[1]

    def _restore_length(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """After the last layer of a prefill from which tokens left: every token in its row."""
        prompt = self.prompt
        if prompt is None or prompt.stages[-1].positions is None:
            return None
        return super()._restore_length(layer, args, output)

    def _observe(
        self,
        index: int,
        attention: nn.Module,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        kwargs: dict[str, Any],
    ) -> None:
        """After a layer's attention in a prefill: what the next step wants to know of it."""
        prompt = self.prompt
        record = None if prompt is None else prompt.record
        if prompt is None or record is None or self.phase != "prefill":
            return
        if index >= self.plan.cuts[0] and index not in record.keys:
            raise NotImplementedError(
                f"{type(attention).__name__} does not show its keys to `past_key_values.update`, "
                f"which method {self.method.name!r} relies on; use another method."
            )
        stage = prompt.stages[self.plan.stage(index)]
        causal = self._is_causal(attention, mask, query.shape[2], kwargs)
        seen = readings.Seen.of(attention, query, key, mask, kwargs, prefill=True, causal=causal)
        record.entropy[index] = attention_entropy(
            seen.query,
            seen.key,
            scale=seen.scale,
            mask=seen.mask,
            causal=seen.causal,
            softcap=seen.softcap,
            row_weight=_computed(prompt, stage, query),
        )
        if index == self.method.recalled_layer(self.plan.depth):
            rows, weight = readings.votes(ScoreSpec(layer=index, rows="text"), prompt, stage, query)
            visual = prompt.layout.visual.expand(query.shape[0], -1)
            record.relevance = seen.received(visual, rows, weight)


class _Store:
    """Stands before a cache, or before none, while one layer writes to it."""

    def __init__(
        self, cache: Any, exchange: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    ) -> None:
        self._cache = cache
        self._exchange = exchange

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As `transformers.Cache.update`."""
        key, value = self._exchange(key, value)
        return (
            (key, value) if self._cache is None else self._cache.update(key, value, *args, **kwargs)
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def fill_in(prompt: Prompt, recalled: Recalled, batch: int, *, drop: bool) -> None:
    """Say in each stage of a prefill whose keys are recalled, and who is computed.

    Rows may differ in how many tokens they reuse. As many leave as in the row that reuses fewest;
    what else a row reuses is computed, and its keys and values are not used.

    Args:
        prompt: with stages to be filled in.
        recalled: what is reused.
        batch: B.
        drop: False: none leaves; only keys and values are exchanged.
    """
    prompt.recalled = recalled
    order, counts = recalled.reuse.order, recalled.reuse.counts
    rank = order.argsort(dim=1)
    visual = prompt.layout.visual.expand(batch, -1)
    others = prompt.places.others.expand(batch, -1)
    for number, stage in enumerate(prompt.stages[1:]):
        leaving = counts[:, number]
        stage.reused = rank < leaving[:, None]
        gone = int(leaving.min()) if drop else 0
        stage.tokens = order[:, gone:].sort(dim=1).values
        stage.columns = visual.gather(1, stage.tokens)
        stage.views = (stage.tokens.shape[1],)
        if gone:
            stage.positions = torch.cat([others, stage.columns], dim=1).sort(dim=1).values
            stage.columns = torch.searchsorted(stage.positions, stage.columns)


def _over(index: Tensor, like: Tensor) -> Tensor:
    """`index` `[B, n]` for every head and channel of `like` `[B, H, ..., D]`."""
    return index[:, None, :, None].expand(-1, like.shape[1], -1, like.shape[3])


def _computed(prompt: Prompt, stage: Stage, like: Tensor) -> Tensor:
    """Weight of each computed row `[B, n]`: 0 for padding, and for what is computed in vain."""
    layout = prompt.layout
    batch, valid = like.shape[0], layout.valid_rows
    weight = torch.ones(batch, prompt.length, dtype=torch.float32, device=like.device)
    if valid is not None:
        weight = weight * (valid > 0)
    if stage.reused is not None:
        visual = layout.visual.expand(batch, -1)
        weight = weight.scatter(1, visual, weight.gather(1, visual) * ~stage.reused)
    return weight if stage.positions is None else weight.gather(1, stage.positions)
