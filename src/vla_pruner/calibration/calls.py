"""Calling a model on observations, and hearing what its decoder and its output layer say."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Observation = Mapping[str, Any]
Call = Callable[[Observation], Any]
Tick = Callable[[], None]


def caller(model: nn.Module) -> Call:
    """How to call a model: `predict_action`, or the model itself, with an observation's entries."""
    function = getattr(model, "predict_action", model)

    def call(observation: Observation) -> Any:
        with torch.no_grad():
            return function(**observation)

    return call


def require_observations(observations: Sequence[Observation]) -> None:
    """Refuse an empty list (ValueError)."""
    if not observations:
        raise ValueError("no observations to calibrate on; record some with --episodes.")


@contextmanager
def first_logits(model: nn.Module, decoder: nn.Module) -> Iterator[list[Tensor]]:
    """While inside, a list that gets the last row's logits `[B, vocab]` fp32 of each pass.

    It stays empty for a model whose output layers give no `logits`.
    """
    heard: list[Tensor] = []

    def listen(module: nn.Module, args: Any, output: Any) -> None:
        logits = getattr(output, "logits", None)
        if isinstance(logits, Tensor) and logits.ndim == 3:
            heard.append(logits[:, -1].detach().float())

    handles = [
        module.register_forward_hook(listen)
        for module in model.modules()
        if module is not decoder and any(child is decoder for child in module.modules())
    ]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


def as_action(output: Any) -> np.ndarray | None:
    """An array of actions fp64, None if the output is no array."""
    if isinstance(output, Tensor):
        return output.detach().double().cpu().numpy()
    if isinstance(output, np.ndarray):
        return output.astype(np.float64)
    return None
