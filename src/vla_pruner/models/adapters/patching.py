"""Methods of somebody else's objects, replaced for the time of a session."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import nn

from vla_pruner.core.hooks import Hook, replace
from vla_pruner.core.session import Session


def run_hooks_on_forward(module: nn.Module, undo: ExitStack) -> None:
    """Make `module.forward(...)` run the module's hooks, as `module(...)` does."""
    original: Callable[..., Any] = module.forward
    entered = False

    def enter(*_: Any) -> None:
        nonlocal entered
        entered = True

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal entered
        if entered:
            entered = False
            return original(*args, **kwargs)
        try:
            return module(*args, **kwargs)
        finally:
            entered = False

    undo.callback(module.register_forward_pre_hook(Hook(enter)).remove)
    replace(module, "forward", forward, undo)


def run_uncompiled(owner: nn.Module, name: str, undo: ExitStack) -> None:
    """Let a method that was compiled on the object run as written: compiled code skips hooks."""
    compiled = vars(owner).get(name)
    original = getattr(compiled, "_torchdynamo_orig_callable", None)
    if original is not None:
        replace(owner, name, original, undo)


def reset_with(policy: Any, session: Session, undo: ExitStack) -> None:
    """Begin new episodes in the session whenever the policy is reset."""
    original: Callable[..., Any] = policy.reset

    def reset(*args: Any, **kwargs: Any) -> Any:
        session.reset()
        return original(*args, **kwargs)

    replace(policy, "reset", reset, undo)


def one_step(owner: Any, name: str, session: Session, undo: ExitStack) -> None:
    """Make each call of a method one step of the session, however many prefills it runs."""
    original: Callable[..., Any] = getattr(owner, name)

    def stepped(*args: Any, **kwargs: Any) -> Any:
        with session.step():
            return original(*args, **kwargs)

    replace(owner, name, stepped, undo)
