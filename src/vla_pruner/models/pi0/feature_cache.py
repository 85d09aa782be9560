"""Let the expert compute its layers in every N-th flow step only (EfficientVLA's feature cache)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from .modeling import Pi0


@contextmanager
def feature_cache(policy: Pi0, *, every: int = 5) -> Iterator[None]:
    """Inside, flow steps t with `t mod every != 0` reuse what the expert's layers added before.

    What attention and feed-forward of each layer put out in the last computed step is added to the
    new noisy actions instead; norms' gates (pi0.5) and the heads are computed afresh. Approximate,
    and independent of pruning: with a session, action scores come from the computed steps alone.

    Args:
        policy: pi0 or pi0.5.
        every: N, at least 1; 1 changes nothing.

    Raises:
        ValueError: another `every`.

    Source: Yang et al., "EfficientVLA", arXiv 2506.10100, the temporal redundancy of the action
    head.
    """
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"`every={every!r}` must be an integer of at least 1.")
    step = -1

    def restart(*unused: Any) -> None:
        nonlocal step
        step = -1

    def advance(*unused: Any) -> None:
        nonlocal step
        step += 1

    def reusing(compute: Callable[..., Any]) -> Callable[..., Any]:
        held: list[Any] = []

        def forward(*args: Any, **kwargs: Any) -> Any:
            if step % every == 0:
                held[:] = [compute(*args, **kwargs)]
            return held[0]

        return forward

    with ExitStack() as undo:
        undo.callback(policy.language_model.register_forward_pre_hook(restart).remove)
        undo.callback(policy.expert.register_forward_pre_hook(advance).remove)
        for layer in policy.expert.layers:
            blocks: tuple[Any, ...] = (layer.self_attn, layer.mlp)
            for block in blocks:
                _replace_forward(block, reusing(block.forward), undo)
        yield


def _replace_forward(module: nn.Module, forward: Callable[..., Any], undo: ExitStack) -> None:
    """Another `forward` until `undo`."""
    if "forward" in vars(module):
        undo.callback(setattr, module, "forward", module.forward)
    else:
        undo.callback(delattr, module, "forward")
    module.forward = forward
