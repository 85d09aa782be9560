"""Which step a call belongs to, and which step a cache: one thread at a time, marks on caches."""

from __future__ import annotations

import inspect
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from types import CodeType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vla_pruner._short import cut as cut_text
from vla_pruner.core import refusals
from vla_pruner.core.arguments import cache_in, take
from vla_pruner.core.episodes import Step
from vla_pruner.core.hooks import after, before, replace
from vla_pruner.core.tokens import Prefill

if TYPE_CHECKING:
    from vla_pruner.core.cut import Cut
    from vla_pruner.core.passes import Pass

_MARK = "_vla_pruner_mark"
_CALL = nn.Module._call_impl.__code__
_GUESSING = (
    "assistant_model",
    "prompt_lookup_num_tokens",
    "assistant_early_exit",
    "use_mtp",
    "speculation_type",
)
_PACKING = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")


class Calls:
    """What is being called; the step of a call that failed, or never came back, never was."""

    def __init__(self) -> None:
        self.step: Step | None = None
        """The step that the outermost call in progress has come to."""
        self.together = False
        """Whether all prefills of the outermost call belong to one step."""
        self.shared: Step | None = None
        """That step, once it has begun."""
        self.shown: Tensor | None = None
        """`[B, M, ...]`, visual tokens as its first prefill brought them."""
        self.grows = False
        """Whether they are one prompt, read anew without a cache with one more token each time."""
        self.copies = 1
        """Rows that `generate` makes of each row that it is given."""
        self.model: nn.Module | None = None
        """The model that holds the decoder."""
        self._lock = threading.Lock()
        self._owner: threading.Thread | None = None
        self._inside: list[Any] = []
        self._began = 0.0
        self._generate: CodeType | None = None
        self.captured = False
        """Whether a whole step is compiled, and brackets its passes itself."""
        self.failed: str | None = None
        """What the last pass that failed, or was refused, said."""
        self.ran: list[tuple[int, ...]] = []
        """Batch and length of the decoder's passes in one call of what holds it, which runs it once
        over as many rows."""

    def attach(self, model: nn.Module, decoder: nn.Module, undo: ExitStack) -> None:
        """Follow the calls of a model, and of what in it holds the decoder, until `undo`."""
        self.model = model
        holders = [one for one in model.modules() if one is not decoder]
        for module in [one for one in holders if any(part is decoder for part in one.modules())]:
            before(module, self._outside_graphs(self.begins), undo)
            after(module, self._outside_graphs(self._returns), undo, always=True)

    def watch_behind(
        self, model: nn.Module, stacks: Iterable[nn.Module], layers: Iterable[nn.Module], undo: Any
    ) -> None:
        """Refuse layers built like the decoder's that read the rows of its prompt behind it."""
        kinds = {type(layer) for layer in layers}
        own = {id(part) for stack in stacks for part in stack.modules()}
        for other in model.modules():
            if type(other) in kinds and id(other) not in own:
                before(other, self._outside_graphs(self._refuse_behind), undo)

    def _refuse_behind(self, layer: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
        step, hidden = self.step, args[0] if args else kwargs.get("hidden_states")
        if step is None or not isinstance(hidden, Tensor):
            return
        if hidden.shape[:2] == (len(step.ids), step.prefill.length):
            raise refusals.behind_the_decoder(layer, step.prefill.length)

    def _outside_graphs(self, hook: Callable[..., None]) -> Callable[..., None]:
        outside = torch.compiler.disable(hook)
        return lambda *args: None if self.captured else outside(*args)

    def begins(self, what: Any, *_: Any, rows: tuple[int, ...] = ()) -> None:
        """A call begins: a module's, a stack's (`rows`: batch and length), or a step's."""
        me = threading.current_thread()
        with self._lock:
            if self._owner is not me:
                if self._owner is not None and self._inside and self._owner.is_alive():
                    raise refusals.second_thread(self._owner, me)
                self._owner, self._inside = me, []
            if what in self._inside:  # An earlier call of it never came back.
                del self._inside[self._inside.index(what) :]
            self._inside.append(what)
        if not any(isinstance(one, nn.Module) for one in self._inside[-2:-1]):
            self.ran = []
        if rows in self.ran and (self.grows or not self.together):
            raise refusals.ran_again(what, rows[1])
        self.ran += [rows] if rows[1:] > (1,) else []
        if self.model not in self._inside:
            refusals.refuse_past_hooks(self.model)
        if len(self._inside) == 1:
            if self.step is not None:
                self.step.failed = True
            self.step, self._began = None, time.perf_counter()

    def ends(self, what: Any, *, failed: bool = False) -> bool:
        """It is over; whether it was a call of this thread."""
        with self._lock:
            mine = self._owner is threading.current_thread() and what in self._inside
            if mine:
                del self._inside[self._inside.index(what) :]
        if mine and not self._inside and self.step is not None:
            self.step.failed |= failed
            self.step.ms, self.step = 1e3 * (time.perf_counter() - self._began), None
        return mine

    def note(self, output: Any) -> None:
        """Keep in words what ended a pass that has no output."""
        if output is None and (error := sys.exc_info()[1]) is not None:
            self.failed = f"{type(error).__name__}: {cut_text(str(error), 300)}"

    def running(self) -> threading.Thread | None:
        """The thread that is inside a call of the model just now, by its stack; None: nobody is."""
        with self._lock:
            owner, inside = self._owner, list(self._inside)
        frame = None
        if owner is not None and owner.ident is not None and inside:
            frame = sys._current_frames().get(owner.ident)
        while frame is not None:
            caller = frame.f_locals.get("self") if frame.f_code is _CALL else None
            if frame.f_code is self._generate or any(caller is one for one in inside):
                return owner
            frame = frame.f_back
        return None

    def _returns(self, model: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.ends(model, failed=output is None)

    @contextmanager
    def as_one_step(self, *, grows: bool = False) -> Iterator[None]:
        """All prefills inside belong to one policy step; an exception undoes the step."""
        inside, outer, failed = object(), self.together, True
        self.begins(inside)  # Refuses other threads before anything is touched.
        if not outer:
            self.together, self.shared, self.grows = True, None, grows
        try:
            yield
            failed = False
        finally:
            if not outer:
                if failed and self.shared is not None:
                    self.shared.failed = True
                self.together, self.shared, self.shown = False, None, None
            self.ends(inside, failed=failed)

    def share(self, step: Step, inputs: Tensor, mode: str) -> None:
        """Later prefills of the step in progress follow this one, which got `inputs` [B, S, ..]."""
        if self.grows and self.shared is not None:  # A logits processor may have called.
            return
        if self.shared is not step and mode == "drop" and not self.grows:
            self.shown = take(inputs, step.prefill.layout.visual, dim=1)
        self.shared = step

    def refuse_other_image(self, decoder: nn.Module, inputs: Tensor, visual: Tensor) -> None:
        """Refuse one more prefill of a step that shows something else at `visual` [B, M]."""
        if self.shown is not None:
            refusals.refuse_other_image(decoder, self.shown, take(inputs, visual, dim=1))

    def follow_generate(self, model: nn.Module, undo: ExitStack) -> None:
        """`model.generate` is one step, with its beams and samples told apart from episodes."""
        generate = getattr(model, "generate", None)
        if not callable(generate):
            return

        def generating(*args: Any, **kwargs: Any) -> Any:
            option = _options(model, generate, args, kwargs)
            for name in _GUESSING:
                if option(name) not in (None, False):
                    raise refusals.guesses(name)
            if option("prefill_chunk_size") is not None:
                raise refusals.chunked_prefill()
            with self.as_one_step(grows=True):
                copies = self.copies
                self.copies = max(option(n) or 1 for n in ("num_beams", "num_return_sequences"))
                try:
                    return generate(*args, **kwargs)
                finally:
                    self.copies = copies

        def packing(name: str, *args: Any, **kwargs: Any) -> None:
            raise refusals.packs(name)

        self._generate = generating.__code__
        replace(model, "generate", generating, undo)
        for name in _PACKING:
            if hasattr(model, name):
                replace(model, name, partial(packing, name), undo)


def _options(
    model: nn.Module, generate: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[[str], Any]:
    """What `generate` was told, by keyword, in a `GenerationConfig`, or by the model's own."""
    try:
        bound = by_name(generate, args, kwargs)
    except TypeError:  # `generate` itself will say what is wrong.
        bound = dict(kwargs)
    given, own = bound.get("generation_config"), getattr(model, "generation_config", None)
    configs = [(config, type(config)()) for config in (given, own) if config is not None]

    def option(name: str) -> Any:
        if bound.get(name) is not None:
            return bound[name]
        for config, default in configs:
            value = getattr(config, name, None)
            # Where it is the default of its class, nobody has said it.
            if value is not None and value != getattr(default, name, None):
                return value
        return None

    return option


def by_name(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of a call, all by name. Errors: TypeError, as the call itself would raise."""
    signature = inspect.signature(function)
    bound = dict(signature.bind_partial(*args, **kwargs).arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            bound |= bound.pop(parameter.name, {})
    return bound


# -- caches --------------------------------------------------------------------------------------


@dataclass(eq=False)
class Mark:
    """What a session knows of a cache; copies of the cache share it."""

    caches: weakref.ref[Caches]
    step: Step | None
    """None: it holds no image that this session has seen."""
    order: Order | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Mark:
        return self

    def __reduce__(self) -> Any:
        return (_nothing, ())


def _nothing() -> None:
    return None


class Order:
    """Tells whether the rows of a cache, which are different episodes, stand as they stood.

    A cache that something else has written to is compared with what the prefill left in its last
    slot; one that only passes have written to is known by its tensor, without looking at values.
    """

    def __init__(self, keys: Tensor, slot: int) -> None:
        self.slot = slot
        self.rows = keys[:, :, slot].detach().clone()
        self.written(keys)

    def written(self, keys: Tensor) -> None:
        """A pass has written these keys."""
        self.latest, self.version = weakref.ref(keys), _version(keys)

    def is_kept(self, keys: Tensor) -> bool:
        """Whether these keys `[B, H, N, D]` have the rows in the same order."""
        if self.latest() is keys and self.version == _version(keys):
            return True
        if keys.shape[:2] != self.rows.shape[:2] or keys.shape[2] <= self.slot:
            return True  # Other checks say what is wrong.
        rows, now = self.rows.float(), keys[:, :, self.slot].to(self.rows.device).float()
        # Rows that are beams of one episode are alike but for rounding.
        nearly = 8 * torch.finfo(self.rows.dtype).eps * rows.abs().max()
        return bool((rows - now).abs().max() <= nearly)


def _version(keys: Tensor) -> int | None:
    return None if keys.is_inference() else keys._version


class Caches:
    """Marks the caches of one decoder."""

    def __init__(self, cut: Cut) -> None:
        self.cut, self.plan = cut, cut.plan
        self.alone: Step | None = None
        """The step of the last prefill, if it was given no cache."""
        self.lost: Step | None = None
        """The same, if nobody knows where it left its keys and values."""

    def mark(self, cache: Any, step: Step | None) -> None:
        """This cache belongs to a step; None: it holds no image."""
        self.alone, self.lost = None, None if hasattr(cache, "__dict__") else step
        if hasattr(cache, "__dict__"):
            setattr(cache, _MARK, Mark(weakref.ref(self), step))

    def behind(self, now: Pass, output: Any, step: Step | None, *, in_prefill: bool) -> Any:
        """The cache that a pass has written to: its own, or one that the decoder has made."""
        if now.cache is not None and (step is not None or now.past):
            self._refuse_elsewhere(now)
        made = getattr(output, "past_key_values", None)
        made = _made(output, step) if made is None else made
        if now.cache is None and (in_prefill or step is None):
            self.mark(made, step)
            self.alone = step
        elif made is not None and made is not now.cache and self.of(made) is None:
            self.mark(made, step)
        return made if now.cache is None else now.cache

    def _refuse_elsewhere(self, now: Pass) -> None:
        """Refuse a prefill that the first layer of its cache does not hold."""
        if now.length == 1 or now.kwargs.get("use_cache") is False:
            return
        if now.stack is self.cut.adapter.decoder and not self.cut.readers:
            holds = int(now.cache.get_seq_length())
            if holds != now.past + now.length:
                raise refusals.written_elsewhere(now.stack, now.past, now.length, holds)

    def refuse_hidden(self, now: Pass) -> None:
        """Refuse a token that goes on from keys and values which the decoder keeps to itself."""
        alone = self.alone
        if now.cache is None and now.length == 1 and alone and len(alone.ids) == now.batch:
            places = (now.kwargs.get(name) for name in ("position_ids", "cache_position"))
            if any(isinstance(one, Tensor) and bool((one > 0).any()) for one in places):
                raise refusals.unshown_cache(now.stack)

    def of(self, cache: Any) -> Mark | None:
        """The mark of a cache."""
        mark = getattr(cache, _MARK, None)
        return mark if isinstance(mark, Mark) else None

    def continued(self, now: Pass, shared: Step | None) -> Step | None:
        """The step whose prefill filled the cache of a pass; None: it was left alone.

        `shared` is the step in progress, if all of a call is one.

        Raises:
            RuntimeError: a pruned cache of which this session knows nothing.
        """
        cache, past = now.cache, now.past
        mark = self.of(cache)
        if mark is None and shared is not None and self.fits(cache, shared, past):
            return shared  # Copied by the policy, within one call.
        if mark is None and self.lost is not None and self.lost.prefill.total == past:
            raise refusals.unshown_cache(now.stack)
        if mark is None or mark.step is None:
            if self.plan.cuts and not self._even(cache):
                raise refusals.uneven_cache()
            return None
        if mark.caches() is not self:
            if mark.step.prefill.mode == "full":
                return None
            raise refusals.other_session()
        if not self.fits(cache, mark.step, past):
            raise refusals.changed_cache(past)
        keys = _last_keys(cache, past)
        if mark.order is not None and keys is not None and not mark.order.is_kept(keys):
            raise refusals.other_order()
        return mark.step

    def written(self, cache: Any, step: Step, past: int, *, in_prefill: bool) -> None:
        """A pass of a batch of different episodes has written to this cache, which held `past`."""
        mark, keys = self.of(cache), _last_keys(cache, past)
        if mark is None or keys is None:
            return
        slot = _held(step.prefill) - 1
        if in_prefill and slot < keys.shape[2]:
            mark.order = Order(keys, slot)
        elif mark.order is not None:
            mark.order.written(keys)

    def fits(self, cache: Any, step: Step, past: int) -> bool:
        """Whether every layer holds what the step's prefill left there, and what came later."""
        prefill = step.prefill
        if past < prefill.total:
            return False
        if self.cut.static_cache or not hasattr(cache, "layers"):
            return True
        for number, layer in enumerate(self.plan.first):
            if layer and past - int(cache.get_seq_length(layer)) != prefill.total - _held(
                prefill, number
            ):
                return False
        return True

    def _even(self, cache: Any) -> bool:
        if self.cut.static_cache or not hasattr(cache, "layers"):
            return True
        layers = [layer for layer in self.plan.first if layer]
        first = int(cache.get_seq_length())
        return all(int(cache.get_seq_length(layer)) in (0, first) for layer in layers)


def _held(prefill: Prefill, number: int = -1) -> int:
    """Tokens that layers after `number` cuts hold after a prefill; -1: after all cuts."""
    retained = prefill.sets[number].retained if prefill.mode == "drop" else None
    return prefill.total if retained is None else retained.shape[1]


def _made(output: Any, step: Step | None) -> Any:
    """The cache that a decoder has made: its layers were given it, or it stands in the output."""
    for left in () if step is None else step.prefill.sets:
        if (found := cache_in(left.given or {})) is not None:
            return found
    return _cache_among(output)


def _cache_among(value: Any, depth: int = 4) -> Any:
    """The first cache in tuples, dicts and objects, however they are nested."""
    if hasattr(value, "get_seq_length") and hasattr(value, "update"):
        return value
    if depth == 0 or isinstance(value, Tensor | nn.Module | str | type(None)):
        return None
    parts = (
        value.values() if isinstance(value, Mapping) else getattr(value, "__dict__", {}).values()
    )
    parts = value if isinstance(value, tuple | list) else parts
    found = (_cache_among(part, depth - 1) for part in parts)
    return next((one for one in found if one is not None), None)


def _last_keys(cache: Any, past: int) -> Tensor | None:
    """`[B, H, N, D]` keys of the last layer, if they stand where they were written."""
    layers = getattr(cache, "layers", None)
    layer = layers[-1] if layers else None
    keys = getattr(layer, "keys", None)
    if not isinstance(keys, Tensor) or keys.ndim != 4:
        return None
    moves = getattr(layer, "is_sliding", False) and past >= getattr(layer, "sliding_window", 0) - 1
    return None if moves else keys


def tokens_in(cache: Any) -> int:
    """Tokens in a cache. Errors: NotImplementedError, one that does not say."""
    if not hasattr(cache, "get_seq_length"):
        raise refusals.unknown_cache(cache)
    return int(cache.get_seq_length())
