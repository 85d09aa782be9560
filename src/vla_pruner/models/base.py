"""The registry of model families: built-in ones and those of installed packages."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from torch import nn

from vla_pruner.core.layout import Adapter, Layout

__all__ = ["Adapter", "Family", "Layout", "find_adapter", "list_models", "models", "unwrapped"]

GROUP = "vla_pruner.models"


@dataclass(frozen=True)
class Family:
    """A group of models that one adapter serves.

    Args:
        name: what people call it.
        summary: what it covers, in one line.
        matches: whether a model belongs to it; must not import the model's library.
        make: the adapter of such a model.
    """

    name: str
    summary: str
    matches: Callable[[nn.Module], bool]
    make: Callable[[nn.Module], Adapter]


def class_named(*names: str) -> Callable[[nn.Module], bool]:
    """A `matches` that looks at the names of a model's class and of its bases."""
    return lambda model: any(kind.__name__ in names for kind in type(model).__mro__)


def _made_by(module: str) -> Callable[[nn.Module], Adapter]:
    """A `make` that imports `module` when it is needed and calls its `adapter(model)`."""
    return lambda model: import_module(module).adapter(model)


def _has_image_token(model: nn.Module) -> bool:
    """Whether `input_ids` of a model hold a token that stands for visual ones."""
    config = getattr(model, "config", None)
    return any(
        isinstance(getattr(config, name, None), int)
        for name in ("image_token_id", "image_token_index", "video_token_id")
    )


_PI_CORES = ("PI0Pytorch", "PI05Pytorch", "PI0FastPytorch")

_BUILT_IN = (
    Family(
        "openvla",
        "OpenVLA and OpenVLA-OFT, the ports of this package",
        class_named("OpenVLA", "OpenVLAOFT"),
        _made_by("vla_pruner.models.openvla"),
    ),
    Family(
        "openvla-remote",
        "OpenVLA and OpenVLA-OFT as their authors ship them (trust_remote_code), unmodified",
        class_named("OpenVLAForActionPrediction", "PrismaticForConditionalGeneration"),
        _made_by("vla_pruner.models.adapters.openvla"),
    ),
    Family(
        "pi0-policies",
        "pi0, pi0.5 and pi0-FAST policies of lerobot and openpi, unmodified",
        class_named("PI0Policy", "PI05Policy", "PI0FastPolicy", *_PI_CORES),
        _made_by("vla_pruner.models.adapters.pi0"),
    ),
    Family(
        "smolvla",
        "SmolVLA policies of lerobot, unmodified",
        class_named("SmolVLAPolicy", "VLAFlowMatching"),
        _made_by("vla_pruner.models.adapters.smolvla"),
    ),
    Family(
        "groot",
        "GR00T policies of lerobot (N1.5, N1.7), unmodified",
        class_named("GrootPolicy", "GR00TN15", "GR00TN17"),
        _made_by("vla_pruner.models.adapters.groot"),
    ),
    Family(
        "pi0",
        "pi0 and pi0.5, the port of this package",
        class_named("Pi0"),
        _made_by("vla_pruner.models.pi0"),
    ),
    Family(
        "hf-vlm",
        "every vision-language model of transformers with an image token (LLaVA, Qwen-VL, ...)",
        _has_image_token,
        _made_by("vla_pruner.models.hf_vlm"),
    ),
)


def built_in() -> tuple[Family, ...]:
    """The families of this package."""
    return _BUILT_IN


def models() -> dict[str, Family]:
    """The old name of `list_models`."""
    warnings.warn(
        "`vp.models()` is now `vp.list_models()`; the old call goes in version 0.3.",
        DeprecationWarning,
        stacklevel=3,
    )
    return list_models()


def list_models() -> dict[str, Family]:
    """Every known model family: the built-in ones, then those of the entry-point group.

    An installed package registers a `Family` in the group `vla_pruner.models`. One that cannot be
    loaded, is no `Family`, or takes a name that is taken is left out with a warning.
    """
    known = {family.name: family for family in _BUILT_IN}
    for entry in entry_points(group=GROUP):
        try:
            family = entry.load()
        except Exception as error:
            warnings.warn(f"family {entry.name!r} ({entry.value}) left out: {error}", stacklevel=2)
            continue
        if not isinstance(family, Family):
            problem = "it is not a vla_pruner.models.Family"
        elif entry.name in known:
            problem = "the name is taken"
        else:
            known[entry.name] = family
            continue
        warnings.warn(f"family {entry.name!r} ({entry.value}) left out: {problem}", stacklevel=2)
    return known


def find_adapter(model: nn.Module) -> Adapter:
    """The adapter of the first family that a model belongs to.

    Raises:
        TypeError: no family knows the model.
    """
    known = list_models()
    for family in known.values():
        if family.matches(model):
            return family.make(model)
    raise TypeError(
        f"no model family knows {type(model).__name__} (known: {', '.join(known)}); say where its "
        "layers and visual tokens are: vp.prune(model, ..., adapter=vp.models.Decoder("
        'layers="model.layers", visual=slice(1, 257))).'
    )


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile`, peft or a wrapper for training; others as they are.

    Raises:
        TypeError: a wrapper whose model runs in several threads.
    """
    for _ in range(8):
        kind = type(model).__name__
        if kind == "DataParallel":
            raise TypeError(
                "DataParallel runs copies of a model in several threads, which a session cannot "
                "follow; prune `model.module` in one process per GPU instead."
            )
        if kind == "OptimizedModule":
            inner = getattr(model, "_orig_mod", None)
        elif kind in ("DistributedDataParallel", "FullyShardedDataParallel"):
            inner = getattr(model, "module", None)
        elif hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            find: Any = model.get_base_model
            inner = find()
        else:
            return model
        if not isinstance(inner, nn.Module) or inner is model:
            return model
        model = inner
    return model
