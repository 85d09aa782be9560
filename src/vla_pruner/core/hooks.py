"""What a session puts on a model, and takes off again: the undo is written before the do.

Hooks, methods that are replaced, and attentions that also tell an observer what they compare.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import SimpleNamespace, TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Self

from torch import Tensor, nn

from vla_pruner.core import refusals

if TYPE_CHECKING:
    from vla_pruner.core.cut import Cut


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


# -- layers that do not run at all: what goes in comes out -----------------------------------------


def skip_layers(cut: Cut, followers: Sequence[nn.Module], undo: ExitStack) -> None:
    """Skip the plan's layers in passes that are followed, and those of a stack that follows."""

    def see_output(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """After layer 0: what a layer has to return."""
        cut.tuples = isinstance(output, tuple | list)
        if cut.tuples and len(output) > 1:
            raise refusals.several_outputs(layer, len(output))

    def skip(layer: nn.Module) -> None:
        original: Callable[..., Any] = layer.forward

        def skipped(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if cut.prefill is None:
                return original(hidden_states, *args, **kwargs)
            return (hidden_states,) if cut.tuples else hidden_states

        replace(layer, "forward", skipped, undo)

    for index in sorted(cut.plan.skipped):
        for layers in [cut.layers, followers] if followers else [cut.layers]:
            skip(layers[index])
    after(cut.layers[0], see_output, undo)


# -- attentions that show what they compare ------------------------------------------------------

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
            f"{type(attention).__name__} has no `config._attn_implementation` by which its "
            "attention function is chosen, so that scores cannot be read there. Use a method "
            "without scores (divprune, random); or, where the attention is a module of another "
            "name, override `Adapter.attention`."
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
        f"{type(attention).__name__} computes its attention itself (there is no "
        "`eager_attention_forward` beside it), so that scores cannot be read there. Load the model "
        'with attn_implementation="sdpa", if it knows that, or use a method without scores '
        "(divprune, random)."
    )


def queries_and_keys(layer: nn.Module, given: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """See `Adapter.project`; `given` is the layer's attention."""
    attention: Any = given
    norm: Any = getattr(layer, "input_layernorm", None)
    if norm is None or not all(hasattr(attention, n) for n in ("q_proj", "k_proj", "head_dim")):
        raise NotImplementedError(
            f"{type(layer).__name__} has no input_layernorm, q_proj and k_proj, so its logits "
            "cannot be computed; override `Adapter.project`, or use a score of attention."
        )
    found, normed = [], norm(hidden)
    normed = normed[0] if isinstance(normed, tuple) else normed  # pi0's norms add a gate
    for name in ("q", "k"):
        heads = getattr(attention, f"{name}_proj")(normed)
        heads = heads.unflatten(-1, (-1, attention.head_dim))
        per_head_norm = getattr(attention, f"{name}_norm", None)
        heads = heads if per_head_norm is None else per_head_norm(heads)
        found.append(heads.transpose(1, 2))
    return found[0], found[1]
