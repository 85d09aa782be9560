"""From a method's name and observations to its recipe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from vla_pruner._short import short
from vla_pruner.calibration import efficientvla, fitprune, vtw
from vla_pruner.calibration.calls import Call, Tick
from vla_pruner.calibration.cost import one_cut_share
from vla_pruner.episodes.observations import Observations
from vla_pruner.measure.environment import stamp
from vla_pruner.methods.recipe import Recipe
from vla_pruner.models.base import Adapter, find_adapter
from vla_pruner.models.recipes import stamp_model

METHODS = ("fitprune", "vtw", "efficientvla")
"""Methods that can be calibrated."""


def calibrate(
    method: str,
    model: nn.Module,
    observations: Observations,
    *,
    keep: float | None = None,
    layer: int = 3,
    eta: float | None = None,
    adapter: Adapter | None = None,
    call: Call | None = None,
    on_start: Callable[[int], None] = lambda total: None,
    tick: Tick = lambda: None,
) -> Recipe:
    """Search what a method needs for one model.

    Args:
        method: one of `METHODS`.
        model: a model without a session; it is called as ever and left as it was.
        observations: what it is shown.
        keep: budget R. The visual tokens may cost, over all layers, what one cut to a share R of
            them before layer K would cost, so that methods at the same `keep` compare. Needed for
            fitprune; for vtw instead of `eta`; nothing for efficientvla, whose layers are ranked
            once for every budget.
        layer: K; 0: `keep` is the share of the cost itself, as FitPrune means it.
        eta: divergence that vtw accepts; None: the default of what is compared.
        adapter: for a model that no family knows.
        call: how an observation is shown to the model; None: see `calibration.calls.caller`.
        on_start: told how many calls of the model there will be.
        tick: called after each of them.

    Raises:
        ValueError: an unknown method, options that it does not take, or a budget out of reach.
        TypeError: no family knows the model.
    """
    adapter = check_request(method, model, keep=keep, layer=layer, eta=eta, adapter=adapter)
    depth, count = len(adapter.layers), len(observations.items)
    turns = 1 + depth - max(1, adapter.earliest_cut) if method == "vtw" else 1
    on_start(count * turns)
    shown: dict[str, Any] = {"call": call, "tick": tick}
    settings: dict[str, Any] = {}
    values: dict[str, Any]
    if method == "fitprune":
        assert keep is not None
        values, settings = _fitprune(model, adapter, observations, keep, layer, shown)
    elif method == "vtw":
        values, settings = _vtw(model, adapter, observations, keep, layer, eta, shown)
    else:
        found = efficientvla.layer_importance(model, adapter, observations.items, **shown)
        values = {"importance": found}
    return Recipe(
        method=method,
        model=stamp_model(model, adapter),
        values=values,
        keep=keep,
        observations=observations.describe(),
        settings=settings,
        environment=stamp(next(model.parameters()).device),
    )


def check_request(
    method: str,
    model: nn.Module,
    *,
    keep: float | None,
    layer: int,
    eta: float | None,
    adapter: Adapter | None = None,
) -> Adapter:
    """Refuse what cannot be calibrated, before anything is run; returns the model's adapter.

    Args and errors are those of `calibrate`.
    """
    check_options(method, keep=keep, eta=eta)
    adapter = adapter or find_adapter(model)
    adapter.bind(model)
    if keep is not None:
        one_cut_share(1, keep, layer=layer, depth=len(adapter.layers), **_sizes(adapter))
    return adapter


def check_options(method: str, *, keep: float | None, eta: float | None) -> None:
    """What of `check_request` needs no model. Errors: ValueError."""
    if method not in METHODS:
        raise ValueError(
            f"method {short(method)} has no calibration; choose from {', '.join(METHODS)}."
        )
    if keep is not None and not 0 < keep <= 1:
        raise ValueError(f"keep={short(keep)}: expected a share in (0, 1] of the visual tokens.")
    if eta is not None and (method != "vtw" or keep is not None):
        raise ValueError("`eta` is for vtw alone, and instead of `keep`: give one of them.")
    if method == "fitprune" and keep is None:
        raise ValueError("fitprune is calibrated for one budget: give `keep`, such as 0.25.")
    if method == "efficientvla" and keep is not None:
        raise ValueError("efficientvla ranks layers once for every budget: leave `keep` out.")


def _fitprune(
    model: nn.Module,
    adapter: Adapter,
    seen: Observations,
    keep: float,
    layer: int,
    shown: dict[str, Any],
) -> tuple[dict[str, Any], dict[str, Any]]:
    sizes = _sizes(adapter)
    cross, own = fitprune.received_attention(model, adapter, seen.items, **shown)
    budget = one_cut_share(cross.shape[2], keep, layer=layer, depth=len(adapter.layers), **sizes)
    plan = fitprune.plan(cross, own, budget, **sizes)
    settings = {"layer": layer, "budget": budget, "share": plan.share, "alpha": plan.alpha}
    return {"left": list(plan.left)}, {**settings, **sizes}


def _vtw(
    model: nn.Module,
    adapter: Adapter,
    seen: Observations,
    keep: float | None,
    layer: int,
    eta: float | None,
    shown: dict[str, Any],
) -> tuple[dict[str, Any], dict[str, Any]]:
    depth = len(adapter.layers)
    found = vtw.withdrawal_divergences(model, adapter, seen.items, **shown)
    settings: dict[str, Any] = {"measure": found.measure}
    if keep is not None:
        budget = one_cut_share(found.visual, keep, layer=layer, depth=depth, **_sizes(adapter))
        at = vtw.last_affordable(list(found.divergences), depth, budget)
        settings |= {"layer": layer, "budget": budget, "share": at / depth}
    else:
        settings["eta"] = vtw.ETA[found.measure] if eta is None else eta
        at = vtw.first_within(found.divergences, settings["eta"])
    divergence = {str(k): value for k, value in found.divergences.items()}
    return {"layer": at, "divergence": divergence}, settings


def _sizes(adapter: Adapter) -> dict[str, int]:
    config: Any = adapter.decoder.config
    return {"hidden": int(config.hidden_size), "ffn": int(config.intermediate_size)}
