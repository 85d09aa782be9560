"""Policies that are no module but hold one: openpi's `Policy`."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from torch import nn

from vla_pruner.core.hooks import replace
from vla_pruner.core.session import Session
from vla_pruner.models.adapters.patching import reset_with


def held(model: object) -> nn.Module:
    """The module to prune: the model itself, or the one that openpi's policy holds.

    Raises:
        TypeError: there is none, or the policy runs in JAX.
    """
    if isinstance(model, nn.Module):
        return model
    found = vars(model)["_model"] if _is_openpi(model) else None
    if isinstance(found, nn.Module):
        return found
    if found is not None:
        raise TypeError(
            "this openpi policy runs in JAX, whose steps cannot be changed from outside; convert "
            "its checkpoint with openpi's examples/convert_jax_model_to_pytorch.py, and load that."
        )
    raise TypeError(f"`model` must be a torch.nn.Module; got {type(model).__name__}.")


def follow(model: object, session: Session, undo: ExitStack) -> None:
    """Make a policy ask the module, not what it noted of it, and its `reset` begin episodes."""
    if isinstance(model, nn.Module):
        return
    policy: Any = model

    def sample_actions(*args: Any, **kwargs: Any) -> Any:
        return policy._model.sample_actions(*args, **kwargs)

    replace(policy, "_sample_actions", sample_actions, undo)
    reset_with(policy, session, undo)


def _is_openpi(model: object) -> bool:
    own = getattr(model, "__dict__", {})
    return hasattr(model, "infer") and "_model" in own and "_sample_actions" in own
