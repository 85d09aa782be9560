"""Hooks that take visual tokens out of a decoder stack before some of its layers.

Everything here works on tensors and can be compiled; `passes.py` decides, outside of the compiled
code, what each pass is. `plan.py` says where, `arguments.py` how layers are called behind a cut,
`scores.py` what is read on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from contextlib import ExitStack
from functools import partial
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vla_pruner._flags import Flags
from vla_pruner.core import scores
from vla_pruner.core.arguments import (
    STRATEGIES,
    Call,
    Drop,
    Signature,
    cache_in,
    refuse_unknown,
    take,
)
from vla_pruner.core.cleanup import after, before, replace
from vla_pruner.core.episodes import Step
from vla_pruner.core.layout import Adapter
from vla_pruner.core.plan import make_plan
from vla_pruner.core.tokens import Mode, Prefill, TokenSet
from vla_pruner.methods.base import Choice, Evidence, Method


class Cut:
    """Hooks on one decoder; `phase` and `prefill` say what the pass in progress is."""

    def __init__(self, adapter: Adapter, method: Method) -> None:
        self.adapter = adapter
        self.method = method
        self.layers = list(adapter.layers)
        self.readers = list(adapter.reader_layers)
        self.plan = make_plan(method, adapter)
        self.signatures = {layer: Signature(layer) for layer in (*self.layers, *self.readers)}
        self.phase: Literal["prefill", "later"] = "later"
        self.prefill: Prefill | None = None
        self.static_cache = False
        self.eager = False
        self.flags = Flags()
        self.tuples = False  # Whether layers return tuples.
        self.projected = {r.spec.layer for r in self.plan.readings if r.spec.kind == "logits"}
        self.turning = {*self.plan.cuts, *self.projected}
        compact = method.positions == "compact"
        self.rotary = adapter.decoder.rotary_emb if compact and self.plan.cuts else None

    def attach(self, undo: ExitStack) -> None:
        """Install the hooks; `undo` takes them away."""
        plan = self.plan
        watched = {r.spec.layer for r in plan.readings if r.spec.kind == "attention"}
        projected = self.projected
        kernel = getattr(getattr(self._attention(0), "config", None), "_attn_implementation", None)
        self.eager = kernel == "eager"
        if kernel == "flex_attention" and plan.cuts:
            raise NotImplementedError(
                "flex_attention keeps its masks in blocks, which pruning cannot shorten; load the "
                'model with attn_implementation="sdpa" or "eager".'
            )
        acting = set(plan.action_layers)
        for index in sorted(watched if self.readers else watched | acting):
            scores.watch(self._attention(index), partial(scores.observe, self, index), undo)
        for index in sorted(acting) if self.readers else ():
            attention = self.adapter.attention(self.readers[index])
            scores.watch(attention, partial(scores.observe, self, index), undo)
        # Layer by layer, a reader follows what is done to the decoder.
        followers = [] if self.adapter.reads_output else self.readers
        for index in sorted(plan.skipped):
            for layers in [self.layers, followers] if followers else [self.layers]:
                self._skip(layers[index], undo)
        if plan.skipped:
            after(self.layers[0], self._see_output, undo)
        if not plan.cuts:
            return
        before(self.layers[0], self._see_input, undo)
        for index in range(plan.depth):
            if index >= plan.cuts[0] or index in projected:
                before(self.layers[index], partial(self._enter, index), undo)
            if followers and index >= plan.cuts[0]:
                before(followers[index], partial(self._enter, index), undo)
        if plan.cuts[0] == 0 and not self.readers:
            after(self.layers[0], self._fill_up, undo)
        after(self.layers[-1], self._restore_length, undo)

    def _attention(self, index: int) -> nn.Module:
        return self.adapter.attention(self.layers[index])

    # ------------------------------------------------------------------ for hooks of other methods
    def begin(
        self,
        prefill: Prefill,
        ids: tuple[Hashable, ...],
        full: list[bool],
        *,
        mode: Mode,
        frames: Tensor | None,
        kwargs: Mapping[str, Any],
    ) -> Mode | None:
        """A step begins with this prefill.

        Args:
            prefill: to be filled in.
            ids: episode of each row.
            full: rows that run on all tokens; may be changed.
            mode: what the session does with tokens that are not kept.
            frames: `[B, cameras, 3, H, W]` camera images, if there are any.
            kwargs: the decoder's arguments.

        Returns:
            What happens to tokens that are not kept; None: as the rows that are full ask for.
        """
        return None

    def again(self, prefill: Prefill, first: Prefill) -> None:
        """Another prefill of a step that began with `first`."""

    def end(self, step: Step) -> None:
        """The prefill of a step is through."""

    def forget(self, ids: tuple[Hashable, ...] | None) -> None:
        """These episodes are over, or all."""

    def keys_per_layer(self, prefill: Prefill, computed: tuple[int, ...]) -> tuple[int, ...]:
        """Keys that each layer's attention saw, given the tokens that it computed."""
        return computed

    def reused(self, prefill: Prefill, batch: int) -> Tensor | None:
        """`[B, T]` visual tokens whose keys were reused in each layer; None: nothing is reused."""
        return None

    # ------------------------------------------------------------------ layers that do not run
    def _skip(self, layer: nn.Module, undo: ExitStack) -> None:
        original: Callable[..., Any] = layer.forward

        def skipped(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.prefill is None:
                return original(hidden_states, *args, **kwargs)
            return (hidden_states,) if self.tuples else hidden_states

        replace(layer, "forward", skipped, undo)

    def _see_output(self, layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """After layer 0: what a layer has to return."""
        self.tuples = isinstance(output, tuple)
        if isinstance(output, tuple) and len(output) > 1:
            raise NotImplementedError(
                f"{type(layer).__name__} returns {len(output)} things, which a skipped layer "
                "cannot make up; use a method that skips none, or newer transformers."
            )

    # ------------------------------------------------------------------ hooks on layers
    def _see_input(self, layer: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
        """Before layer 0 of a prefill: embeddings that methods look at later."""
        prefill = self.prefill
        if prefill is None or self.phase != "prefill" or prefill.given is not None:
            return
        weighted = any(r.spec.rows == "weighted" for r in self.plan.readings)
        if prefill.mode == "full" and not weighted:
            return
        hidden = args[0] if args else self.signatures[layer].bind(args, kwargs)[0]
        index = prefill.index
        prefill.features = take(hidden, prefill.layout.visual, dim=1)
        if index.text_rows is not None and self.plan.needs_text:
            prefill.text = take(hidden, index.text_rows, dim=1)
        if weighted:
            assert prefill.text is not None and index.text_valid is not None
            valid = index.text_valid.expand(hidden.shape[0], -1)
            prefill.query_weights = self.method.query_weights(prefill.features, prefill.text, valid)

    def _enter(
        self, index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Before a layer: cut if it is time to, and give it the arguments of what is left."""
        prefill, number = self.prefill, self.plan.number[index]
        if prefill is None:
            return None
        arguments = prefill.sets[number].arguments
        if index in self.turning or len(args) > 1:
            return self._turn(index, prefill, layer, args, kwargs)
        if number == 0 or prefill.mode == "full" or not arguments:
            return None
        return args, {**kwargs, **arguments}

    def _turn(
        self,
        index: int,
        prefill: Prefill,
        layer: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Before a layer in which something happens: scores from its input, or a cut."""
        number, signature, phase = self.plan.number[index], self.signatures[layer], self.phase
        cuts_here = index in self.plan.cuts
        hidden = args[0] if len(args) == 1 else None
        if hidden is None or hidden.ndim != 3:
            hidden, kwargs = signature.bind(args, kwargs)
        if phase == "prefill":
            if index in self.projected and cuts_here:
                scores.project(self, index, number - 1, prefill, hidden)
            if cuts_here and prefill.mode != "full":
                hidden = self._cut(number, prefill, hidden, kwargs)
            if index in self.projected:
                scores.project(self, index, number, prefill, hidden)
        if number == 0 or prefill.mode == "full":
            return None
        left = prefill.sets[number]
        if cuts_here:
            call, strategy = self._call(number, hidden, kwargs), STRATEGIES[prefill.mode]
            make = strategy.in_prefill if phase == "prefill" else strategy.later
            left.arguments = make(call, prefill, left)
        arguments = left.arguments
        if index == 0 and phase == "later" and self._has_dead_slots(prefill):
            call = self._call(1, hidden, kwargs)
            arguments = Drop().first_layer_later(call, prefill, left)
        return signature.back(args, hidden, {**kwargs, **arguments})

    def _call(self, number: int, hidden: Tensor, kwargs: dict[str, Any]) -> Call:
        """How a layer after `number` cuts is called."""
        return Call(
            kwargs,
            hidden,
            partial(self._implied_mask, number, hidden, kwargs),
            self.static_cache,
            self.rotary,
        )

    def _has_dead_slots(self, prefill: Prefill) -> bool:
        if self.readers or prefill.mode != "drop":
            return False
        return prefill.length_at(1) < prefill.length

    def _fill_up(self, layer: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """After layer 0 of a prefill that was cut before it: dead slots in its cache.

        The decoder asks layer 0 how many tokens there were, so that positions continue.
        """
        prefill, cache = self.prefill, cache_in(kwargs)
        if prefill is None or self.phase != "prefill" or cache is None:
            return
        if not self._has_dead_slots(prefill):
            return
        n, keys = prefill.length_at(1), cache.layers[0].keys
        shape = (keys.shape[0], keys.shape[1], prefill.length - n)
        values = cache.layers[0].values
        slots = torch.arange(prefill.past + n, prefill.total, device=keys.device)
        # Ones: static caches of transformers 4 count slots that hold anything but zeros.
        cache.update(
            keys.new_ones(*shape, keys.shape[-1]),
            values.new_ones(*shape, values.shape[-1]),
            0,
            {"cache_position": slots},
        )

    def _restore_length(self, layer: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """After the last layer of a prefill: every token back in its row, zeros where one left."""
        prefill = self.prefill
        if prefill is None or self.phase != "prefill" or prefill.mode != "drop":
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        rows = prefill.sets[-1].rows
        if rows is None:
            return None
        index = rows[..., None].expand(-1, -1, hidden.shape[-1])
        full = hidden.new_zeros(hidden.shape[0], prefill.length, hidden.shape[-1])
        full = full.scatter(1, index, hidden)
        return (full, *output[1:]) if isinstance(output, tuple) else full

    # ------------------------------------------------------------------ a cut
    def _cut(
        self, number: int, prefill: Prefill, hidden: Tensor, kwargs: Mapping[str, Any]
    ) -> Tensor:
        """Cut for the `number`-th time, counting from 1: hidden states `[B, n, D]` that go on."""
        earlier, left = prefill.sets[number - 1], prefill.sets[number]
        if prefill.mode == "drop":
            refuse_unknown(kwargs, prefill.length, type(self.layers[0]).__name__)
        batch, device = hidden.shape[0], hidden.device
        assert earlier.tokens is not None
        tokens = earlier.tokens.expand(batch, -1)
        if prefill.given is not None:
            choice = prefill.given[number - 1]
        elif tokens.shape[1] == 0:
            choice = Choice(torch.zeros(batch, 0, dtype=torch.int64, device=device))
        else:
            choice = self._ask(number - 1, prefill, tokens, hidden)
        left.kept, left.merge = choice.kept, choice.merge
        left.tokens = tokens.gather(1, left.kept)
        if self.method.adaptive:
            left.views = (left.tokens.shape[1],)
        visual = prefill.layout.visual.expand(batch, -1).gather(1, left.tokens)
        STRATEGIES[prefill.mode].leave(prefill, visual, left, number)
        joined = self._merged(earlier, left, hidden)
        assert left.columns is not None
        if left.rows is not None:
            stay = left.rows
            if earlier.rows is not None:
                stay = torch.searchsorted(earlier.rows, stay)
            hidden = take(hidden, stay, dim=1)
        if joined is None:
            return hidden
        if prefill.full_rows is not None:
            alone = take(hidden, left.columns, dim=1)
            joined = torch.where(prefill.full_rows[:, None, None], alone, joined)
        return hidden.scatter(1, left.columns[..., None].expand_as(joined), joined)

    def _ask(self, number: int, prefill: Prefill, tokens: Tensor, hidden: Tensor) -> Choice:
        """What the method decides at cut `number`, from 0; tokens that are read stay anyway."""
        evidence = self._evidence(number, prefill, tokens, hidden)
        read, wanted = self._always(number, prefill, tokens)
        if read is not None:
            evidence = self._of_others(evidence, read, wanted, prefill.layout.read)
        if read is not None and evidence.keep_count == 0:
            chosen: Tensor | Choice = tokens.new_zeros(tokens.shape[0], 0)
        else:
            chosen = self._select(evidence)
        choice = chosen if isinstance(chosen, Choice) else Choice(chosen)
        self._check_choice(choice, number, evidence)
        if read is not None:
            choice = _with_read(choice, read, tokens.shape[1])
        if prefill.leader is None:
            return choice
        merge = choice.merge
        return Choice(
            choice.kept.index_select(0, prefill.leader),
            None if merge is None else merge.index_select(0, prefill.leader),
        )

    def _select(self, evidence: Evidence) -> Tensor | Choice:
        """What the method says; what is broken is noted where looking at it would mean waiting."""
        if torch.compiler.is_compiling():
            return self.method.select(evidence)
        with self.flags.collect():
            return self.method.select(evidence)

    def _evidence(self, number: int, prefill: Prefill, tokens: Tensor, hidden: Tensor) -> Evidence:
        layout, left = prefill.layout, prefill.sets[number]
        assert prefill.features is not None

        def of_left(whole: Tensor) -> Tensor:
            return whole if number == 0 else take(whole, tokens, dim=1)

        found = {}
        for name, reading in self.plan.asked[number].items():
            score = prefill.scores.get(reading)
            if score is None:
                self._refuse_unseen(self.plan.readings[reading].spec.layer)
            assert score is not None
            at = self.plan.readings[reading].cuts
            if at < number:
                score = scores.spread(prefill, prefill.sets[at], score).gather(1, tokens)
            found[name] = score
        text_valid = prefill.index.text_valid
        return Evidence(
            features=of_left(prefill.features),
            semantic=found.get("semantic"),
            forecast=None if prefill.forecast is None else of_left(prefill.forecast),
            views=left.views,
            layer=self.plan.cuts[number],
            valid=None if layout.visual_valid is None else of_left(layout.visual_valid),
            seeds=prefill.seeds,
            scores=found,
            hidden=take(hidden, _columns(left, hidden), dim=1),
            tokens=tokens,
            text=prefill.text,
            text_valid=None if text_valid is None else text_valid.expand(tokens.shape[0], -1),
            number=number,
            keep_count=min(prefill.counts[number], tokens.shape[1]),
        )

    def _refuse_unseen(self, index: int) -> None:
        attention = self._attention(index)
        raise NotImplementedError(
            f"the attention of layer {index} ({type(attention).__name__}) ran without showing its "
            "queries and keys, so that its score is missing; use a decoder whose attention is "
            "chosen by `config._attn_implementation`, or a method without scores (divprune, "
            "random). If something has replaced the layer since, attach vla-pruner last."
        )

    def _always(
        self, number: int, prefill: Prefill, tokens: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """Places among `tokens` of those that stay anyway `[B, R]`, and of the others."""
        read, free = prefill.index.read, prefill.index.free
        if read is None or free is None:
            return None, None
        batch = tokens.shape[0]
        if number == 0:
            return read.expand(batch, -1), free.expand(batch, -1)
        place = torch.searchsorted(tokens, read.expand(batch, -1).contiguous())
        stays = torch.zeros_like(tokens, dtype=torch.bool).scatter(1, place, True)
        rest = stays.int().sort(dim=1, stable=True).indices[:, : tokens.shape[1] - read.shape[1]]
        return place, rest

    def _of_others(
        self, evidence: Evidence, read: Tensor, rest: Tensor | None, always: tuple[int, ...]
    ) -> Evidence:
        """The evidence without tokens that stay anyway; they take their places of the budget."""
        assert rest is not None and evidence.keep_count is not None
        taken = read.shape[1]

        def part(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else take(tensor, rest, dim=1)

        features = part(evidence.features)
        assert features is not None
        views: tuple[int, ...] = (rest.shape[1],)
        if len(evidence.views) > 1 and self.method.budget == "view":
            if len(self.plan.cuts) > 1:
                raise NotImplementedError(
                    f"method {self.method.name!r} cuts several times with a budget per view, and a "
                    "visual token that the caller reads stays beside it, so that the shares do not "
                    'come out; use budget="global" for prompts that end with the image or have '
                    "labels behind it."
                )
            ends = list(accumulate(evidence.views))
            views = tuple(
                size - sum(end - size <= token < end for token in always)
                for size, end in zip(evidence.views, ends, strict=True)
            )
        return Evidence(
            features=features,
            semantic=part(evidence.semantic),
            forecast=part(evidence.forecast),
            views=views,
            layer=evidence.layer,
            valid=part(evidence.valid),
            seeds=evidence.seeds,
            scores={name: take(score, rest, dim=1) for name, score in evidence.scores.items()},
            hidden=part(evidence.hidden),
            tokens=part(evidence.tokens),
            text=evidence.text,
            text_valid=evidence.text_valid,
            number=evidence.number,
            keep_count=min(max(evidence.keep_count - taken, 0), rest.shape[1]),
        )

    def _check_choice(self, choice: Choice, number: int, evidence: Evidence) -> None:
        kept, merge, count = choice.kept, choice.merge, evidence.keep_count
        batch, size = evidence.features.shape[:2]
        right = kept.ndim == 2 and kept.shape[0] == batch
        if not right or (kept.shape[1] != count and not self.method.adaptive):
            raise ValueError(
                f"method {self.method.name!r} chose {tuple(kept.shape)} at cut {number}; expected "
                f"[B, k] = ({batch}, {count})."
            )
        if merge is not None and merge.shape != (*kept.shape, size):
            raise ValueError(
                f"method {self.method.name!r} gave merge {tuple(merge.shape)} at cut {number}; "
                f"expected [B, k, m] = {(*kept.shape, size)}."
            )

    def _merged(self, earlier: TokenSet, left: TokenSet, hidden: Tensor) -> Tensor | None:
        """Hidden states of the tokens that stay, `[B, k, D]`, where the choice changes them."""
        if left.merge is None:
            return None
        every = take(hidden, _columns(earlier, hidden), dim=1)
        with torch.autocast(hidden.device.type, enabled=False):
            return (left.merge.float() @ every.float()).to(hidden.dtype)

    def _implied_mask(
        self, number: int, hidden: Tensor, kwargs: Mapping[str, Any], queries: int | None = None
    ) -> Tensor:
        """What attention does when it gets no mask, as a mask `[1, 1, Q, N]`.

        Q is the length of `hidden`, or `queries`.
        """
        queries = hidden.shape[1] if queries is None else queries
        cache, index = cache_in(kwargs), self.plan.first[number]
        if index is None:  # No layer will look at it.
            return torch.ones(1, 1, queries, queries, dtype=torch.bool, device=hidden.device)
        keys = queries
        if cache is not None:
            held = _capacity(cache) if self.static_cache else cache.get_seq_length(index)
            keys = held if self.static_cache else queries + held
        mask = torch.ones(queries, keys, dtype=torch.bool, device=hidden.device)
        if scores.hides_future(self, self._attention(index), None, queries, kwargs):
            mask = mask.tril(0 if self.static_cache else keys - queries)
        elif self.static_cache:
            mask[:, queries:] = False
        if self.eager:
            additive = torch.zeros_like(mask, dtype=hidden.dtype)
            mask = additive.masked_fill(~mask, torch.finfo(hidden.dtype).min)
        return mask[None, None]


def all_kept(prefill: Prefill, batch: int) -> tuple[Choice, ...]:
    """Choices that keep every token at every cut, for caches that were shortened before."""
    everything = prefill.index.tokens.expand(batch, -1)
    return (Choice(everything),) * (len(prefill.sets) - 1)


def _with_read(choice: Choice, read: Tensor, size: int) -> Choice:
    """A choice among the others, joined with the tokens `[B, R]` that stay anyway."""
    batch, kept = read.shape[0], choice.kept
    stays = torch.zeros(batch, size, dtype=torch.bool, device=read.device).scatter(1, read, True)
    rest = stays.int().sort(dim=1, stable=True).indices[:, : size - read.shape[1]]
    chosen = rest.gather(1, kept)
    joined, order = torch.cat([chosen, read], dim=1).sort(dim=1)
    if choice.merge is None:
        return Choice(joined)
    merge = choice.merge
    whole = merge.new_zeros(batch, kept.shape[1], size)
    whole = whole.scatter(2, rest[:, None].expand(-1, kept.shape[1], -1), merge)
    alone = merge.new_zeros(batch, read.shape[1], size).scatter(2, read[..., None], 1.0)
    both = torch.cat([whole, alone], dim=1)
    return Choice(joined, both.gather(1, order[..., None].expand(-1, -1, size)))


def _columns(left: TokenSet, like: Tensor) -> Tensor:
    assert left.columns is not None
    return left.columns.expand(like.shape[0], -1)


def _capacity(cache: Any) -> int:
    """Slots of a static cache."""
    if hasattr(cache, "get_max_length"):
        return int(cache.get_max_length())
    return int(cache.get_max_cache_shape())
