"""Hooks that take visual tokens out of a decoder stack before some of its layers.

Everything here works on tensors and can be compiled; `session.py` decides, outside of the compiled
code, what each pass is. `plan.py` says where, `arguments.py` how layers are called behind a cut,
`readings.py` what is read on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vla_pruner.methods.base import Choice, Evidence, Method
from vla_pruner.surgery import arguments, probe, readings
from vla_pruner.surgery.arguments import take
from vla_pruner.surgery.layout import Adapter
from vla_pruner.surgery.plan import make_plan
from vla_pruner.surgery.prompt import Prompt, Stage


class Cut:
    """Hooks on one decoder; `phase` and `prompt` say what the pass in progress is."""

    def __init__(self, adapter: Adapter, method: Method) -> None:
        self.adapter = adapter
        self.method = method
        self.layers = list(adapter.layers)
        self.readers = list(adapter.reader_layers)
        self.plan = make_plan(method, adapter)
        self.compact = method.positions == "compact"
        self.phase: Literal["prefill", "decode"] = "decode"
        self.prompt: Prompt | None = None
        self.static_cache = False
        self.eager = False
        self.tuples = False  # Whether layers return tuples.

    def attach(self, undo: ExitStack) -> None:
        """Install the hooks; `undo` takes them away."""
        plan = self.plan
        watched = {r.spec.layer for r in plan.readings if r.spec.kind == "attention"}
        projected = {r.spec.layer for r in plan.readings if r.spec.kind == "logits"}
        config = getattr(self._attention(0), "config", None)
        self.eager = getattr(config, "_attn_implementation", None) == "eager"
        acting = set(plan.action_layers)
        for index in sorted(watched if self.readers else watched | acting):
            probe.install(self._attention(index), partial(self._observe, index), undo)
        for index in sorted(acting) if self.readers else ():
            attention = self.adapter.attention(self.readers[index])
            probe.install(attention, partial(self._observe, index), undo)
        # Layer by layer, a reader follows what is done to the decoder.
        followers = [] if self.adapter.reads_output else self.readers
        for index in sorted(plan.skipped):
            for layers in [self.layers, followers] if followers else [self.layers]:
                self._skip(layers[index], undo)

        def before(index: int, hook: Any, layers: list[nn.Module] = self.layers) -> None:
            handle = layers[index].register_forward_pre_hook(hook, with_kwargs=True)
            undo.callback(handle.remove)

        if plan.skipped:
            undo.callback(self.layers[0].register_forward_hook(self._see_output).remove)
        if not plan.cuts:
            return
        before(0, self._see_input)
        for index in range(plan.depth):
            if index >= plan.cuts[0] or index in projected:
                before(index, partial(self._enter, index))
            if followers and index >= plan.cuts[0]:
                before(index, partial(self._enter, index), followers)
        if plan.cuts[0] == 0 and not self.readers:
            fill_up = self.layers[0].register_forward_hook(self._fill_up, with_kwargs=True)
            undo.callback(fill_up.remove)
        undo.callback(self.layers[-1].register_forward_hook(self._restore_length).remove)

    def _attention(self, index: int) -> nn.Module:
        return self.adapter.attention(self.layers[index])

    # ------------------------------------------------------------------ layers that do not run
    def _skip(self, layer: nn.Module, undo: ExitStack) -> None:
        original: Callable[..., Any] = layer.forward

        def skipped(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.prompt is None:
                return original(hidden_states, *args, **kwargs)
            return (hidden_states,) if self.tuples else hidden_states

        if "forward" in vars(layer):
            undo.callback(setattr, layer, "forward", original)
        else:
            undo.callback(delattr, layer, "forward")
        layer.forward = skipped

    def _see_output(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
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
        prompt = self.prompt
        if prompt is None or self.phase != "prefill" or prompt.given is not None:
            return
        hidden = hidden_states(args, kwargs)
        needs_voters = any(r.spec.rows == "voters" for r in self.plan.readings)
        if prompt.mode == "full" and not needs_voters:
            return
        prompt.features = take(hidden, prompt.layout.visual, dim=1)
        if prompt.places.text_rows is not None:
            prompt.text = take(hidden, prompt.places.text_rows, dim=1)
        if needs_voters:
            assert prompt.text is not None and prompt.places.text_valid is not None
            valid = prompt.places.text_valid.expand(hidden.shape[0], -1)
            prompt.voters = self.method.voters(prompt.features, prompt.text, valid)

    def _enter(
        self, index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Before a layer: cut if it is time to, and give it the arguments of what is left."""
        prompt = self.prompt
        if prompt is None:
            return None
        number = self.plan.stage(index)
        hidden = hidden_states(args, kwargs)
        cuts_here = index in self.plan.cuts
        if self.phase == "prefill":
            if cuts_here:
                self._project(index, number - 1, prompt, hidden)
            if cuts_here and prompt.mode != "full":
                hidden = self._cut(number, prompt, hidden, kwargs)
            self._project(index, number, prompt, hidden)
        if prompt.mode == "full" or number == 0:
            return None
        stage = prompt.stages[number]
        if cuts_here:
            stage.overrides = self._overrides(number, prompt, hidden, kwargs)
        overrides = stage.overrides
        dead_slots = index == 0 and self.phase == "decode" and prompt.mode == "drop"
        if dead_slots and not self.readers and prompt.length_at(1) < prompt.length:
            overrides = self._first_layer(stage, prompt, hidden, kwargs)
        if not overrides and not cuts_here:
            return None
        kwargs = {**kwargs, **overrides}
        if args:
            return (hidden, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden}

    def _fill_up(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """After layer 0 of a prefill that was cut before it: dead slots in its cache.

        The decoder asks layer 0 how many tokens there were, so that positions continue.
        """
        prompt, cache = self.prompt, kwargs.get("past_key_values")
        if prompt is None or self.phase != "prefill" or prompt.mode != "drop" or cache is None:
            return
        n, batch = prompt.length_at(1), hidden_states(args, kwargs).shape[0]
        if n == prompt.length:
            return
        held = cache.layers[0]
        shape = (batch, held.keys.shape[1], prompt.length - n)
        # Ones: static caches of transformers 4 count slots that hold anything but zeros.
        keys = held.keys.new_ones(*shape, held.keys.shape[-1])
        values = held.values.new_ones(*shape, held.values.shape[-1])
        slots = torch.arange(n, prompt.length, device=keys.device)
        cache.update(keys, values, 0, {"cache_position": slots})

    def _restore_length(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """After the last layer of a prefill: every token back in its row, zeros where one left."""
        prompt = self.prompt
        if prompt is None or self.phase != "prefill" or prompt.mode != "drop":
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        positions = prompt.stages[-1].positions
        assert positions is not None
        index = positions[..., None].expand(-1, -1, hidden.shape[-1])
        full = hidden.new_zeros(hidden.shape[0], prompt.length, hidden.shape[-1])
        full = full.scatter(1, index, hidden)
        return (full, *output[1:]) if isinstance(output, tuple) else full

    # ------------------------------------------------------------------ a cut
    def _cut(
        self, number: int, prompt: Prompt, hidden: Tensor, kwargs: Mapping[str, Any]
    ) -> Tensor:
        """Cut for the `number`-th time, counting from 1: hidden states `[B, n, D]` that go on."""
        before, stage = prompt.stages[number - 1], prompt.stages[number]
        if prompt.mode == "drop":
            arguments.refuse_unknown(kwargs, prompt.length)
        self._choose(number, prompt, hidden)
        joined = self._merged(before, stage, hidden)
        assert stage.tokens is not None and stage.columns is not None
        if prompt.mode == "drop":
            stay = stage.positions
            assert stay is not None
            if before.positions is not None:
                stay = torch.searchsorted(before.positions, stay)
            hidden = take(hidden, stay, dim=1)
        if joined is None:
            return hidden
        if prompt.full_rows is not None:
            alone = take(hidden, stage.columns, dim=1)
            joined = torch.where(prompt.full_rows[:, None, None], alone, joined)
        return hidden.scatter(1, stage.columns[..., None].expand_as(joined), joined)

    def _choose(self, number: int, prompt: Prompt, hidden: Tensor) -> None:
        """Fill in what is left after this cut."""
        before, stage = prompt.stages[number - 1], prompt.stages[number]
        batch, device = hidden.shape[0], hidden.device
        assert before.tokens is not None
        tokens = before.tokens.expand(batch, -1)
        if prompt.given is not None:
            choice = prompt.given[number - 1]
        elif tokens.shape[1] == 0:
            choice = Choice(torch.zeros(batch, 0, dtype=torch.int64, device=device))
        else:
            choice = self._ask(number - 1, prompt, tokens, hidden)
        stage.kept, stage.merge = choice.kept, choice.merge
        stage.tokens = tokens.gather(1, stage.kept)
        if self.method.adaptive:
            stage.views = (stage.tokens.shape[1],)
        visual = prompt.layout.visual.expand(batch, -1)
        left = visual.gather(1, stage.tokens)
        if prompt.mode == "drop":
            others = prompt.places.others.expand(batch, -1)
            stage.positions = torch.cat([others, left], dim=1).sort(dim=1).values
            stage.columns = torch.searchsorted(stage.positions, left)
        else:
            stays = torch.zeros_like(visual, dtype=torch.bool).scatter(1, stage.tokens, True)
            if prompt.full_rows is not None:
                stays = stays | prompt.full_rows[:, None]
            everything = torch.ones(batch, prompt.length, dtype=torch.bool, device=device)
            stage.present = everything.scatter(1, visual, stays)
            stage.columns = left

    def _ask(self, number: int, prompt: Prompt, tokens: Tensor, hidden: Tensor) -> Choice:
        """What the method decides at cut `number`, from 0."""
        batch, stage, layout = tokens.shape[0], prompt.stages[number], prompt.layout
        assert prompt.features is not None

        def left(whole: Tensor) -> Tensor:
            return whole if number == 0 else take(whole, tokens, dim=1)

        scores = {}
        for name, reading in self.plan.asked[number].items():
            score, at = prompt.scores[reading], self.plan.readings[reading].stage
            if at < number:
                score = readings.spread(prompt, prompt.stages[at], score).gather(1, tokens)
            scores[name] = score
        text_valid = prompt.places.text_valid
        evidence = Evidence(
            features=left(prompt.features),
            semantic=scores.get("semantic"),
            forecast=None if prompt.forecast is None else left(prompt.forecast),
            views=stage.views,
            layer=self.plan.cuts[number],
            valid=None if layout.visual_valid is None else left(layout.visual_valid),
            seeds=prompt.seeds,
            scores=scores,
            hidden=readings.visual_tokens(prompt, stage, hidden),
            tokens=tokens,
            text=prompt.text,
            text_valid=None if text_valid is None else text_valid.expand(batch, -1),
            number=number,
            keep_count=min(prompt.counts[number], tokens.shape[1]),
        )
        chosen = self.method.select(evidence)
        choice = chosen if isinstance(chosen, Choice) else Choice(chosen)
        kept, merge = choice.kept, choice.merge
        right = kept.ndim == 2 and kept.shape[0] == batch
        if not right or (kept.shape[1] != evidence.keep_count and not self.method.adaptive):
            raise ValueError(
                f"method {self.method.name!r} chose {tuple(kept.shape)} at cut {number}; expected "
                f"[B, k] = ({batch}, {evidence.keep_count})."
            )
        if merge is not None and merge.shape != (*kept.shape, tokens.shape[1]):
            raise ValueError(
                f"method {self.method.name!r} gave merge {tuple(merge.shape)} at cut {number}; "
                f"expected [B, k, m] = {(*kept.shape, tokens.shape[1])}."
            )
        if prompt.leader is not None:
            kept = kept.index_select(0, prompt.leader)
            merge = None if merge is None else merge.index_select(0, prompt.leader)
        return Choice(kept, merge)

    def _merged(self, before: Stage, stage: Stage, hidden: Tensor) -> Tensor | None:
        """Hidden states of the tokens that stay, `[B, k, D]`, where the choice changes them."""
        if stage.merge is None:
            return None
        assert before.columns is not None
        every = take(hidden, before.columns.expand(hidden.shape[0], -1), dim=1)
        with torch.autocast(hidden.device.type, enabled=False):
            return (stage.merge.float() @ every.float()).to(hidden.dtype)

    # ------------------------------------------------------------------ arguments behind a cut
    def _overrides(
        self, number: int, prompt: Prompt, hidden: Tensor, kwargs: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Arguments of the layers after `number` cuts, in this pass."""
        stage, prefill = prompt.stages[number], self.phase == "prefill"
        positions, static = stage.positions, self.static_cache
        if positions is not None and prefill:
            return arguments.shortened(
                kwargs, positions, prompt.length, static_cache=static, compact=self.compact
            )
        removed: Tensor | int
        if positions is not None:
            found = arguments.shifted(kwargs, positions, prompt.length, static_cache=static)
            removed = prompt.length - positions.shape[1]
        else:
            assert stage.present is not None
            found = {"attention_mask": self._masked(number, stage.present, hidden, kwargs)}
            if self.compact and prefill:
                return found | arguments.closed_up(kwargs, stage.present)
            removed = (~stage.present).sum(dim=1, keepdim=True)
        if self.compact:
            rotary = self.adapter.decoder.rotary_emb
            assert isinstance(rotary, nn.Module)
            found |= arguments.renumbered(rotary, hidden, kwargs, removed)
        return found

    def _first_layer(
        self, stage: Stage, prompt: Prompt, hidden: Tensor, kwargs: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Decode arguments of layer 0 where tokens were cut before it, see `_fill_up`."""
        assert stage.positions is not None
        mask = kwargs.get("attention_mask")
        if mask is None:
            mask = self._implied_mask(1, hidden, kwargs)
        found: dict[str, Any] = {
            "attention_mask": arguments.with_gap(mask, stage.positions, prompt.length)
        }
        names = ("position_embeddings", "position_ids")
        return found | {name: stage.overrides[name] for name in names if name in stage.overrides}

    def _masked(
        self, number: int, present: Tensor, hidden: Tensor, kwargs: Mapping[str, Any]
    ) -> Tensor:
        """The layers' mask `[B, 1, Q, N]`, with tokens that are gone hidden from everybody."""
        mask = kwargs.get("attention_mask")
        if mask is None:
            mask = self._implied_mask(number, hidden, kwargs)
        elif mask.ndim != 4:
            raise NotImplementedError(
                'hiding tokens (mode="mask", or a batch in which some episodes run on all tokens) '
                'needs attn_implementation="sdpa" or "eager".'
            )
        return arguments.hiding(mask, present)

    def _implied_mask(
        self, number: int, hidden: Tensor, kwargs: Mapping[str, Any], queries: int | None = None
    ) -> Tensor:
        """What attention does when it gets no mask, as a mask `[1, 1, Q, N]`.

        Q is the length of `hidden`, or `queries`.
        """
        queries = hidden.shape[1] if queries is None else queries
        cache = kwargs.get("past_key_values")
        index = self.plan.runs_in(number)
        if index is None:  # No layer will look at it.
            return torch.ones(1, 1, queries, queries, dtype=torch.bool, device=hidden.device)
        keys = queries
        if cache is not None and self.static_cache:
            keys = _capacity(cache)
        elif cache is not None:
            keys = queries + cache.get_seq_length(index)
        mask = torch.ones(queries, keys, dtype=torch.bool, device=hidden.device)
        if self._is_causal(self._attention(index), None, queries, kwargs):
            mask = mask.tril(0 if self.static_cache else keys - queries)
        elif self.static_cache:
            mask[:, queries:] = False
        if self.eager:
            additive = torch.zeros_like(mask, dtype=hidden.dtype)
            mask = additive.masked_fill(~mask, torch.finfo(hidden.dtype).min)
        return mask[None, None]

    # ------------------------------------------------------------------ scores
    def _project(self, index: int, number: int, prompt: Prompt, hidden: Tensor) -> None:
        """Before a layer: scores from its queries and keys, after `number` cuts."""
        stage = prompt.stages[0 if prompt.mode == "full" else number]
        for reading in self.plan.read_in(index, "logits"):
            if reading.stage == number and reading.number not in prompt.scores:
                prompt.scores[reading.number] = readings.logits(
                    reading.spec, self.adapter, self.layers[index], hidden, prompt, stage
                )

    def _observe(
        self,
        index: int,
        attention: nn.Module,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        kwargs: dict[str, Any],
    ) -> None:
        """After a watched layer's attention: the scores that are read there."""
        prompt = self.prompt
        if prompt is None:
            return
        batch, queries, prefill = query.shape[0], query.shape[2], self.phase == "prefill"
        causal = self._is_causal(attention, mask, queries, kwargs)
        seen = readings.Seen.of(attention, query, key, mask, kwargs, prefill=prefill, causal=causal)
        number = self.plan.stage(index)
        if self.adapter.reads_output and not prefill:
            number = self.plan.action_stage
        stage = prompt.stages[0 if prompt.mode == "full" else number]
        for reading in self.plan.read_in(index, "attention") if prefill else ():
            if reading.number not in prompt.scores:
                rows, weight = readings.votes(reading.spec, prompt, stage, query)
                columns = stage.columns
                assert columns is not None
                prompt.scores[reading.number] = seen.received(
                    columns.expand(batch, -1), rows, weight, reading.spec.heads
                )
        if index not in self.plan.action_layers or (prefill and self.readers):
            return
        rows = slice(None) if queries > 1 else None
        if prefill:
            rows = _action_rows(prompt, stage)
        elif self.readers:
            rows = self.adapter.reader_rows(queries)
            if rows is None:
                return
        if stage.positions is None:
            observed = seen.received(prompt.layout.visual.expand(batch, -1), rows)
        else:
            assert stage.columns is not None
            observed = readings.spread(prompt, stage, seen.received(stage.columns, rows))
        prompt.observed = observed if prompt.observed is None else prompt.observed + observed

    def _is_causal(
        self, attention: nn.Module, mask: Tensor | None, queries: int, kwargs: Mapping[str, Any]
    ) -> bool:
        """Whether the attention function itself hides the future: not if a 4-D mask says it all."""
        if queries == 1 or self.eager or (mask is not None and mask.ndim == 4):
            return False
        causal = kwargs.get("is_causal")
        return bool(getattr(attention, "is_causal", True) if causal is None else causal)


def hidden_states(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """What a layer is called with, [B, n, D]."""
    return args[0] if args else kwargs["hidden_states"]


def _action_rows(prompt: Prompt, stage: Stage) -> readings.Voting:
    """Rows of the prefill that are action queries; None: the last one."""
    rows = prompt.layout.action_rows
    if rows is None:
        return readings.place(stage, prompt.places.last_row)
    start, stop, _ = rows.indices(prompt.length)
    return slice(start - prompt.length, stop - prompt.length if stop < prompt.length else None)


def _capacity(cache: Any) -> int:
    """Slots of a static cache."""
    if hasattr(cache, "get_max_length"):
        return int(cache.get_max_length())
    return int(cache.get_max_cache_shape())
