"""Unmodified vision-language models of transformers, by the token id that stands for the image."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from vla_pruner.surgery.layout import Adapter, Layout, text_behind


class ImageTokenVLM(Adapter):
    """Adapter for models whose `input_ids` hold one image token per visual token.

    Each unbroken run of image tokens is a view (an image, or a tile of one). All sequences of a
    batch need the same number of image tokens; text may be padded on the left.

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
        self._verified = False

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
            ValueError: sequences with different numbers of image tokens; or, on the first call,
                image tokens that no image was put in.
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
        if not self._verified:
            self._verify(inputs, visual)
            self._verified = True
        mask = None if self._mask is None else self._mask.to(inputs.device)
        text = text_behind(visual, inputs.shape[1], earliest=int(visual[:, -1].min()) + 1)
        return Layout(visual, _runs(visual), valid_rows=mask, text_rows=text)

    def _verify(self, inputs: Tensor, visual: Tensor) -> None:
        """The decoder gets image features at these positions, not what the token id stands for."""
        if inputs.ndim != 3:
            found = "the language model gets token ids"
        else:
            table: Any = self.model.get_input_embeddings
            blank = table()(
                torch.tensor(self.image_token_id, dtype=torch.int64, device=inputs.device)
            )
            at = inputs.gather(1, visual[..., None].expand(-1, -1, inputs.shape[-1]))
            empty = int((at == blank.to(at.dtype)).all(dim=-1).sum())
            if not empty:
                return
            found = f"{empty} of {visual.numel()} image tokens hold no image features"
        raise ValueError(
            f"{found}, at the positions of token {self.image_token_id} in `input_ids`; pass "
            "`pixel_values` with as many images as the prompt names, or give the right "
            "`image_token_id` to vp.models.ImageTokenVLM."
        )


def adapter(model: nn.Module) -> ImageTokenVLM:
    """Adapter of a known VLM."""
    return ImageTokenVLM(model)


def _runs(visual: Tensor) -> tuple[int, ...]:
    """Lengths of the unbroken runs in positions [B, M]; (M,) where rows disagree."""
    breaks = visual.diff(dim=1) != 1
    if not bool((breaks == breaks[:1]).all()):
        return (visual.shape[1],)
    ends = [int(index) + 1 for index in breaks[0].nonzero()[:, 0]]
    return tuple(b - a for a, b in zip([0, *ends], [*ends, visual.shape[1]], strict=True))


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
