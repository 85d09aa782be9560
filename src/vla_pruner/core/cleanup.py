"""What a session puts on a model, and takes off again: the undo is written before the do."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import Any, NoReturn, Self

from torch import nn


class Attached:
    """A context manager whose `remove` undoes what was pushed on `_undo`, once."""

    _undo: ExitStack

    def remove(self) -> None:
        """Detach: the model is what it was before. Does nothing the second time."""
        self._undo.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()


class Hook(functools.partial[Any]):
    """A function that a session put on a model.

    A copy of the model would still call the session of the original, so that copying (`deepcopy`)
    and pickling (`torch.save(model)`) are refused with a RuntimeError.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise RuntimeError(_COPY)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise RuntimeError(_COPY)


def before(module: nn.Module, function: Callable[..., Any], undo: ExitStack) -> None:
    """Call `function(module, args, kwargs)` before each forward of a module."""
    handle = module.register_forward_pre_hook(Hook(function), with_kwargs=True)
    undo.callback(handle.remove)


def after(
    module: nn.Module, function: Callable[..., Any], undo: ExitStack, *, always: bool = False
) -> None:
    """Call `function(module, args, kwargs, output)` after each forward of a module.

    `always`: also after one that raised an exception, with None as its output.
    """
    handle = module.register_forward_hook(Hook(function), with_kwargs=True, always_call=always)
    undo.callback(handle.remove)


def replace(owner: Any, name: str, value: Callable[..., Any], undo: ExitStack) -> None:
    """Set a method of one object; closing `undo` leaves its `__dict__` as it was."""
    own, original = vars(owner), getattr(owner, name, None)
    if name in own:
        undo.callback(own.__setitem__, name, own[name])
    else:
        undo.callback(own.pop, name, None)
    own[name] = Hook(value)
    if original is not None:  # For those who ask for its signature.
        functools.update_wrapper(own[name], original, updated=())


_COPY = (
    "this model has a pruning session, which a copy would share with the original. Take it off "
    "first (`session.remove()`, or `vp.remove(model)`), copy or save the model, and prune again; "
    "to save weights alone, use `model.state_dict()` or `save_pretrained`."
)
