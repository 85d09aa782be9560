"""What each pass of a decoder is: decided from the cache and the ids that it carries.

A cache carries a mark of what was done to it, and its copies carry the same mark; the order of
calls says nothing. A pass is a prefill that shows an image (into an empty cache, or continuing
one), a prefill without an image, or a later pass of a marked cache: a decode step, a chunk of text,
a beam, the expert's flow step.
"""

from __future__ import annotations

import inspect
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vla_pruner._numbers import on_device
from vla_pruner.core.arguments import cache_in
from vla_pruner.core.cleanup import after, before, replace
from vla_pruner.core.cut import Cut, all_kept
from vla_pruner.core.episodes import Episodes, Step
from vla_pruner.core.layout import Adapter, Layout
from vla_pruner.core.tokens import Mode, Prefill, TokenIndex, TokenSet
from vla_pruner.methods.base import Method

_MARK = "_vla_pruner_mark"
_INPUTS = ("inputs_embeds", "input_ids", "hidden_states")
_GUESSING = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")


class Mark:
    """What a session knows of a cache; copies of the cache share it."""

    def __init__(self, passes: Passes, step: Step | None) -> None:
        self.passes = weakref.ref(passes)
        self.step = step  # None: it holds no image that this session has seen.

    def __deepcopy__(self, memo: dict[int, Any]) -> Mark:
        return self

    def __reduce__(self) -> Any:
        return (_nothing, ())


def _nothing() -> None:
    return None


class Turn:
    """Lets one thread at a time run the model; what an interrupted call left open is closed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: threading.Thread | None = None
        self._inside: list[Any] = []

    def enter(self, what: Any) -> bool:
        """A call of `what` begins; whether it is the outermost one.

        Raises:
            RuntimeError: another thread is inside.
        """
        me = threading.current_thread()
        with self._lock:
            if self._owner is not me:
                if self._owner is not None and self._inside and self._owner.is_alive():
                    raise RuntimeError(
                        f"this pruned model is being called by thread {self._owner.name!r} and "
                        f"now by {me.name!r}; a session follows one call at a time. Put a lock "
                        "around the calls, or give each thread its own model and session."
                    )
                self._owner, self._inside = me, []
            if what in self._inside:
                del self._inside[self._inside.index(what) :]
            self._inside.append(what)
            return len(self._inside) == 1

    def leave(self, what: Any) -> bool:
        """It is over; whether it was the outermost one."""
        with self._lock:
            mine = self._owner is threading.current_thread()
            if mine and what in self._inside:
                del self._inside[self._inside.index(what) :]
            return mine and not self._inside


class Passes:
    """Follows the passes of one decoder, and hands its hooks what they need."""

    def __init__(
        self, adapter: Adapter, method: Method, cut: Cut, mode: Literal["drop", "hide"]
    ) -> None:
        self.adapter, self.method, self.cut, self.plan = adapter, method, cut, cut.plan
        self.mode: Literal["drop", "hide"] = mode
        self.episodes = Episodes(method, cut.plan)
        self.turn = Turn()
        self.ids: tuple[Hashable, ...] | None = None
        self.frames: Tensor | None = None
        self.latest: Step | None = None
        self.prefilled: Step | None = None  # Of the last prefill; None: it showed no image.
        self.session: Any = None
        self.own_results = False  # Whether compiled code may write over what it returned.
        self._copies = 1
        self._in_step = False
        self._open: Step | None = None
        self._call: Step | None = None  # Of the outermost call in progress.
        self._began = 0.0
        self._running: Step | None = None
        self._queries = 0
        self._warned = False
        self._known: tuple[Layout, int, int, TokenIndex, tuple[int, ...]] | None = None

    def attach(self, model: nn.Module, undo: ExitStack) -> None:
        """Install the hooks; `undo` takes them away."""
        stacks = [s for s in (self.adapter.decoder, self.adapter.reader) if s is not None]
        if model not in stacks:
            before(model, self._call_begins, undo)
            after(model, self._call_ends, undo, always=True)
        for stack in stacks:
            before(stack, self._before, undo)
            after(stack, self._after, undo, always=True)
        generate = getattr(model, "generate", None)
        if callable(generate) and not isinstance(model, type):
            replace(model, "generate", self._generating(model, generate), undo)

    # ------------------------------------------------------------------ calls
    @contextmanager
    def step(self) -> Iterator[None]:
        """All prefills inside belong to one policy step; an exception undoes the step."""
        inside = object()
        self.turn.enter(inside)  # Refuses other threads before anything is touched.
        outer, failed = self._in_step, True
        if not outer:
            self._in_step, self._open, self._call = True, None, None
            self._began = time.perf_counter()
        try:
            yield
            failed = False
        finally:
            if not outer:
                self._in_step, self._open = False, None
                self._close_call(failed)
            self.turn.leave(inside)

    @torch.compiler.disable
    def _call_begins(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        if self.turn.enter(model) and not self._in_step:
            if self._call is not None:  # An earlier call never came back.
                self._call.failed = True
            self._call, self._began = None, time.perf_counter()

    @torch.compiler.disable
    def _call_ends(self, model: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not self._in_step:
            self._close_call(output is None)
        self.turn.leave(model)

    def _close_call(self, failed: bool) -> None:
        """The outermost call is over; a step of one that failed never was."""
        step, self._call = self._call, None
        if step is not None:
            step.failed = step.failed or failed
            step.ms = 1e3 * (time.perf_counter() - self._began)

    def _generating(self, model: nn.Module, generate: Callable[..., Any]) -> Callable[..., Any]:
        """`model.generate` as one step, with its beams and samples told apart from episodes."""

        def generating(*args: Any, **kwargs: Any) -> Any:
            option = _options(model, generate, args, kwargs)
            for name in _GUESSING:
                if option(name) is not None:
                    raise NotImplementedError(
                        f"`{name}`: guessing tokens ahead takes some back from the cache, which "
                        "pruning does not follow; generate without it."
                    )
            if option("prefill_chunk_size") is not None:
                raise NotImplementedError(
                    "`prefill_chunk_size`: an image that is split over several passes cannot be "
                    "pruned as a whole; generate without it (what pruning leaves needs less "
                    "memory, too)."
                )
            with self.step():
                copies = self._copies
                self._copies = max(option(n) or 1 for n in ("num_beams", "num_return_sequences"))
                try:
                    return generate(*args, **kwargs)
                finally:
                    self._copies = copies

        return generating

    # ------------------------------------------------------------------ around each pass
    @torch.compiler.disable
    def _before(self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Decide what this pass is, and hand the hooks what they need."""
        if self.turn.enter(stack) and not self._in_step:
            self._call, self._began = None, time.perf_counter()
        cut, adapter = self.cut, self.adapter
        self._running, cut.prefill = None, None
        if args:
            kwargs = _by_name(stack.forward, args, kwargs)
        given = [kwargs[name] for name in _INPUTS if kwargs.get(name) is not None]
        if not given:
            raise NotImplementedError(
                f"{type(stack).__name__} was called without any of {', '.join(_INPUTS)}; pruning "
                "has to see what goes into the decoder. See docs/adding-a-model.md."
            )
        inputs = given[0]
        batch, length = inputs.shape[:2]
        cache = cache_in(kwargs)
        cut.static_cache = bool(getattr(cache, "is_compileable", False))
        cut.phase = "later"
        if stack is not adapter.decoder:
            step = self.prefilled if adapter.reads_output else self._of_reader(cache)
        else:
            past = _seen(cache)
            step, layout = self._continued(cache, past), None
            if past == 0:
                layout = adapter.layout(inputs, kwargs) if length > 1 else None
            elif length > 1 or step is None or step.prefill.layout.read:
                layout = adapter.continued(inputs, kwargs, past)
                self._refuse_split(layout, step, past)
            if layout is not None:
                cut.phase = "prefill"
                step = self._start(layout, batch, length, past, cache, kwargs, step)
                self._mark(cache, step)
            elif past == 0:
                self.prefilled = None
                self._mark(cache, None)
                if length > 1:
                    self._leave_alone(adapter.left_alone(), length)
        if step is None:
            return
        self._check(step, stack, cache, batch, length)
        self._running, self._queries, step.whole = step, length, False
        self._call = step
        cut.prefill = step.prefill
        step.prefill.start_pass()

    @torch.compiler.disable
    def _after(
        self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Note what the pass saw; `output` is None if it raised an exception."""
        step, cut = self._running, self.cut
        self._running, cut.prefill = None, None
        if step is not None and output is not None:
            self._conclude(step, stack, kwargs, output)
            step.whole = True
            step.ms = 1e3 * (time.perf_counter() - self._began)
        elif output is not None and cut.phase == "later" and cache_in(kwargs) is None:
            self._mark(getattr(output, "past_key_values", None), None)
        if self.turn.leave(stack):
            self._call = None

    def _conclude(self, step: Step, stack: nn.Module, kwargs: Mapping[str, Any], out: Any) -> None:
        prefill, cut = step.prefill, self.cut
        if cut.phase == "prefill":
            self._refuse_unhooked(prefill)
            if cache_in(kwargs) is None:
                self._mark(getattr(out, "past_key_values", None), step)
        if prefill.observed is not None:
            rows = 1
            if cut.phase == "prefill" and prefill.layout.action_rows is not None:
                rows = len(range(*prefill.layout.action_rows.indices(prefill.length)))
            elif cut.phase == "later":
                acting = self.adapter.reader_rows(self._queries) if cut.readers else None
                rows = self._queries if acting is None else acting.stop - acting.start
            step.add(prefill.observed, rows)
        if cut.phase == "prefill":
            cut.end(step)
        prefill.finish_pass(own=self.own_results and cut.phase == "prefill")

    # ------------------------------------------------------------------ steps
    def _start(
        self,
        layout: Layout,
        batch: int,
        length: int,
        past: int,
        cache: Any,
        kwargs: Mapping[str, Any],
        continued: Step | None,
    ) -> Step:
        """A prefill begins: finish the step before, and find out who prunes."""
        self.cut.flags.raise_noted()  # The step before is over, and so is the wait for it.
        frames, self.frames = self.frames, None
        index, counts = self._index(layout, batch, length)
        views, sets = layout.views, [TokenSet(layout.views, index.tokens, layout.visual)]
        sets[0].offset = past
        for number, count in enumerate(counts):
            per_view = self.method.budget == "view" and not self.method.adaptive
            views = self.method.split(views, count, number) if per_view else (count,)
            sets.append(TokenSet(views))
        prefill = Prefill(layout, "full", index, tuple(sets), counts, past)
        earlier = None if continued is None else continued.prefill
        if earlier is not None and earlier.mode != "full":
            prefill.before = earlier
        previous = self._open if self._in_step else None
        if previous is not None and len(previous.ids) == batch:
            first = previous.prefill
            prefill.mode, prefill.forecast = first.mode, first.forecast
            prefill.full_rows, prefill.scores = first.full_rows, first.scores
            prefill.given = first.choices
            self.cut.again(prefill, first)
            previous.prefill, self.prefilled = prefill, previous
            return previous
        device, ids = layout.visual.device, self._row_ids(batch)
        step = self.episodes.start(ids, prefill, visual=layout.visual.shape[1], device=device)
        full = list(step.full)
        own = self.cut.begin(prefill, ids, full, mode=self.mode, frames=frames, kwargs=kwargs)
        step.full = tuple(full)
        prefill.mode = own or self._mode(prefill, full, cache)
        if prefill.mode != "full":
            prefill.seeds = self.episodes.seeds(step, device)
        if prefill.mode == "hide" and any(full):
            prefill.full_rows = on_device(full, device, bool)
        if len(set(ids)) < batch:
            leaders = [ids.index(name) for name in ids]
            prefill.leader = on_device(leaders, device)
        if all(full) and prefill.mode == "drop":
            prefill.given = all_kept(prefill, batch)
        self.latest = step
        self._open = step if self._in_step else None
        self.prefilled = step
        return step

    def _mode(self, prefill: Prefill, full: list[bool], cache: Any) -> Mode:
        """What happens to tokens that are not kept in this prefill.

        Raises:
            NotImplementedError: a prefill that cannot be cut in this cache.
        """
        earlier = prefill.before
        if not self.plan.cuts or (all(full) and earlier is None):
            return "full"
        mode: Mode = "hide" if any(full) and not all(full) else self.mode
        if earlier is not None and (mode == "hide" or earlier.mode == "hide"):
            raise NotImplementedError(
                'a second image in a cache whose first one was pruned needs `mode="drop"` and '
                "episodes that are all at the same step; use one cache per episode, or begin anew."
            )
        if earlier is not None and self.plan.cuts[0] == 0:
            raise NotImplementedError(
                f"method {self.method.name!r} cuts before layer 0, where a second image in the "
                "same cache is not supported; use `layer` >= 1, or give the whole prompt at once."
            )
        if cache is not None and not self.plan.one_mask:
            kind = type(self.adapter.decoder).__name__
            raise NotImplementedError(
                f"{kind} has layers of several kinds, and the mask of a kind is sized by its first "
                f"layer, which lies behind the cut before layer {self.plan.cuts[0]}; with a cache "
                "the masks would not fit. Cut later (`layer`), or run without a cache."
            )
        return mode

    def _index(self, layout: Layout, batch: int, length: int) -> tuple[TokenIndex, tuple[int, ...]]:
        """What follows from a layout, worked out once for each."""
        known = self._known
        if known is None or known[0] is not layout or known[1:3] != (batch, length):
            with torch.inference_mode(False):  # They may be saved for a backward pass later.
                index = TokenIndex.of(layout, batch, length)
            known = (layout, batch, length, index, self._counts(layout))
            self._known = known
        return known[3], known[4]

    def _counts(self, layout: Layout) -> tuple[int, ...]:
        """Visual tokens that each cut has to leave.

        Raises:
            ValueError: a budget that does not fit these cameras, or a layout that does not say
                which rows are text to a method that needs it.
        """
        if self.plan.needs_text and layout.text_rows is None:
            raise ValueError(
                f"method {self.method.name!r} needs to know which tokens are the instruction, and "
                f"{type(self.adapter).__name__} does not say, or there is none; set "
                "`Layout.text_rows` in the adapter, or use another method."
            )
        cuts = self.plan.cuts
        if not cuts:
            return ()
        counts = tuple(self.method.schedule(layout.views, self.plan.depth))
        falling = (sum(layout.views), *counts)
        if len(counts) != len(cuts) or any(not 0 <= b <= a for a, b in pairwise(falling)):
            raise ValueError(
                f"method {self.method.name!r} plans to leave {counts} tokens after its cuts before "
                f"layers {cuts}; expected one number for each, none larger than the one before or "
                f"than the {sum(layout.views)} visual tokens."
            )
        return tuple(max(count, len(layout.read)) for count in counts)

    def _row_ids(self, batch: int) -> tuple[Hashable, ...]:
        if self.ids is None:
            return tuple(row // self._copies for row in range(batch))
        ids = tuple(name for name in self.ids for _ in range(self._copies))
        if len(ids) != batch:
            raise ValueError(
                f"`session.episodes` named {len(ids)} rows, but this batch has {batch}."
            )
        return ids

    # ------------------------------------------------------------------ caches
    def _mark(self, cache: Any, step: Step | None) -> None:
        if cache is not None and hasattr(cache, "__dict__"):
            setattr(cache, _MARK, Mark(self, step))

    def _marked(self, cache: Any) -> Mark | None:
        mark = getattr(cache, _MARK, None)
        return mark if isinstance(mark, Mark) else None

    def _continued(self, cache: Any, past: int) -> Step | None:
        """The step whose prefill filled a cache of `past` tokens; None: it was left alone.

        Raises:
            RuntimeError: a pruned cache of which this session knows nothing.
        """
        if past == 0 or cache is None:
            return None
        mark = self._marked(cache)
        if mark is None and self._open is not None and self._fits(cache, self._open, past):
            return self._open  # Copied by the policy, within one call.
        known = mark is not None and mark.passes() is self
        if mark is not None and mark.step is not None and not known:
            if mark.step.prefill.mode == "full":
                return None
            raise RuntimeError(
                "this cache was filled and pruned in another session; continue it while that one "
                "is attached, or prefill it again."
            )
        if mark is None or mark.step is None:
            if not isinstance(cache, tuple) and self.plan.cuts and not self._even(cache):
                raise RuntimeError(
                    "this cache holds fewer tokens in some layers than in others and does not say "
                    "why: it is a copy, made by hand, of one that was pruned. Copy caches with "
                    "`copy.deepcopy(cache)`, or prefill again."
                )
            return None
        if not self._fits(cache, mark.step, past):
            raise RuntimeError(
                f"this cache now holds {past} tokens, which is not what its prefill and the "
                "tokens after it left there; it was cropped or rebuilt, which pruning does not "
                "follow. Prefill it again."
            )
        return mark.step

    def _of_reader(self, cache: Any) -> Step | None:
        """The step whose cache an action expert reads; it may be a copy that the policy made."""
        mark = self._marked(cache)
        if mark is not None:
            return mark.step
        step = self.prefilled
        if cache is None or step is None or isinstance(cache, tuple):
            return None
        return step if self._fits(cache, step, _seen(cache)) else None

    def _fits(self, cache: Any, step: Step, past: int) -> bool:
        """Whether every layer holds what the step's prefill left there, and what came later."""
        prefill = step.prefill
        if past < prefill.total:
            return False
        if self.cut.static_cache or not hasattr(cache, "layers"):
            return True
        for number, layer in enumerate(self.plan.first):
            if not layer:
                continue
            retained = prefill.sets[number].retained if prefill.mode == "drop" else None
            removed = 0 if retained is None else prefill.total - retained.shape[1]
            if past - int(cache.get_seq_length(layer)) != removed:
                return False
        return True

    def _even(self, cache: Any) -> bool:
        if self.cut.static_cache or not hasattr(cache, "layers"):
            return True
        layers = [layer for layer in self.plan.first if layer]
        first = int(cache.get_seq_length())
        return all(int(cache.get_seq_length(layer)) in (0, first) for layer in layers)

    # ------------------------------------------------------------------ refusals
    def _check(self, step: Step, stack: nn.Module, cache: Any, batch: int, length: int) -> None:
        """Refuse what would go wrong without a word."""
        if len(step.ids) != batch:
            raise ValueError(
                f"this cache was filled by {len(step.ids)} rows and is continued with {batch}; "
                "batches cannot change between prefill and decode while pruning."
            )
        if stack.training and getattr(stack, "gradient_checkpointing", False):
            raise NotImplementedError(
                "gradient checkpointing runs layers twice, which pruning does not follow; call "
                "`model.gradient_checkpointing_disable()` or `model.eval()`."
            )
        window = self.plan.window
        if window is None or step.prefill.mode == "full" or stack is not self.adapter.decoder:
            return
        seen = step.prefill.total if self.cut.phase == "prefill" else _seen(cache) + length
        if seen > window:
            raise NotImplementedError(
                f"this pass reaches {seen} tokens, and layers behind the cut look back on a "
                f"sliding window of {window}, which removed tokens would shift. Keep prompt and "
                f"answer within {window} tokens, or use a model without sliding windows."
            )

    def _refuse_split(self, layout: Layout | None, step: Step | None, past: int) -> None:
        if layout is None or step is None or step.prefill.total != past:
            return
        last = step.prefill.layout.visual.shape[1] - 1
        if last in step.prefill.layout.read and bool((layout.visual[:, 0] == 0).any()):
            raise NotImplementedError(
                "an image began in one pass and goes on in the next; an image that is split over "
                "several passes cannot be pruned as a whole. Give the prompt at once."
            )

    def _refuse_unhooked(self, prefill: Prefill) -> None:
        """After a prefill: hooks that should have run and have not."""
        if prefill.mode != "full":
            for cut, left in zip(self.plan.cuts, prefill.sets[1:], strict=True):
                if left.columns is None:
                    raise RuntimeError(
                        f"the hooks of decoder layer {cut} did not run, so that nothing was cut: "
                        "something has replaced the layer since the session began, or runs a "
                        "compiled copy. Attach vla-pruner last."
                    )
        readers = bool(self.cut.readers)
        expected = 0 if readers or not self.plan.action_layers else len(self.plan.action_layers)
        if prefill.watched < expected:
            attention = self.adapter.attention(self.adapter.layers[self.plan.action_layers[0]])
            raise NotImplementedError(
                f"{expected - prefill.watched} of the {expected} layers whose action attention is "
                f"watched ({type(attention).__name__}) ran without showing it; use a decoder whose "
                "attention is chosen by `config._attn_implementation`, or a method without action "
                "scores. If something has replaced the layers since, attach vla-pruner last."
            )

    def _leave_alone(self, reason: str | None, length: int) -> None:
        """Say once that an image may have been left alone, and note it for `session.last`."""
        if reason is None:
            return
        if not self._warned:
            self._warned = True
            warnings.warn(f"vla-pruner left a prefill alone: {reason}", stacklevel=2)
        blank = torch.zeros(1, 0, dtype=torch.int64)
        index = TokenIndex.of(Layout(blank, ()), 1, length)
        prefill = Prefill(Layout(blank, ()), "full", index, (TokenSet((), blank, blank),))
        self.latest = Step((), (), (), prefill, 0, left_alone=reason)


def _seen(cache: Any) -> int:
    """Tokens in a cache."""
    if cache is None:
        return 0
    return len(cache) if isinstance(cache, tuple) else int(cache.get_seq_length())


def _options(
    model: nn.Module, generate: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[[str], Any]:
    """What `generate` was told, by keyword, in a `GenerationConfig`, or by the model's own."""
    try:
        bound = _by_name(generate, args, kwargs)
    except TypeError:  # `generate` itself will say what is wrong.
        bound = dict(kwargs)
    configs = (bound.get("generation_config"), getattr(model, "generation_config", None))

    def option(name: str) -> Any:
        if bound.get(name) is not None:
            return bound[name]
        found = [getattr(config, name, None) for config in configs]
        return next((value for value in found if value not in (None, 1, False)), None)

    return option


def _by_name(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of a call, all by name. Errors: TypeError, as the call itself would raise."""
    signature = inspect.signature(function)
    bound = dict(signature.bind_partial(*args, **kwargs).arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            bound |= bound.pop(parameter.name, {})
    return bound
