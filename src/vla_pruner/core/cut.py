"""Hooks that take visual tokens out of a decoder stack before some of its layers.

Everything here works on tensors and can be compiled; `passes.py` decides, outside of the compiled
code, what each pass is. `plan.py` says where, `arguments.py` how layers are called behind a cut,
`scores.py` what is read on the way.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vla_pruner import _flags
from vla_pruner._flags import Flags
from vla_pruner.core import hiding, refusals, scores
from vla_pruner.core.arguments import Call, Drop, Signature, Strategy, take
from vla_pruner.core.episodes import Step
from vla_pruner.core.hooks import after, before, skip_layers
from vla_pruner.core.layout import Adapter
from vla_pruner.core.plan import make_plan
from vla_pruner.core.projected import project
from vla_pruner.core.read_tokens import choose_beside
from vla_pruner.core.tokens import Mode, Prefill
from vla_pruner.methods.base import Choice, Evidence, Method

STRATEGIES: dict[Mode, Strategy] = {"drop": Drop(), "hide": hiding.Hide()}


class Cut:
    """Hooks on one decoder; `phase` and `prefill` say what the pass in progress is."""

    def __init__(self, adapter: Adapter, method: Method) -> None:
        self.adapter = adapter
        self.method = method
        self.of_others = not type(method).__module__.startswith("vla_pruner.")
        self.layers = list(adapter.layers)
        self.readers = list(adapter.reader_layers)
        self.plan = make_plan(method, adapter)
        self.signatures = {layer: Signature(layer) for layer in (*self.layers, *self.readers)}
        self.phase: Literal["prefill", "later", "outside"] = "outside"
        self.prefill: Prefill | None = None
        self.at = -1  # The layer that ran last in this pass.
        self.static_cache = False
        self.eager = self.by_name = False  # Its attention, and whether it is chosen by name.
        config = getattr(adapter.decoder, "config", None)
        self.kernel: str | None = getattr(config, "_attn_implementation", None)  # Of its masks.
        self.flash = "flash" in (self.kernel or "")
        self.flags = Flags()
        self.tuples = False  # Whether layers return tuples.
        self.weighted = any(r.spec.rows == "weighted" for r in self.plan.readings)
        compact = method.positions == "compact"
        self.rotary: Any = adapter.decoder.rotary_emb if compact and self.plan.cuts else None

    def attach(self, undo: ExitStack) -> None:
        """Install the hooks; `undo` takes them away."""
        plan = self.plan
        kernel = getattr(getattr(self.attention(0), "config", None), "_attn_implementation", None)
        self.eager, self.by_name = kernel == "eager", kernel is not None
        if kernel == "flex_attention" and plan.cuts:
            raise refusals.flex_attention()
        scores.watch_layers(self, undo)
        # Layer by layer, a reader follows what is done to the decoder.
        followers = [] if self.adapter.reads_output else self.readers
        if plan.skipped:
            skip_layers(self, followers, undo)
        if not plan.cuts:
            return
        before(self.layers[0], self._see_input, undo)
        projected = {r.spec.layer for r in plan.readings if r.spec.kind == "logits"}
        for index, layer in enumerate(self.layers):
            before(layer, partial(self._enters, index), undo)
            number, cuts_here = plan.number[index], index in plan.cuts
            if index in projected and cuts_here:
                before(layer, partial(project, self, index, number - 1), undo)
            hook = partial(self.at_cut if cuts_here else self._behind_cut, number)
            if cuts_here and index == 0 and not self.readers:
                hook = partial(hiding.before_layer_0, self)
                after(layer, partial(hiding.fill_up, self), undo)
            for one in [layer, *followers[index : index + 1]] if number else []:
                before(one, hook, undo)
            if index in projected:
                before(layer, partial(project, self, index, number), undo)
        after(self.layers[-1], self._restore_length, undo)

    def attention(self, index: int) -> nn.Module:
        """Attention of a decoder layer."""
        return self.adapter.attention(self.layers[index])

    # ------------------------------------------------------------------ for hooks of other methods
    def begin(
        self, step: Step, mode: Mode, frames: Tensor | None, kwargs: Mapping[str, Any]
    ) -> Mode | None:
        """A step begins, whose prefill and rows that run on all tokens may be changed.

        `mode` is what the session does with tokens that are not kept, `frames` camera images
        `[B, cameras, 3, H, W]`, if there are any, `kwargs` the decoder's arguments. Returns what
        happens to tokens that are not kept; None: as the rows that are full ask for.
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

    # ------------------------------------------------------------------ hooks on layers
    def _enters(self, index: int, layer: nn.Module, args: Any, kwargs: Any) -> None:
        """Before each layer: it runs once in a pass, behind those that stand before it."""
        if index <= self.at and self.prefill is not None:
            raise refusals.ran_twice(index, self.adapter.decoder)
        self.at = index

    def _see_input(self, layer: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
        """Before layer 0 of a prefill: embeddings that methods look at later."""
        prefill = self.prefill
        if self.phase == "outside":
            raise refusals.past_hooks(self.adapter.decoder)
        if prefill is None or self.phase != "prefill" or prefill.given is not None:
            return
        if prefill.mode == "full" and not self.weighted:
            return
        hidden = args[0] if args else self.signatures[layer].bind(args, kwargs)[0]
        if hidden.shape[1] != prefill.length:
            raise refusals.other_length(layer, hidden.shape, prefill.length)
        prefill.features = take(hidden, prefill.layout.visual, dim=1)
        if self.plan.needs_text:
            self._see_text(prefill, prefill.features, hidden)

    def _see_text(self, prefill: Prefill, features: Tensor, hidden: Tensor) -> None:
        """The instruction among `hidden` `[B, S, D]`, and how much its words count."""
        if prefill.index.text_rows is not None:
            prefill.text = take(hidden, prefill.index.text_rows, dim=1)
        if self.weighted:
            assert prefill.text is not None and prefill.index.text_valid is not None
            valid = prefill.index.text_valid.expand(hidden.shape[0], -1)
            prefill.query_weights = self.method.query_weights(features, prefill.text, valid)

    def _behind_cut(
        self, number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Before a layer that runs after `number` cuts: the arguments of what is left."""
        prefill = self.prefill
        if prefill is None or (left := prefill.sets[number]).given is None:
            return None
        if len(args) != 1:
            hidden, kwargs = self.signatures[layer].bind(args, kwargs)
            args = (hidden,)
        if alike(kwargs, left.given):
            return args, {**kwargs, **left.arguments}
        return args, self._arguments(Call(self, number, layer, args[0], kwargs), prefill)

    def at_cut(
        self, number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Before a layer that runs right behind cut `number`: cut, or see what the prefill left."""
        prefill = self.prefill
        if prefill is None or prefill.mode == "full":
            return None
        hidden, kwargs = self.signatures[layer].bind(args, kwargs)
        if self.phase == "prefill":
            hidden = self._cut(number, prefill, hidden)
        return (hidden,), self._arguments(Call(self, number, layer, hidden, kwargs), prefill)

    def _arguments(self, call: Call, prefill: Prefill) -> dict[str, Any]:
        """What a layer gets behind a cut, and all later ones that are given the same things."""
        strategy, left = STRATEGIES[prefill.mode], prefill.sets[call.number]
        make = strategy.in_prefill if self.phase == "prefill" else strategy.later
        left.given, left.arguments = call.kwargs, make(call, prefill, left)
        return {**call.kwargs, **left.arguments}

    def _restore_length(self, layer: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """After the last layer of a prefill: every token back in its row, zeros where one left."""
        prefill = self.prefill
        if prefill is None or self.phase != "prefill" or (rows := prefill.sets[-1].rows) is None:
            return None
        hidden = output[0] if isinstance(output, tuple | list) else output
        full = hidden.new_zeros(hidden.shape[0], prefill.length, hidden.shape[-1])
        full = full.scatter(1, rows[..., None].expand_as(hidden), hidden)
        return (full, *output[1:]) if isinstance(output, tuple | list) else full

    # ------------------------------------------------------------------ a cut
    def _cut(self, number: int, prefill: Prefill, hidden: Tensor) -> Tensor:
        """Cut for the `number`-th time, counting from 1: hidden states `[B, n, D]` that go on."""
        earlier, left, batch = prefill.sets[number - 1], prefill.sets[number], hidden.shape[0]
        assert earlier.tokens is not None
        tokens = earlier.tokens.expand(batch, -1)
        choice = self._choice(number - 1, prefill, tokens, hidden)
        left.kept, left.merge = choice.kept, choice.merge
        left.tokens = tokens.gather(1, left.kept)
        if self.method.adaptive:
            left.views = (left.tokens.shape[1],)
        visual = prefill.layout.visual.expand(batch, -1).gather(1, left.tokens)
        gone_on = STRATEGIES[prefill.mode].leave(prefill, visual, number, hidden)
        return gone_on if left.merge is None else self._merged(number, prefill, hidden, gone_on)

    def _choice(self, number: int, prefill: Prefill, tokens: Tensor, hidden: Tensor) -> Choice:
        """What is decided at cut `number`, from 0, about `tokens` `[B, m]`."""
        if prefill.given is not None:
            return prefill.given[number]
        if tokens.shape[1] == 0:
            return Choice(tokens)
        evidence, ask = self._evidence(number, prefill, tokens, hidden), self._ask
        if prefill.index.read is None:
            choice = ask(evidence)
        else:
            choice = choose_beside(ask, evidence, prefill, self.method, len(self.plan.cuts))
        return choice if prefill.leader is None else choice.of_rows(prefill.leader)

    def _ask(self, evidence: Evidence) -> Choice:
        """What the method chooses; its shapes are right."""
        features, method, number = evidence.features, self.method, evidence.number
        if torch.compiler.is_compiling() or features.device.type in _flags.HOST:
            chosen = method.select(evidence)
        else:
            with self.flags.collect():  # What is broken is noted: looking at it would mean waiting.
                chosen = method.select(evidence)
        choice = chosen if isinstance(chosen, Choice) else Choice(chosen)
        kept, merge = choice.kept.shape, choice.merge
        expected = len(features), *(kept[-1:] if method.adaptive else (evidence.keep_count,))
        if kept != expected:
            raise refusals.wrong_choice(method.name, kept, number, expected)
        if self.of_others:
            refusals.refuse_unordered(method.name, choice.kept, number, features.shape[1])
        if merge is not None and merge.shape != (*kept, features.shape[1]):
            raise refusals.wrong_merge(method.name, merge.shape, number, (*kept, features.shape[1]))
        return choice

    def _evidence(self, number: int, prefill: Prefill, tokens: Tensor, hidden: Tensor) -> Evidence:
        """What the method may look at when it decides about `tokens` `[B, m]`."""
        left, index, found = prefill.sets[number], prefill.index, {}
        for name, reading in self.plan.asked[number].items():
            if reading not in prefill.scores:
                layer = self.plan.readings[reading].spec.layer
                raise refusals.unseen(layer, self.attention(layer))
            found[name] = prefill.scores[reading]
        assert prefill.features is not None and left.columns is not None
        batch, valid = len(tokens), index.text_valid
        evidence = Evidence(
            features=prefill.features,
            semantic=found.get("semantic"),
            forecast=prefill.forecast,
            views=left.views,
            layer=self.plan.cuts[number],
            valid=prefill.layout.visual_valid,
            seeds=prefill.seeds,
            scores=found,
            tokens=index.tokens.expand(batch, -1),
            text=prefill.text,
            text_valid=None if valid is None else valid.expand(batch, -1),
            number=number,
            keep_count=min(prefill.counts[number], tokens.shape[1]),
            **(scores.guides(prefill, left, hidden) if self.plan.needs_text else {}),
        )
        if number:
            evidence = evidence.of(partial(take, index=tokens, dim=1), left.views)
        if self.method.sees_hidden:
            columns = left.columns.expand(batch, -1)
            evidence = replace(evidence, hidden=take(hidden, columns, dim=1))
        return evidence

    def _merged(self, number: int, prefill: Prefill, hidden: Tensor, gone_on: Tensor) -> Tensor:
        """What goes on, with the hidden states `[B, k, D]` that a choice makes of all."""
        earlier, left, batch = prefill.sets[number - 1], prefill.sets[number], hidden.shape[0]
        assert left.merge is not None and left.columns is not None and earlier.columns is not None
        every = take(hidden, earlier.columns.expand(batch, -1), dim=1)
        with torch.autocast(hidden.device.type, enabled=False):
            joined = (left.merge.float() @ every.float()).to(hidden.dtype)
        if prefill.full_rows is not None:
            alone = take(gone_on, left.columns, dim=1)
            joined = torch.where(prefill.full_rows[:, None, None], alone, joined)
        return gone_on.scatter(1, left.columns[..., None].expand_as(joined), joined)


def alike(some: Mapping[str, Any], others: Mapping[str, Any]) -> bool:
    """Whether two layers are given the same things; tuples of tables are compared one by one."""
    pairs = [(one, others.get(name)) for name, one in some.items()]
    tables = [z for a, b in pairs if type(a) is type(b) is tuple for z in zip(a, b, strict=False)]
    plain = [(a, b) for a, b in pairs if not (type(a) is type(b) is tuple and len(a) == len(b))]
    return len(some) == len(others) and all(a is b for a, b in plain + tables)
