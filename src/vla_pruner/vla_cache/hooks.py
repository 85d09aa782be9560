"""Hooks that put keys and values of the last step in the place of tokens that leave.

A reused token leaves the hidden states before one of the cut layers. From there on the attention of
all others still sees its key and value: those of the last step, at the token's own place. A cache
then holds every token in every layer, so that decoding needs no help at all.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vla_pruner.baselines.entropy import attention_entropy
from vla_pruner.core import refusals, scores
from vla_pruner.core.arguments import cache_in, refuse_unknown, take, take_rotary
from vla_pruner.core.cut import Cut, alike
from vla_pruner.core.episodes import Step
from vla_pruner.core.hiding import implied_mask
from vla_pruner.core.hooks import after, before, implementation
from vla_pruner.core.layout import Adapter
from vla_pruner.core.read_tokens import except_for
from vla_pruner.core.tokens import Mode, Prefill, TokenSet
from vla_pruner.methods.base import ScoreSpec
from vla_pruner.vla_cache.memory import Memories, Recalled, Record

if TYPE_CHECKING:
    from vla_pruner.vla_cache.method import VLACache


@dataclass(eq=False)
class Note:
    """What a prefill uses of the last step, and what the next one will know of it."""

    record: Record | None
    recalled: Recalled | None


class ReuseHooks(Cut):
    """The hooks of a method that recalls: a `Cut` whose tokens stay visible."""

    def __init__(self, adapter: Adapter, method: VLACache) -> None:
        super().__init__(adapter, method)
        self.recalled_layer = method.recalled_layer(self.plan.depth)
        self.memories = Memories(method.reuse, self.plan)

    def attach(self, undo: ExitStack) -> None:
        """Install the hooks; `undo` takes them away."""
        every = [self.attention(index) for index in range(len(self.layers))]
        refusals.refuse_shared(every, "the attentions of layers", range(len(every)))
        for index, (layer, attention) in enumerate(zip(self.layers, every, strict=True)):
            before(layer, partial(self._enters, index), undo)
            name = implementation(attention)
            if name not in ("sdpa", "eager"):
                raise NotImplementedError(
                    f"method {self.method.name!r} needs masks that say what each query sees; load "
                    f'the model with attn_implementation="sdpa" or "eager", not {name!r}.'
                )
            self.eager = name == "eager"
            scores.watch(attention, partial(self._observe, index), undo)
            if index >= self.plan.cuts[0]:
                before(layer, partial(self._recall, index), undo)
        after(self.layers[-1], self._restore_length, undo)

    # ------------------------------------------------------------------ steps
    def begin(
        self, step: Step, mode: Mode, frames: Tensor | None, kwargs: Mapping[str, Any]
    ) -> Mode | None:
        """Look up what each row recalls; rows without a memory compute everything."""
        prefill, ids = step.prefill, step.ids
        if prefill.past:
            raise NotImplementedError(
                f"method {self.method.name!r} does not follow an image that continues a cache; "
                "give the whole prompt at once, or use another method."
            )
        layout, batch = prefill.layout, len(ids)
        record = self.memories.open(frames, layout, batch, prefill.length, kwargs)
        free = except_for(prefill.index.read, layout.visual_valid)
        recalled = self.memories.recall(ids, record, layout, free, [not row for row in step.full])
        step.full = (True,) * batch
        prefill.note = Note(record, recalled)
        if recalled is None:
            return "full"
        step.full = tuple(memory is None for memory in recalled.memories)
        fill_in(prefill, recalled, batch, drop=mode == "drop")
        return mode

    def again(self, prefill: Prefill, first: Prefill) -> None:
        """Another prefill of the step uses the same tokens of the last one."""
        recalled = first.note.recalled
        prefill.note = Note(None, recalled)
        if recalled is not None:
            batch = len(recalled.memories)
            fill_in(prefill, recalled, batch, drop=first.mode == "drop")

    def end(self, step: Step) -> None:
        """The next step will recall this prefill."""
        note = step.prefill.note
        if note.record is not None:
            for index in range(self.plan.depth):
                if index not in note.record.entropy:
                    raise refusals.unseen(index, self.attention(index))
            self.memories.close(step, note.record)
            note.record = None

    def forget(self, ids: tuple[Hashable, ...] | None) -> None:
        """These episodes are over, or all."""
        self.memories.reset(ids)

    def keys_per_layer(self, prefill: Prefill, computed: tuple[int, ...]) -> tuple[int, ...]:
        """Every layer sees the keys of all tokens."""
        return (prefill.length,) * len(computed)

    def reused(self, prefill: Prefill, batch: int) -> Tensor | None:
        """`[B, T]` tokens of each row that are recalled in each layer."""
        nothing = torch.zeros(batch, dtype=torch.int64, device=prefill.layout.visual.device)
        counts = [nothing if s.reused is None else s.reused.sum(dim=1) for s in prefill.sets]
        return torch.stack([counts[number] for number in self.plan.number], dim=1)

    # ------------------------------------------------------------------ hooks on layers
    def _recall(
        self, index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Before a layer: let tokens leave, and hand it a cache that knows their keys."""
        prefill = self.prefill
        if self.phase == "outside":
            raise refusals.past_hooks(self.adapter.decoder)
        if prefill is None or self.phase != "prefill":
            return None
        number = self.plan.number[index]
        left = prefill.sets[number]
        hidden, kwargs = self.signatures[layer].bind(args, kwargs)
        if index in self.plan.cuts and left.rows is not None:
            earlier, stay = prefill.sets[number - 1].rows, left.rows
            stay = stay if earlier is None else torch.searchsorted(earlier, stay)
            hidden = take(hidden, stay, dim=1)
        if left.rows is not None and not (left.given and alike(kwargs, left.given)):
            refuse_unknown(kwargs, prefill.length, type(layer).__name__)
            mask = kwargs.get("attention_mask")
            if mask is None:
                mask = implied_mask(self, number, hidden, kwargs, prefill.length, layer)
            left.given = kwargs
            left.arguments = _queried(kwargs, left.rows, prefill.length, mask)
        exchange = partial(self._exchange, index, prefill, left)
        cache = _Store(cache_in(kwargs), exchange)
        newer = "cache" in kwargs or "cache" in self.signatures[layer].names  # transformers 5.24
        name = "cache" if newer else "past_key_values"
        return (hidden,), {**kwargs, **left.arguments, name: cache}

    def _exchange(
        self, index: int, prefill: Prefill, left: TokenSet, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, Hkv, n, D]` of what a layer computes, to those of all S tokens."""
        note: Note = prefill.note
        visual = prefill.layout.visual.expand(key.shape[0], -1)
        fresh = []
        for computed in (key, value):
            if left.rows is not None:
                shape = (*computed.shape[:2], prefill.length, computed.shape[3])
                where = _over(left.rows, computed)
                computed = computed.new_zeros(shape).scatter(2, where, computed)
            fresh.append(computed)
        seen = [take(every, visual, dim=2) for every in fresh]
        if left.reused is not None and note.recalled is not None:
            old = note.recalled.keys_values(index)
            gone = left.reused[:, None, :, None]
            seen = [torch.where(gone, o.to(s.dtype), s) for o, s in zip(old, seen, strict=True)]
            fresh = [f.scatter(2, _over(visual, s), s) for f, s in zip(fresh, seen, strict=True)]
        if note.record is not None:
            note.record.keys[index] = seen[0].detach()
            note.record.values[index] = seen[1].detach()
        return fresh[0], fresh[1]

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
        prefill = self.prefill
        record = None if prefill is None else prefill.note.record
        if prefill is None or record is None or self.phase != "prefill":
            return
        if index >= self.plan.cuts[0] and index not in record.keys:
            raise NotImplementedError(
                f"{type(attention).__name__} does not show its keys to `past_key_values.update`, "
                f"which method {self.method.name!r} relies on; use another method."
            )
        left = prefill.sets[self.plan.number[index]]
        shown = (attention, query, key, mask, kwargs)
        seen = scores.see(self, shown, prefill.length)
        if seen.sinks is not None:
            raise NotImplementedError(
                f"{type(attention).__name__} has attention sinks, of which method "
                f"{self.method.name!r} knows no entropy; use another method."
            )
        record.entropy[index] = attention_entropy(
            seen.query,
            seen.key,
            scale=seen.scale,
            mask=seen.mask,
            causal=seen.causal,
            softcap=seen.softcap,
            row_weight=_computed(prefill, left, query),
        )
        if index == self.recalled_layer:
            spec = ScoreSpec(layer=index, rows="text")
            rows, weight = scores.votes(spec, prefill, left, query)
            visual = prefill.layout.visual.expand(query.shape[0], -1)
            record.relevance = scores.column_mean(seen, visual, rows, weight)


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


def fill_in(prefill: Prefill, recalled: Recalled, batch: int, *, drop: bool) -> None:
    """Say in each token set of a prefill whose keys are recalled, and who is computed.

    Rows may differ in how many tokens they reuse. As many leave as in the row that reuses fewest;
    what else a row reuses is computed, and its keys and values are not used.

    Args:
        prefill: with token sets to be filled in.
        recalled: what is reused.
        batch: B.
        drop: False: none leaves; only keys and values are exchanged.
    """
    order, counts = recalled.reuse.order, recalled.reuse.counts
    rank = order.argsort(dim=1)
    visual = prefill.layout.visual.expand(batch, -1)
    others = prefill.index.others.expand(batch, -1)
    for number, left in enumerate(prefill.sets[1:]):
        leaving = counts[:, number]
        left.reused = rank < leaving[:, None]
        gone = int(leaving.min()) if drop else 0
        left.tokens = order[:, gone:].sort(dim=1).values
        left.columns = visual.gather(1, left.tokens)
        left.views = (left.tokens.shape[1],)
        if gone:
            left.rows = torch.cat([others, left.columns], dim=1).sort(dim=1).values
            left.columns = torch.searchsorted(left.rows, left.columns)


def _queried(kwargs: Mapping[str, Any], rows: Tensor, length: int, mask: Tensor) -> dict[str, Any]:
    """Prefill arguments of n tokens that are computed and still see the keys of all `length`.

    Args:
        kwargs: what the layers get.
        rows: `[B, n]` of the prefill.
        length: of the prefill.
        mask: `[B|1, 1|H, length|1, N]`.
    """
    if mask.ndim != 4:
        raise NotImplementedError(
            "using keys of the last step again needs a mask that says what each query sees; got "
            f'{tuple(mask.shape)}. Load the model with attn_implementation="sdpa" or "eager".'
        )
    if mask.shape[2] == length:
        mask = take(mask, rows, dim=2)
    found: dict[str, Any] = {"attention_mask": mask}
    rotary = kwargs.get("position_embeddings")
    if rotary is not None:
        found["position_embeddings"] = take_rotary(rotary, rows)
    if kwargs.get("position_ids") is not None:
        # With rotary tables at hand, ids with gaps only mislead.
        ids = kwargs["position_ids"]
        found["position_ids"] = None if rotary is not None else take(ids, rows, dim=-1)
    return found


def _over(index: Tensor, like: Tensor) -> Tensor:
    """`index` `[B, n]` for every head and channel of `like` `[B, H, ..., D]`."""
    return index[:, None, :, None].expand(-1, like.shape[1], -1, like.shape[3])


def _computed(prefill: Prefill, left: TokenSet, like: Tensor) -> Tensor:
    """Weight of each computed row `[B, n]`: 0 for padding, and for what is computed in vain."""
    layout = prefill.layout
    batch, valid = like.shape[0], layout.valid_rows
    weight = torch.ones(batch, prefill.length, dtype=torch.float32, device=like.device)
    if valid is not None:
        weight = weight * (valid > 0)
    if left.reused is not None:
        visual = layout.visual.expand(batch, -1)
        weight = weight.scatter(1, visual, weight.gather(1, visual) * ~left.reused)
    return weight if left.rows is None else weight.gather(1, left.rows)
