"""VTW's search: the first layer that can do without visual tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from vla_pruner.calibration.calls import (
    Call,
    Observation,
    Tick,
    as_action,
    caller,
    first_logits,
    require_observations,
)
from vla_pruner.core.session import Session
from vla_pruner.methods.vtw import VTW
from vla_pruner.models.base import Adapter

Measure = Literal["logits", "actions"]

ETA: dict[Measure, float] = {"logits": 0.003, "actions": 0.05}
"""Divergence that is accepted: the paper's for a 7B model; for actions, in standard deviations of
the unpruned actions, our choice."""


@dataclass(frozen=True)
class Withdrawal:
    """How much the output changes if all visual tokens leave before layer K.

    Args:
        measure: what was compared: the last logits of the first pass ("logits"), or the arrays that
            the call returns where no layer gives logits ("actions").
        divergences: mean over observations, by K.
        visual: visual tokens M.
    """

    measure: Measure
    divergences: dict[int, float]
    visual: int


def kl_divergence(full: Tensor, pruned: Tensor) -> Tensor:
    """KL(pruned || full) of the distributions behind logits `[..., vocab]`: `[...]`.

    The order of the public code, which hands the unpruned logits to `KLDivLoss` as its input.
    """
    p, q = full.log_softmax(dim=-1), pruned.log_softmax(dim=-1)
    return (q.exp() * (q - p)).sum(dim=-1)


def action_divergence(full: np.ndarray, pruned: np.ndarray) -> float:
    """Mean absolute difference of actions, each dimension in units of its spread.

    Args:
        full, pruned: `[N, ..., dim]`. The spread is the standard deviation of `full` over all but
            the last axis; a dimension that never changes counts as it is.
    """
    spread = full.reshape(-1, full.shape[-1]).std(axis=0)
    return float(np.mean(np.abs(full - pruned) / np.where(spread > 1e-8, spread, 1.0)))


def withdrawal_divergences(
    model: nn.Module,
    adapter: Adapter,
    observations: Sequence[Observation],
    *,
    call: Call | None = None,
    tick: Tick = lambda: None,
) -> Withdrawal:
    """Withdraw all visual tokens before each layer in turn, and compare.

    Args:
        model: a model without a session.
        adapter: its adapter.
        observations: inputs of `call`, one sequence each.
        call: see `calibration.calls.caller`.
        tick: called after each observation and layer.

    Raises:
        ValueError: no observations, or an output that is neither.
    """
    require_observations(observations)
    call = call or caller(model)
    adapter.bind(model)

    def outputs() -> list[Tensor | np.ndarray]:
        found: list[Tensor | np.ndarray] = []
        for observation in observations:
            with first_logits(model, adapter.decoder) as heard:
                actions = as_action(call(observation))
            tick()
            if heard:
                found.append(heard[0].double().cpu())
            elif actions is not None:
                found.append(actions)
            else:
                raise ValueError("the model gives neither logits nor an array of actions.")
        return found

    full = outputs()
    measure: Measure = "logits" if isinstance(full[0], Tensor) else "actions"
    result, visual = {}, 0
    for layer in range(max(1, adapter.earliest_cut), len(adapter.layers)):
        with Session(model, VTW(layer=layer), adapter, mode="drop") as session:
            pruned = outputs()
            if session.last is None:
                raise ValueError("no image reached the decoder; run `vla-pruner doctor` on it.")
            visual = session.last.visual_full
        if measure == "logits":
            a, b = (
                torch.cat([*map(torch.as_tensor, full)]),
                torch.cat([*map(torch.as_tensor, pruned)]),
            )
            result[layer] = float(kl_divergence(a, b).mean())
        else:
            result[layer] = action_divergence(np.stack(full), np.stack(pruned))
    return Withdrawal(measure, result, visual)


def first_within(divergences: dict[int, float], eta: float) -> int:
    """The first K whose divergence is at most eta.

    Raises:
        ValueError: there is none.
    """
    for layer in sorted(divergences):
        if divergences[layer] <= eta:
            return layer
    raise ValueError(
        f"no layer can do without visual tokens within eta={eta}; the smallest divergence is "
        f"{min(divergences.values()):.3g}. Use a larger --eta, or --keep."
    )


def last_affordable(layers: Sequence[int], depth: int, share: float) -> int:
    """The last K with K / T <= share, for a decoder of `depth` layers.

    Raises:
        ValueError: there is none.
    """
    affordable = [layer for layer in layers if layer <= share * depth]
    if not affordable:
        raise ValueError(
            f"{share:.3f} of the visual tokens' cost is out of reach: they can leave before layer "
            f"{min(layers)} of {depth} at the earliest, {min(layers) / depth:.3f} of it; keep more."
        )
    return max(affordable)
