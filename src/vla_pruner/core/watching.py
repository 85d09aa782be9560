"""How an attention shows what it compares: an implementation that also tells an observer."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from vla_pruner.core.cleanup import Hook

Observer = Callable[[nn.Module, Tensor, Tensor, Tensor | None, dict[str, Any]], None]
"""Called after an attention: module, query [B, Hq, Q, D], key [B, Hkv, N, D], mask, arguments."""

Probed = Callable[[Callable[..., Any]], Callable[..., Any]]

OBSERVER = "_vla_pruner_observer"
"""Attribute of an attention module that is watched."""

_PREFIX = "vla_pruner_"


class Shown(nn.Module):
    """Stands for an attention that is no module of its own; whoever runs it calls `show`."""

    observer: Observer | None = None

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(_attn_implementation="eager")

    def show(self, query: Tensor, key: Tensor, mask: Tensor | None, **arguments: Any) -> None:
        """Hand queries `[B, Hq, Q, D]`, keys `[B, Hkv, N, D]` and mask to the observer, if any."""
        if self.observer is not None:
            self.observer(self, query, key, mask, arguments)


def implementation(attention: nn.Module) -> str:
    """Name of the attention implementation ("sdpa", "eager", ...) that a module uses, unprobed.

    Raises:
        TypeError: the module does not choose its attention by name.
    """
    name = getattr(getattr(attention, "config", None), "_attn_implementation", None)
    if not isinstance(name, str):
        raise TypeError(
            f"{type(attention).__name__} has no `config._attn_implementation`, so its attention "
            "cannot be watched; use a decoder of transformers, or a method that needs no scores."
        )
    return name.removeprefix(_PREFIX).partition("@")[0]


def show_to(observer: Observer, attention: nn.Module, undo: ExitStack, probed: Probed) -> None:
    """Call `observer` after each attention of one module, which keeps its implementation.

    The module gets its own copy of the configuration, with a registered implementation that calls
    the old one first; other modules, which share the configuration, are not touched. `probed` makes
    it from the old one, and leaves that in an attribute `attend`.

    Raises:
        TypeError: see `implementation`.
        NotImplementedError: an implementation that cannot be wrapped.
    """
    if isinstance(attention, Shown):
        undo.callback(setattr, attention, "observer", None)
        attention.observer = Hook(observer)
        return
    name = implementation(attention)
    if name == "flex_attention":
        raise NotImplementedError(
            "flex_attention hides its masks from pruning; load the model with "
            'attn_implementation="sdpa" or "eager".'
        )
    original = attention.config
    private = copy.copy(original)
    private._attn_implementation_internal = _register(attention, name, probed)  # type: ignore[union-attr]

    undo.callback(setattr, attention, "config", original)
    undo.callback(_forget_observer, attention)
    setattr(attention, OBSERVER, Hook(observer))
    attention.config = private


def _forget_observer(attention: nn.Module) -> None:
    if hasattr(attention, OBSERVER):
        delattr(attention, OBSERVER)


def _register(attention: nn.Module, name: str, probed: Probed) -> str:
    """Register the probed version of an implementation; its name keeps the old name in it.

    What is wrapped is looked up anew each time: others may have replaced it in between.
    """
    from transformers import AttentionInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if name == "eager":
        wrapped, home = _eager_attention(attention)
        probed_name = f"{_PREFIX}{name}@{home}"
    else:
        wrapped, probed_name = ALL_ATTENTION_FUNCTIONS[name], _PREFIX + name
    known = ALL_ATTENTION_FUNCTIONS.get(probed_name)
    if getattr(known, "attend", None) is not wrapped:
        AttentionInterface.register(probed_name, probed(wrapped))
    return probed_name


def _eager_attention(attention: nn.Module) -> tuple[Callable[..., Any], str]:
    """The `eager_attention_forward` beside a module's class, and the name of its file."""
    for kind in type(attention).__mro__:
        home = sys.modules.get(kind.__module__)
        function = getattr(home, "eager_attention_forward", None)
        if inspect.isfunction(function):
            return function, kind.__module__
    raise NotImplementedError(
        f"no eager_attention_forward beside {type(attention).__name__}; load the model with "
        'attn_implementation="sdpa".'
    )
