"""Vision towers of transformers, as methods that read their attention want them."""

from __future__ import annotations

from typing import Any

from torch import nn

from vla_pruner.towers.reading import Tower


def of_transformers(model: nn.Module) -> tuple[Tower, ...]:
    """The SigLIP or CLIP tower of a LLaVA or PaliGemma of transformers; none if it is another.

    Args:
        model: the vision-language model, with or without its head. Others put the patches of a
            tower through a pool, a shuffle or a resampler: none is a visual token any more.
    """
    inner: Any = getattr(model, "model", model)
    config: Any = getattr(model, "config", None)
    name = type(model).__name__.removesuffix("ForConditionalGeneration").removesuffix("Model")
    tower = getattr(inner, "vision_tower", None)
    encoder = getattr(getattr(tower, "vision_model", tower), "encoder", None)
    if name not in ("Llava", "PaliGemma") or not isinstance(encoder, nn.Module):
        return ()
    layers = list(getattr(encoder, "layers", ()))
    kinds = {type(getattr(layer, "self_attn", None)).__name__ for layer in layers}
    if not layers or not kinds <= {"SiglipAttention", "CLIPAttention"}:
        return ()
    read, prefix = len(layers), 0
    if name == "Llava":
        chosen = config.vision_feature_layer
        if not isinstance(chosen, int):
            return ()  # Features of several layers side by side: which is the last?
        read = chosen if chosen >= 0 else len(layers) + 1 + chosen
        # CLIP has a class token, which this strategy leaves out of the visual tokens.
        prefix = int(config.vision_feature_select_strategy == "default")
    attentions = tuple(layer.self_attn for layer in layers[:read])
    return (Tower("vision_tower", attentions, prefix),) if attentions else ()
