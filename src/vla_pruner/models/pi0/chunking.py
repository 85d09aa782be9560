"""Real-time chunking for flow policies: the next chunk continues the one that is being carried out.

arXiv 2506.07339, at inference time alone. While the actions are drawn, each flow step is pulled
towards what is left of the running chunk: fully for the actions that will have been carried out
when the new ones come, less and less behind them, not at all beyond the old chunk's end. The pull
goes through the Jacobian of the denoiser, or takes it for the identity, as lerobot does in fact.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

Jacobian = Literal["identity", "full"]


@dataclass(frozen=True)
class Guide:
    """What the next chunk is to continue.

    Args:
        left: `[n, action_dim]`, actions of the running chunk in robot units; row i is meant for the
            same step as the new chunk's action i.
        delay: how many of the new chunk's actions will have passed when it comes.
        jacobian: see above.
        strongest: largest weight of the pull (beta).
    """

    left: np.ndarray
    delay: int
    jacobian: Jacobian = "identity"
    strongest: float = 5.0

    def __post_init__(self) -> None:
        if self.jacobian not in get_args(Jacobian):
            raise ValueError(f"jacobian={self.jacobian!r}: use {', '.join(get_args(Jacobian))}")
        if self.left.ndim != 2 or self.delay < 0 or self.strongest <= 0:
            raise ValueError(
                f"a guide needs actions [n, dim], a delay of 0 or more and a strength above 0; got "
                f"{self.left.shape}, {self.delay} and {self.strongest}"
            )


def decay(left: int, delay: int, chunk: int) -> Tensor:
    """How much each action of a chunk is held to the old one, fp32 `[chunk]` in [0, 1].

    1 before `delay`, falling exponentially to the end of the `left` ones, 0 behind.
    """
    end = min(left, chunk)
    start = min(delay, end)
    values = torch.zeros(chunk, dtype=torch.float32)
    values[:start] = 1
    for i in range(start, end):
        share = (end - i) / (end - start + 1)
        values[i] = share * math.expm1(share) / math.expm1(1)
    return values


def strength(tau: float, strongest: float) -> float:
    """Weight of the pull at flow time `tau`, from 0 (noise) to 1 (actions); least, 2, at 1/2."""
    if tau <= 0 or tau >= 1:
        return strongest
    return min(strongest, (tau**2 + (1 - tau) ** 2) / (tau * (1 - tau)))


def guided(
    velocity: Callable[[Tensor], Tensor],
    noisy: Tensor,
    now: float,
    wanted: Tensor,
    weights: Tensor,
    guide: Guide,
) -> Tensor:
    """The velocity at `noisy`, pulled towards the wanted actions; like `velocity`'s, fp32.

    Args:
        velocity: of noisy actions `[B, chunk, dim]`, at the time `now`.
        noisy: where the flow is.
        now: 1 for noise, 0 for actions.
        wanted: `[chunk, dim]`, in the policy's units.
        weights: `[chunk, dim]`, 0 where nothing is wanted.
        guide: Jacobian and strength.
    """
    pull = strength(1 - now, guide.strongest)
    if guide.jacobian == "identity":
        found = velocity(noisy)
        return found - pull * weights * (wanted - (noisy - now * found))
    with torch.inference_mode(False), torch.enable_grad():
        place = noisy.detach().clone().requires_grad_()
        found = velocity(place)
        clean = place - now * found
        error = (weights * (wanted - clean)).detach()
        (back,) = torch.autograd.grad(clean, place, error)
    return (found - pull * back).detach()
