"""`vp.prune`: attach a pruning method to a model."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from vla_pruner.methods import build
from vla_pruner.methods.base import Method
from vla_pruner.models.base import Adapter, find_adapter
from vla_pruner.models.recipes import settle
from vla_pruner.surgery.session import Session


def prune(
    model: nn.Module,
    method: str | Method = "vla-pruner",
    *,
    keep: float | int | None = None,
    layer: int | None = None,
    adapter: Adapter | None = None,
    mode: Literal["drop", "mask"] = "drop",
    **method_options: Any,
) -> Session:
    """Prune the visual tokens of every call of `model` until the session is removed.

        with vp.prune(model, "vla-pruner", keep=0.25) as session:
            session.reset()                     # a new episode
            action = model.predict_action(...)  # as ever
            session.last                        # what was kept, and why

    Args:
        model: a model of a known family (`vp.models()`), or any other with an `adapter`.
        method: a name (`vp.methods()`) or an instance.
        keep: fraction of the visual tokens in (0, 1], or their number; None: the method's default.
        layer: K, the number of layers that still see every token; None: the method's default.

    You may tinker with:
        adapter: where layers and visual tokens are, for a model that no family knows.
        mode: "mask" makes the same choice but hides tokens instead of removing them (slow).
        method_options: further options of the method (`vla-pruner methods NAME` lists them).

    Returns:
        A session; leave its `with` block or call `remove()`, and the model is what it was.

    Raises:
        ValueError: an unknown method, option or mode, or a value outside its range.
        TypeError: `model` is no module, or no family knows it.
        RuntimeError: the model already has a session.
        NotImplementedError: the model's decoder cannot be pruned (the message says why).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module; got {type(model).__name__}.")
    chosen = build(method, keep=keep, layer=layer, **method_options)
    adapter = adapter or find_adapter(model)
    return Session(model, settle(chosen, model, adapter), adapter, mode=mode)
