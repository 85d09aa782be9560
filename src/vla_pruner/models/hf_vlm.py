"""Unmodified vision-language models of transformers, by the token id that stands for the image."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from vla_pruner.surgery.layout import Adapter, Layout, text_behind


class ImageTokenVLM(Adapter):
    """Adapter for models whose `input_ids` hold one image token per visual token.

    All sequences of a batch need the same number of image tokens; text may be padded on the left.

    Args:
        model: a model with `config.image_token_id` (or `image_token_index`) and a language model
            inside.
        image_token_id: overrides the one in the configuration.

    Raises:
        TypeError: no image token or no language model in `model`.
    """

    def __init__(self, model: nn.Module, image_token_id: int | None = None) -> None:
        self.model = model
        self.decoder = _language_model(model)
        config: Any = model.config
        found = image_token_id
        for name in ("image_token_id", "image_token_index"):
            found = getattr(config, name, None) if found is None else found
        if found is None:
            raise TypeError(f"{type(model).__name__} has no `config.image_token_id`.")
        self.image_token_id = int(found)
        deep = getattr(getattr(config, "vision_config", None), "deepstack_visual_indexes", None)
        self.earliest_cut = len(deep or ())
        # Where images are shown in tiles, a token is no patch of the whole image.
        self.gives_frames = not hasattr(config, "scale_factor")
        self._ids: Tensor | None = None
        self._mask: Tensor | None = None

    def attach(self, undo: ExitStack) -> None:
        """Read the ids that the top model is called with."""
        handle = self.model.register_forward_pre_hook(self._read_ids, with_kwargs=True)
        undo.callback(handle.remove)

    def _read_ids(self, model: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
        self._ids = kwargs.get("input_ids", args[0] if args else None)
        mask = kwargs.get("attention_mask")
        self._mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None

    def layout(self, inputs: Tensor, kwargs: Mapping[str, Any]) -> Layout | None:
        """Image tokens of the call in progress, text behind the last one; None for text alone.

        Raises:
            ValueError: sequences with different numbers of image tokens.
        """
        ids = self._ids
        if ids is None or ids.shape != inputs.shape[:2]:
            return None
        is_image = ids == self.image_token_id
        counts = is_image.sum(dim=1).tolist()
        if not any(counts):
            return None
        if len(set(counts)) > 1:
            raise ValueError(
                f"sequences of one batch have {counts} image tokens; pruning needs the same number "
                "in each: group images of one size."
            )
        visual = is_image.nonzero()[:, 1].view(len(ids), -1).to(inputs.device)
        mask = None if self._mask is None else self._mask.to(inputs.device)
        text = text_behind(visual, inputs.shape[1], earliest=int(visual[:, -1].min()) + 1)
        return Layout(visual, (counts[0],), valid_rows=mask, text_rows=text)


def adapter(model: nn.Module) -> ImageTokenVLM:
    """Adapter of a known VLM."""
    return ImageTokenVLM(model)


def _language_model(model: nn.Module) -> nn.Module:
    """The module that runs the decoder layers."""
    for path in ("model.language_model", "model.text_model", "language_model", "text_model"):
        try:
            found = model.get_submodule(path)
        except AttributeError:
            continue
        found = getattr(found, "model", found)
        if isinstance(getattr(found, "layers", None), nn.ModuleList):
            return found
    raise TypeError(f"found no language model with decoder layers in {type(model).__name__}.")
