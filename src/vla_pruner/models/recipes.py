"""Bring a calibrated method, its recipe and a model together."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vla_pruner.methods.base import Method
from vla_pruner.methods.recipe import CalibratedMethod, ModelStamp, Recipe
from vla_pruner.models.base import Adapter
from vla_pruner.models.loading import shipped

FOLDER = "recipes"
"""Beside a model's weights: `recipes/METHOD-KEEP.json`, or `recipes/METHOD.json` for any budget."""

_SAMPLE = 16


def stamp_model(model: nn.Module, adapter: Adapter) -> ModelStamp:
    """What tells `model` from others; `adapter` must be bound to it."""
    config = getattr(adapter.decoder, "config", None)
    return ModelStamp(
        policy=type(model).__name__,
        layers=len(adapter.layers),
        hidden=int(getattr(config, "hidden_size", 0)),
        vocabulary=int(getattr(config, "vocab_size", 0)),
        weights=weights_digest(model),
    )


@torch.no_grad()
def weights_digest(model: nn.Module) -> str:
    """Twelve hexadecimal digits over the first values of every parameter, rounded to bf16.

    Loading the same weights on another device, or in bf16 instead of fp32, gives the same digits.

    Raises:
        ValueError: weights on the meta device, which have no values.
    """
    parameters = list(model.parameters())
    if any(parameter.is_meta for parameter in parameters):
        raise ValueError(
            f"weights of this {type(model).__name__} are on the meta device and have no values, by "
            "which a recipe is found; load them first, then prune."
        )
    heads = [parameter.detach().flatten()[:_SAMPLE] for parameter in parameters]
    padded = [nn.functional.pad(head.bfloat16(), (0, _SAMPLE - len(head))) for head in heads]
    rows = [row.to(padded[0].device) for row in padded]
    stacked: Tensor = torch.stack(rows).cpu() if rows else torch.empty(0, dtype=torch.bfloat16)
    entries = sorted(
        repr(tuple(parameter.shape)).encode() + row.view(torch.uint8).numpy().tobytes()
        for parameter, row in zip(parameters, stacked, strict=True)
    )
    return hashlib.sha256(b"".join(entries)).hexdigest()[:12]


def settle(method: Method, model: nn.Module, adapter: Adapter) -> Method:
    """The method with its recipe: the given one, checked, or the one beside the model's weights.

    Args:
        method: any method; one that needs no recipe comes back as it is.
        model: the model it is about to prune.
        adapter: the model's adapter; it gets bound if it is not yet.

    Raises:
        ValueError: no recipe, or one of another model.
    """
    if not isinstance(method, CalibratedMethod):
        return method
    if not method.wants_recipe and method.recipe is None:
        return method
    adapter.bind(model)
    stamp = stamp_model(model, adapter)
    if method.wants_recipe:
        found = find_recipe(method, model, stamp)
        if found is None:
            method.given()  # Raises: there is none.
        method = replace(method, recipe=found)
    method.check_model(stamp)
    return method


def find_recipe(method: CalibratedMethod, model: nn.Module, stamp: ModelStamp) -> Recipe | None:
    """The recipe of this very model among those beside known weights; None: there is none."""
    for path in _candidates(method, model):
        recipe = Recipe.load(path)
        if recipe.model.differs(stamp, weights=not method.other_weights) is None:
            return recipe
    return None


def _candidates(method: CalibratedMethod, model: nn.Module) -> Iterator[Path]:
    folders = list(shipped().values())
    source: Any = getattr(model, "name_or_path", None)
    if isinstance(source, str) and source and Path(source).is_dir():
        folders.append(Path(source))
    for folder in folders:
        for name in (f"{method.name}-{method.keep}.json", f"{method.name}.json"):
            path = folder / FOLDER / name
            if path.is_file():
                yield path
