"""`vp.prune`: attach a pruning method to a model. `vp.remove`: take it off again."""

from __future__ import annotations

import re
import warnings
from typing import Any, Literal

from vla_pruner.core.session import Session, session_of
from vla_pruner.methods import build
from vla_pruner.methods.base import Method
from vla_pruner.models.adapters.holders import follow, held
from vla_pruner.models.adapters.patching import run_hooks_on_forward
from vla_pruner.models.base import Adapter, find_adapter, unwrapped
from vla_pruner.models.recipes import settle


def prune(
    model: object,
    method: str | Method = "vla-pruner",
    *,
    keep: float | int | None = None,
    tokens: int | None = None,
    layer: int | None = None,
    adapter: Adapter | None = None,
    replace: bool = False,
    mode: Literal["drop", "mask"] = "drop",
    **method_options: Any,
) -> Session:
    """Prune the visual tokens of every call of `model` until the session is removed.

        with vp.prune(model, "vla-pruner", keep=0.25) as session:
            session.reset()                     # a new episode
            action = model.predict_action(...)  # as ever
            print(session.last)                 # what was kept

    Args:
        model: a `torch.nn.Module` of a known family (`vp.list_models()`), or any other with an
            `adapter`; openpi's `Policy` as it is.
        method: a name (`vp.list_methods()`), the short form "vla-pruner@0.25:window=1", or an
            instance.
        keep: share of the visual tokens that stay, in (0, 1]; None: the method's default.
        tokens: their number, instead of `keep`.
        layer: K, the number of layers that still see every token; None: the method's default.
        adapter: where layers and visual tokens are, for a model that no family knows.
        replace: whether a session that the model already has is removed first.
        mode: "mask" makes the same choice but hides tokens instead of removing them (slow).
        method_options: further options of the method (`vla-pruner methods NAME` lists them).

    Returns:
        A session; leave its `with` block or call `remove()`, and the model is what it was. It lives
        as long as the model does, whether it is kept or not.

    Raises:
        ValueError: an unknown method, option or mode, or a value outside its range.
        TypeError: `model` is no module, runs in JAX, or no family knows it.
        RuntimeError: the model already has a session.
        NotImplementedError: the model's decoder cannot be pruned (the message says why), or the
            transformers that is installed is too old for it.
    """
    module = held(model)
    if isinstance(keep, int) and not isinstance(keep, bool):
        _refuse_one(keep)
    chosen = build(method, keep=keep, tokens=tokens, layer=layer, **method_options)
    if adapter is not None and not isinstance(adapter, Adapter):
        raise TypeError(
            "`adapter` must be an instance of vp.models.Adapter, such as vp.models.Decoder("
            f'layers="model.layers", visual=slice(1, 257)); got {adapter!r}.'
        )
    inner = unwrapped(module)
    adapter = adapter or find_adapter(inner)
    _refuse_old_transformers(adapter)
    if replace:
        remove(inner)
    session = Session(inner, settle(chosen, inner, adapter), adapter, mode=mode)
    if inner is not module:  # peft calls `forward` of the model inside, past its hooks.
        run_hooks_on_forward(inner, session._undo)
    follow(model, session, session._undo)
    return session


def remove(model: object) -> bool:
    """Take the pruning session off a model, whoever has put it there.

    Returns:
        Whether there was one.

    Raises:
        TypeError: `model` is no module.
    """
    session = session_of(unwrapped(held(model)))
    if session is None:
        return False
    session.remove()
    return True


def _refuse_one(keep: int) -> None:
    if keep == 1:
        raise ValueError(
            "`keep=1` may mean everything or one token; write keep=1.0 for all visual tokens, or "
            "tokens=1 for a single one."
        )
    warnings.warn(
        f"`keep={keep}` as a number of tokens is now `tokens={keep}`; `keep` is a share in (0, 1]. "
        "The old spelling goes in version 0.3.",
        DeprecationWarning,
        stacklevel=3,
    )


def _refuse_old_transformers(adapter: Adapter) -> None:
    """Caches had another form before 4.57; only policies that bring their own loop do without."""
    import transformers

    oldest = getattr(adapter, "oldest_transformers", (4, 57))
    found = tuple(int(part) for part in re.findall(r"\d+", transformers.__version__)[:2])
    if found < oldest:
        raise NotImplementedError(
            f"transformers {transformers.__version__} is installed, whose caches this package does "
            f"not know how to shorten; pruning this model needs {'.'.join(map(str, oldest))} or "
            "newer. Upgrade it, or serve the model from an environment of its own."
        )
