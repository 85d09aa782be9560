"""EfficientVLA's search: how much each decoder layer changes what passes through it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vla_pruner.calibration.calls import Call, Observation, Tick, caller, require_observations
from vla_pruner.models.base import Adapter


def importance(before: Tensor, after: Tensor) -> Tensor:
    """`1 - cos(x^l, x^(l+1))` of hidden states `[..., S, D]`, mean over positions: `[...]` fp32."""
    return 1.0 - F.cosine_similarity(before.float(), after.float(), dim=-1).mean(dim=-1)


def layer_importance(
    model: nn.Module,
    adapter: Adapter,
    observations: Sequence[Observation],
    *,
    call: Call | None = None,
    tick: Tick = lambda: None,
) -> list[float]:
    """Importance of every decoder layer, mean over observations and the positions of the prompt.

    Decode steps are not counted.

    Args:
        model: a model without a session.
        adapter: its adapter.
        observations: inputs of `call`, one sequence each.
        call: see `calibration.calls.caller`.
        tick: called after each observation.

    Raises:
        ValueError: no observations, or none of them reached the decoder.
    """
    require_observations(observations)
    call = call or caller(model)
    adapter.bind(model)
    layers = list(adapter.layers)
    total = [0.0] * len(layers)
    passes = [0] * len(layers)

    def listen(number: int) -> Any:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            if before.shape[1] > 1:
                total[number] += float(importance(before.detach(), after.detach()).mean())
                passes[number] += 1

        return hook

    with ExitStack() as undo, torch.no_grad():
        for number, layer in enumerate(layers):
            handle = layer.register_forward_hook(listen(number), with_kwargs=True)
            undo.callback(handle.remove)
        for observation in observations:
            call(observation)
            tick()
    if not all(passes):
        raise ValueError("no image reached the decoder; run `vla-pruner doctor` on it.")
    return [one / count for one, count in zip(total, passes, strict=True)]
