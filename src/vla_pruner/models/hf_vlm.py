"""Unmodified vision-language models of transformers, by the token id that stands for the image."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from vla_pruner.core.hooks import after, before
from vla_pruner.core.layout import Adapter, Layout
from vla_pruner.models.decoder import rows_before_labels, text_behind
from vla_pruner.models.towers import of_transformers
from vla_pruner.towers.reading import Tower

_TOKENS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")


class ImageTokenVLM(Adapter):
    """Adapter for models whose `input_ids` hold one image (or video) token per visual token.

    Each unbroken run of such tokens is a view (an image, a tile of one, a frame). All sequences of
    a batch need the same number of them; text may be padded on the left. Where a model is called
    with `inputs_embeds` and `pixel_values`, the tokens are found by their embedding; where image
    features are already in `inputs_embeds`, `session.visual_places(mask)` says where.

    A visual token whose own output row is read stays: the last of the prompt, one before a label,
    and, where the caller gets the logits of all rows, the last of each view.

    Args:
        model: a model with `config.image_token_id` (or `image_token_index`) and a language model
            inside.
        image_token_id: overrides those in the configuration.

    Raises:
        TypeError: no image token or no language model in `model`.
    """

    def __init__(self, model: nn.Module, image_token_id: int | None = None) -> None:
        self.model = model
        self.decoder = _language_model(model)
        config: Any = model.config
        found = [image_token_id]
        if image_token_id is None:
            found = [getattr(config, name, None) for name in _TOKENS]
        self.token_ids = tuple(dict.fromkeys(int(one) for one in found if one is not None))
        if not self.token_ids:
            raise TypeError(f"{type(model).__name__} has no `config.image_token_id`.")
        deep = getattr(getattr(config, "vision_config", None), "deepstack_visual_indexes", None)
        self.earliest_cut = len(deep or ())
        # Where images are shown in tiles, a token is no patch of the whole image.
        self.gives_frames = not hasattr(config, "scale_factor")
        self._names = tuple(inspect.signature(model.forward).parameters)
        self._call: dict[str, Any] = {}
        self._places: Tensor | None = None
        self._reason: str | None = None
        self._verified = False

    def attach(self, undo: ExitStack) -> None:
        """Read what the top model is called with."""
        before(self.model, self._called, undo)
        after(self.model, self._returned, undo, always=True)

    def towers(self) -> tuple[Tower, ...]:
        """The tower of a LLaVA or PaliGemma."""
        return of_transformers(self.model)

    def take_places(self, mask: Tensor) -> None:
        """Visual places `[B, S]` of the next call; see `Session.visual_places`."""
        if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.dtype != torch.bool:
            got = (
                f"{tuple(mask.shape)} {mask.dtype}"
                if isinstance(mask, Tensor)
                else f"a {type(mask).__name__}"
            )
            raise ValueError(
                f"`mask` must be a tensor, bool [B, S], True at visual tokens; got {got}."
            )
        self._places = mask

    def _called(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._call = {**dict(zip(self._names, args, strict=False)), **kwargs}

    def _returned(self, model: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._call, self._places = {}, None

    # ------------------------------------------------------------------ where things are
    def layout(self, inputs: Tensor, kwargs: Mapping[str, Any]) -> Layout | None:
        """Visual tokens of the call in progress, text behind the last one; None for text alone.

        Raises:
            ValueError: sequences with different numbers of image tokens; or, on the first call,
                image tokens that no image was put in.
        """
        return self.continued(inputs, kwargs, 0)

    def continued(self, inputs: Tensor, kwargs: Mapping[str, Any], past: int) -> Layout | None:
        """The same of a pass that continues a cache."""
        if past and inputs.shape[1] == 1 and not self._has_pixels():
            return None  # A word that the model has written, even if it is the image token.
        is_visual = self._visual(inputs)
        if is_visual is None:
            return None
        counts = is_visual.sum(dim=1).tolist()
        if not any(counts):
            return None
        if len(set(counts)) > 1:
            raise ValueError(
                f"sequences of one batch have {counts} image tokens; pruning needs the same number "
                "in each: group images of one size."
            )
        length = inputs.shape[1]
        visual = is_visual.nonzero()[:, 1].view(len(is_visual), -1).to(inputs.device)
        unsure = not self._verified or not self._has_pixels()
        if unsure and self._call.get("input_ids") is not None:
            self._verify(inputs, visual, self._call["input_ids"])
            self._verified = True
        mask = self._call.get("attention_mask")
        known = isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] >= past + length
        valid = None
        if known:
            valid = (mask[:, past : past + length] != 0).to(inputs.device, torch.int8)  # type: ignore[index]
        text = text_behind(visual, length, earliest=int(visual[:, -1].min()) + 1)
        read = self._read(is_visual.to(inputs.device), valid)
        return Layout(visual, _runs(visual), valid_rows=valid, text_rows=text, read=read)

    def left_alone(self) -> str | None:
        """A prefill of embeddings may hold an image that nobody has named."""
        return self._reason

    def _visual(self, inputs: Tensor) -> Tensor | None:
        """`[B, S]` bool, where visual tokens are; None: unknown, or there is none."""
        self._reason = None
        shape, call = inputs.shape[:2], self._call
        if self._places is not None:
            return self._given(self._places, shape)
        ids, embeds = call.get("input_ids"), call.get("inputs_embeds")
        if ids is not None and ids.shape == shape:
            return torch.isin(
                ids, torch.tensor(self.token_ids, dtype=torch.int64, device=ids.device)
            )
        words = [token for token in self.token_ids if token < _words(self.model)]
        if words and embeds is not None and embeds.shape[:2] == shape and self._has_pixels():
            table: Any = _table(self.model)
            tokens = torch.tensor(words, dtype=torch.int64, device=embeds.device)
            blank = table(tokens).to(embeds.dtype)  # [T, D]
            return (embeds[:, :, None] == blank).all(dim=-1).any(dim=-1)
        if shape[1] > 1:
            how = "with `inputs_embeds`" if call else "past its top module"
            self._reason = (
                f"{type(self.model).__name__} was called {how}, so that nobody knows where visual "
                "tokens are; if there are any, say so before the call: "
                "`session.visual_places(mask)`."
            )
        return None

    def _given(self, places: Tensor, shape: torch.Size) -> Tensor:
        """The places that the caller gave, for each of the rows that beams make of one."""
        rows, length = places.shape
        if length != shape[1] or rows == 0 or shape[0] % rows:
            raise ValueError(
                f"`session.visual_places` was given a mask {tuple(places.shape)}, and this pass "
                f"has {tuple(shape)} tokens; give one for the tokens of the next call."
            )
        return places.repeat_interleave(shape[0] // rows, dim=0)

    def _has_pixels(self) -> bool:
        return any(value is not None for name, value in self._call.items() if "pixel" in name)

    def _read(self, is_visual: Tensor, valid: Tensor | None) -> tuple[int, ...]:
        """Visual tokens, counted among them, whose own output row the caller reads."""
        length = is_visual.shape[1]
        behind = torch.zeros_like(is_visual)  # Whether the next place is no visual token.
        behind[:, :-1] = ~is_visual[:, 1:]
        if valid is not None:
            behind[:, :-1] &= valid[:, 1:] > 0
        asked = self._call.get("logits_to_keep", 0)
        wanted = torch.zeros_like(is_visual)
        last = torch.full(
            (len(is_visual), 1), length - 1, dtype=torch.int64, device=is_visual.device
        )
        if valid is not None:
            last = length - 1 - valid.flip(1).to(torch.int8).argmax(dim=1, keepdim=True)
        wanted.scatter_(1, last, True)
        if isinstance(asked, Tensor):
            wanted[:, asked.to(is_visual.device)] = True
        elif asked:
            wanted[:, -int(asked) :] = True
        else:
            wanted |= behind
        for before_label in rows_before_labels(self._call, length, is_visual.device):
            wanted |= before_label
        hit = wanted & is_visual
        if not bool(hit.any()):
            return ()
        tokens = is_visual.long().cumsum(dim=1) - 1
        return tuple(sorted(set(tokens[hit].tolist())))

    def _verify(self, inputs: Tensor, visual: Tensor, ids: Tensor) -> None:
        """The decoder gets image features at these positions, not what the token id stands for."""
        if inputs.ndim != 3:
            found = "the language model gets token ids"
        else:
            table: Any = _table(self.model)
            at = inputs.gather(1, visual[..., None].expand(-1, -1, inputs.shape[-1]))
            named = ids.to(visual.device).gather(1, visual)
            words = named < _words(self.model)  # Others have no embedding.
            blank = table(named * words).to(at.dtype)
            empty = int(((at == blank).all(dim=-1) & words).sum())
            if not empty:
                return
            found = f"{empty} of {visual.numel()} image tokens hold no image features"
        raise ValueError(
            f"{found}, at the positions of tokens {self.token_ids} in `input_ids`; pass "
            "`pixel_values` with as many images as the prompt names, or give the right "
            "`image_token_id` to vp.models.ImageTokenVLM."
        )


def adapter(model: nn.Module) -> ImageTokenVLM:
    """Adapter of a VLM with an image token."""
    return ImageTokenVLM(model)


def _runs(visual: Tensor) -> tuple[int, ...]:
    """Lengths of the unbroken runs in positions [B, M]; (M,) where rows disagree."""
    breaks = visual.diff(dim=1) != 1
    if not bool((breaks == breaks[:1]).all()):
        return (visual.shape[1],)
    ends = [int(index) + 1 for index in breaks[0].nonzero()[:, 0]]
    return tuple(b - a for a, b in zip([0, *ends], [*ends, visual.shape[1]], strict=True))


def _language_model(model: nn.Module) -> nn.Module:
    """The module that runs the decoder layers.

    Raises:
        TypeError: there is none, or it is half of an encoder and a decoder.
    """
    name = type(model).__name__
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise TypeError(
            f"{name} has an encoder that reads the image and a decoder that attends to it; pruning "
            "works in models whose decoder reads visual tokens among the words."
        )
    for path in ("model.language_model", "model.text_model", "language_model", "text_model"):
        try:
            found: Any = model.get_submodule(path)
        except AttributeError:
            continue
        for _ in range(3):
            if isinstance(getattr(found, "layers", None), nn.ModuleList):
                return found
            found = getattr(found, "model", None) or getattr(found, "decoder", found)
    raise TypeError(
        f"found no language model with decoder layers in {name}; say where they are: "
        'vp.models.Decoder(layers="...", visual=slice(...)).'
    )


def _table(model: Any) -> Any:
    """The embedding of token ids."""
    return model.get_input_embeddings()


def _words(model: Any) -> int:
    """How many token ids have an embedding."""
    return len(_table(model).weight)
