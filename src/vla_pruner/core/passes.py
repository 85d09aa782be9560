"""What each pass of a decoder is: decided from the cache and the ids that it carries.

A cache carries a mark of what was done to it, and its copies carry the same mark; the order of
calls says nothing. A pass is a prefill that shows an image (into an empty cache, or continuing
one), a prefill without an image, or a later pass of a marked cache: a decode step, a chunk of text,
a beam, the expert's flow step.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vla_pruner._numbers import on_device
from vla_pruner.core import refusals
from vla_pruner.core.arguments import cache_in
from vla_pruner.core.calls import Caches, Calls, by_name, tokens_in
from vla_pruner.core.cut import Cut
from vla_pruner.core.episodes import Episodes, Names, Step
from vla_pruner.core.hooks import after, before
from vla_pruner.core.layout import Adapter, Layout
from vla_pruner.core.plan import budgets
from vla_pruner.core.read_tokens import all_kept, in_place
from vla_pruner.core.tokens import Mode, Prefill, TokenIndex, TokenSet
from vla_pruner.methods.base import Method


def _outside_graphs(function: Callable[..., Any]) -> Callable[..., Any]:
    """A hook that no graph may hold; where a whole step is one graph, it does without."""
    outside = torch.compiler.disable(function)
    return lambda passes, *args: None if passes.calls.captured else outside(passes, *args)


_tracing, _exporting = torch.jit.is_tracing, torch.compiler.is_exporting
_batched = torch._C._functorch.is_batchedtensor  # Inside `torch.vmap`.
_INPUTS = ("inputs_embeds", "input_ids", "hidden_states")


@dataclass(eq=False)
class Pass:
    """One pass of a stack of layers: what it is given, and the cache that it continues."""

    stack: nn.Module
    inputs: Tensor
    """[B, S, D] embeddings, or [B, S] token ids."""
    kwargs: Mapping[str, Any]
    cache: Any
    past: int
    """Tokens in the cache."""
    batch: int
    length: int

    @staticmethod
    def of(stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Pass:
        """Errors: NotImplementedError, where nothing is seen of what goes in, or of a cache."""
        named = by_name(stack.forward, args, kwargs) if args else kwargs
        inputs = next((named[name] for name in _INPUTS if named.get(name) is not None), None)
        if inputs is None:
            raise refusals.no_inputs(stack, _INPUTS)
        cache = cache_in(named)
        past = 0 if cache is None else tokens_in(cache)
        return Pass(stack, inputs, named, cache, past, *inputs.shape[:2])


@dataclass(frozen=True, eq=False)
class _Known:
    """What follows from a layout, the same in every prefill that has it."""

    layout: Layout
    shape: tuple[int, int]
    """Rows and tokens of the prefill."""
    index: TokenIndex
    counts: tuple[int, ...]
    """Visual tokens that each cut has to leave."""
    views: tuple[tuple[int, ...], ...]
    """And of which cameras."""

    def prefill(self, past: int) -> Prefill:
        """A prefill of this layout behind `past` tokens, of which nothing is decided."""
        layout, index = self.layout, self.index
        places = layout.visual + past if past else layout.visual
        whole = TokenSet(layout.views, index.tokens, layout.visual, places, offset=past)
        sets = (whole, *map(TokenSet, self.views))
        rows = layout.action_rows
        acting = 1 if rows is None else len(range(*rows.indices(self.shape[1])))
        return Prefill(layout, "full", index, sets, self.counts, past, acting)


class Passes:
    """Follows the passes of one decoder, and hands its hooks what they need."""

    def __init__(
        self, adapter: Adapter, method: Method, cut: Cut, mode: Literal["drop", "hide"]
    ) -> None:
        self.adapter, self.method, self.cut, self.plan = adapter, method, cut, cut.plan
        self.mode: Literal["drop", "hide"] = mode
        self.episodes = Episodes(method, cut.plan)
        self.calls, self.caches = Calls(), Caches(cut)
        self.own_hooks = type(cut) is not Cut  # Those of a method of its own are told of steps.
        self.names = Names()
        self.frames: Tensor | None = None
        self.latest: Step | None = None
        self.prefilled: Step | None = None  # Of the last prefill; None: it showed no image.
        self.session: Any = None
        self.own_results = False  # Whether compiled code may write over what it returned.
        self._running: tuple[Step | None, Pass] | None = None
        self._warned = False
        self._known: _Known | None = None

    def attach(self, model: nn.Module, undo: ExitStack) -> None:
        """Install the hooks; `undo` takes them away."""
        stacks = [s for s in (self.adapter.decoder, self.adapter.reader) if s is not None]
        self.calls.attach(model, self.adapter.decoder, undo)
        for stack in stacks:
            before(stack, self._before, undo)
            after(stack, self._after, undo, always=True)
        self.calls.follow_generate(model, undo)
        if self.mode == "drop" and self.plan.cuts:
            self.calls.watch_behind(model, stacks, self.cut.layers, undo)

    # ------------------------------------------------------------------ around each pass
    @_outside_graphs
    def _before(self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Decide what this pass is, and hand the hooks what they need."""
        now, cut, self._running = Pass.of(stack, args, kwargs), self.cut, None
        own = stack is self.adapter.decoder
        self.calls.begins(stack, rows=(now.batch, now.length) if own else ())
        cut.prefill, cut.phase, cut.at = None, "later", -1
        if _tracing() or _exporting() or _batched(now.inputs) or now.inputs.is_meta:
            raise refusals.no_values()
        self._refuse_changes(cut)
        cut.static_cache = bool(getattr(now.cache, "is_compileable", False))
        step = self._step_of(now) if own else self._read_by(now)
        self._running = step, now
        if step is None:
            return
        self._check(step, now)
        step.whole, self.calls.step = False, step
        cut.prefill = step.prefill
        if cut.phase == "later":
            step.prefill.forget_pass()

    def _step_of(self, now: Pass) -> Step | None:
        """The step that a pass of the decoder begins or continues; None: it is left alone."""
        step, layout = None, None
        if now.past:
            step, layout = self._continued(now)
        elif now.length > 1:
            layout = self.adapter.layout(now.inputs, now.kwargs)
        if layout is not None:
            self.cut.phase = "prefill"
            step = self._prefill(now, layout, step)
        elif now.past == 0:
            self._leave_alone(now)
        if now.cache is not None and (layout is not None or now.past == 0):
            self.caches.mark(now.cache, step)
        return step

    def _continued(self, now: Pass) -> tuple[Step | None, Layout | None]:
        """The step that the cache of a pass belongs to, and the layout of an image that it adds."""
        step, layout = self.caches.continued(now, self.calls.shared), None
        if now.length > 1 or step is None or step.prefill.layout.read:
            layout = self.adapter.continued(now.inputs, now.kwargs, now.past)
            if layout is not None and step is not None and step.prefill.total == now.past:
                refusals.refuse_split_image(step.prefill.layout, layout)
        return step, layout

    def _read_by(self, now: Pass) -> Step | None:
        """The step that an action expert reads: its output, or its cache, maybe in a copy."""
        step, mark = self.prefilled, self.caches.of(now.cache)
        if self.adapter.reads_output:
            return step
        if mark is not None:
            return mark.step
        if now.cache is None or step is None:
            return None
        return step if self.caches.fits(now.cache, step, now.past) else None

    @_outside_graphs
    def _after(self, stack: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Note what the pass saw; `output` is None if it raised an exception."""
        in_prefill, self.cut.phase = self.cut.phase == "prefill", "outside"
        if not self.calls.ends(stack) or self._running is None:
            return self.calls.note(output)
        (step, now), self._running, self.cut.prefill = self._running, None, None
        if output is None:
            return self.calls.note(output)
        cache = self.caches.behind(now, output, step, in_prefill=in_prefill)
        if step is None:
            return None
        if in_prefill:
            self._refuse_unhooked(step.prefill)
            if getattr(output, "hidden_states", True):  # Asked for; or an output without names.
                output = in_place(step.prefill, output)
        if step.prefill.observed is not None:
            rows = step.prefill.acting if in_prefill else self._acting_later(now)
            step.add(step.prefill.observed, rows)
        if in_prefill and self.own_hooks:
            self.cut.end(step)
        step.prefill.forget_pass()
        if in_prefill and self.own_results:
            step.prefill.own_results()
        if len(set(step.ids)) > 1 and stack is self.adapter.decoder:
            self.caches.written(cache, step, now.past + now.length, in_prefill=in_prefill)
        step.whole = True
        return output

    def _acting_later(self, now: Pass) -> int:
        """Action queries of a pass that is no prefill."""
        rows = self.adapter.reader_rows(now.length) if self.cut.readers else None
        return now.length if rows is None else rows.stop - rows.start

    # ------------------------------------------------------------------ prefills
    def _prefill(self, now: Pass, layout: Layout, continued: Step | None) -> Step:
        """A prefill that shows an image: a new step, or one more pass of the step in progress."""
        if self.cut.flags.noted:  # The step before is over, and so is the wait for it.
            self.cut.flags.raise_noted()
        frames, self.frames = self.frames, None
        prefill = self._known_of(layout, now).prefill(now.past)
        if continued is not None and continued.prefill.mode != "full":
            prefill.before = continued.prefill
        shared = self.calls.shared
        if shared is not None and self._goes_on(shared, now):
            step = self._again(shared, prefill, now)
        else:
            step = self.episodes.start(self._row_ids(now.batch), prefill)
            own = self.cut.begin(step, self.mode, frames, now.kwargs) if self.own_hooks else None
            prefill.mode = own or self._mode(step, now.cache)
            if any(step.full) or len(set(step.ids)) < now.batch:
                self._tell_rows_apart(step)
            self.latest = step
        if self.calls.together:
            self.calls.share(step, now.inputs, self.mode)
        self.prefilled = step
        return step

    def _goes_on(self, shared: Step, now: Pass) -> bool:
        """Whether a prefill belongs to the step in progress."""
        grown = now.cache is None and now.length == shared.prefill.length + 1
        return len(shared.ids) == now.batch and (grown or not self.calls.grows)

    def _again(self, step: Step, prefill: Prefill, now: Pass) -> Step:
        """One more prefill of a step: what was decided in its first holds."""
        first = step.prefill
        with self.cut.flags.collect():
            self.calls.refuse_other_image(now.stack, now.inputs, prefill.layout.visual)
        prefill.mode, prefill.forecast = first.mode, first.forecast
        prefill.full_rows, prefill.scores = first.full_rows, first.scores
        prefill.given = first.choices
        self.cut.again(prefill, first)
        step.prefill = prefill
        return step

    def _tell_rows_apart(self, step: Step) -> None:
        """What a step's rows, which may be full steps or beams of one another, mean for a cut."""
        prefill, full, ids = step.prefill, step.full, step.ids
        device = prefill.layout.visual.device
        if prefill.mode == "hide" and any(full):
            prefill.full_rows = on_device(full, device, bool)
        if len(set(ids)) < len(ids):
            leaders = [ids.index(name) for name in ids]
            prefill.leader = on_device(leaders, device)
        if all(full) and prefill.mode == "drop":
            prefill.given = all_kept(prefill, len(ids))

    def _mode(self, step: Step, cache: Any) -> Mode:
        """What happens to tokens that are not kept. Errors: NotImplementedError, see `refusals`."""
        full, earlier, cuts = step.full, step.prefill.before, self.plan.cuts
        if not cuts or (all(full) and earlier is None):
            return "full"
        mode: Mode = "hide" if any(full) and not all(full) else self.mode
        if earlier is not None:
            refusals.refuse_second_image("hide" in (mode, earlier.mode), cuts[0], self.method.name)
        if cache is not None and not self.plan.one_mask:
            raise refusals.masks_of_kinds(self.adapter.decoder, cuts[0])
        return mode

    def _known_of(self, layout: Layout, now: Pass) -> _Known:
        """What follows from a layout, worked out once for each."""
        known, shape = self._known, (now.batch, now.length)
        if known is None or known.layout is not layout or known.shape != shape:
            with torch.inference_mode(False):  # They may be saved for a backward pass later.
                index = TokenIndex.of(layout, *shape)
            counts, views = budgets(self.method, self.adapter, self.plan, layout)
            known = self._known = _Known(layout, shape, index, counts, views)
        return known

    def _row_ids(self, batch: int) -> tuple[Hashable, ...]:
        names = self.names.ids if self.names.blocks else self.names.said
        copies = 1 if self.calls.shared else self.calls.copies
        if names is None:
            return tuple(row // copies for row in range(batch))
        ids = tuple(name for name in names for _ in range(copies))
        if len(ids) != batch:
            raise refusals.other_rows(len(ids), batch)
        return ids

    # ------------------------------------------------------------------ refusals
    def _refuse_changes(self, cut: Cut) -> None:
        """Refuse layers, or a kernel of the masks, that are others than at the start."""
        if (layers := list(self.adapter.layers)) != cut.layers:
            refusals.refuse_replaced(cut.layers, layers)
        config = getattr(self.adapter.decoder, "config", None)
        if (kernel := getattr(config, "_attn_implementation", None)) not in (cut.kernel, "eager"):
            raise refusals.other_kernel(cut.kernel, kernel)

    def _check(self, step: Step, now: Pass) -> None:
        """Refuse what would go wrong without a word."""
        if len(step.ids) != now.batch:
            raise refusals.other_batch(len(step.ids), now.batch)
        if now.stack.training and getattr(now.stack, "gradient_checkpointing", False):
            raise refusals.checkpointing()
        if self.plan.window is not None and now.stack is self.adapter.decoder:
            self._refuse_far(step.prefill, now, self.plan.window)

    def _refuse_far(self, prefill: Prefill, now: Pass, window: int) -> None:
        seen = prefill.total if self.cut.phase == "prefill" else now.past + now.length
        if seen > window and prefill.mode != "full":
            raise refusals.beyond_window(seen, window)

    def _refuse_unhooked(self, prefill: Prefill) -> None:
        """After a prefill: hooks that should have run and have not."""
        acting = self.plan.action_layers
        for cut, left in zip(self.plan.cuts, prefill.sets[1:], strict=True):
            if prefill.mode != "full" and left.columns is None:
                raise refusals.unhooked(cut)
        if not self.cut.readers and prefill.watched < len(acting):
            attention = self.adapter.attention(self.adapter.layers[acting[0]])
            raise refusals.unwatched(len(acting) - prefill.watched, len(acting), attention)

    def _leave_alone(self, now: Pass) -> None:
        """A prefill that shows no image; if there may have been one, say so once."""
        self.caches.refuse_hidden(now)
        self.prefilled = None
        reason = self.adapter.left_alone() if now.length > 1 else None
        if reason is None:
            return
        if not self._warned:
            self._warned = True
            warnings.warn(f"vla-pruner left a prefill alone: {reason}", stacklevel=2)
        self.latest = Step.of_nothing(reason, now.length)
