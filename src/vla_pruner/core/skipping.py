"""Layers that do not run at all: what goes in comes out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from vla_pruner.core import refusals
from vla_pruner.core.cleanup import after, replace

if TYPE_CHECKING:
    from vla_pruner.core.cut import Cut


def skip_layers(cut: Cut, followers: Sequence[nn.Module], undo: ExitStack) -> None:
    """Skip the plan's layers in passes that are followed, and those of a stack that follows."""

    def see_output(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """After layer 0: what a layer has to return."""
        cut.tuples = isinstance(output, tuple)
        if isinstance(output, tuple) and len(output) > 1:
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
