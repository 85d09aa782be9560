"""Calls of a pruned model: one thread at a time, which of them are one step, and `generate`."""

from __future__ import annotations

import inspect
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from types import CodeType
from typing import Any

import torch
from torch import nn

from vla_pruner.core import refusals
from vla_pruner.core.cleanup import after, before, replace
from vla_pruner.core.episodes import Step

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
        self.grows = False
        """Whether they are one prompt, read anew without a cache with one more token each time."""
        self.copies = 1
        """Rows that `generate` makes of each row that it is given."""
        self._lock = threading.Lock()
        self._owner: threading.Thread | None = None
        self._inside: list[Any] = []
        self._began = 0.0
        self._generate: CodeType | None = None

    def attach(self, model: nn.Module, undo: ExitStack) -> None:
        """Follow the calls of a model that holds the decoder, until `undo`."""
        before(model, self.begins, undo)
        after(model, self._returns, undo, always=True)

    @torch.compiler.disable
    def begins(self, what: Any, *_: Any) -> None:
        """A call of `what` begins: of the model, of a stack of layers, or a step of several calls.

        Raises:
            RuntimeError: another thread is inside.
        """
        me = threading.current_thread()
        with self._lock:
            if self._owner is not me:
                if self._owner is not None and self._inside and self._owner.is_alive():
                    raise refusals.second_thread(self._owner, me)
                self._owner, self._inside = me, []
            if what in self._inside:  # An earlier call of it never came back.
                del self._inside[self._inside.index(what) :]
            self._inside.append(what)
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

    @torch.compiler.disable
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
                self.together, self.shared = False, None
            self.ends(inside, failed=failed)

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
