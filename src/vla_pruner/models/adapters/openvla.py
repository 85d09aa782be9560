"""OpenVLA and OpenVLA-OFT as their authors ship them (remote code, the OFT repository)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn

from vla_pruner.core.hooks import replace
from vla_pruner.core.layout import Adapter, Layout
from vla_pruner.core.session import Session
from vla_pruner.models.adapters.patching import one_step
from vla_pruner.models.decoder import text_behind
from vla_pruner.towers.reading import Tower


class OpenVLAPolicyAdapter(Adapter):
    """`OpenVLAForActionPrediction` of either project; image tokens follow the first token.

    OpenVLA writes its action token by token. OpenVLA-OFT has its action queries in the prefill: the
    rows one before each action slot, which feed the head.

    Args:
        model: the policy, loaded with `trust_remote_code` or by the OFT repository.

    Raises:
        TypeError: `model` is not built like these.
    """

    def __init__(self, model: nn.Module) -> None:
        parts = [getattr(model, name, None) for name in ("language_model", "projector")]
        if not all(isinstance(part, nn.Module) for part in parts):
            raise TypeError(
                f"{type(model).__name__} has no `language_model` and `projector`; expected the "
                "OpenVLA class of its authors."
            )
        self.model: Any = model
        self.projector = cast(nn.Module, parts[1])
        self.decoder = cast(nn.Module, getattr(parts[0], "model", parts[0]))
        self._patches: Tensor | None = None
        self._slots = 0
        self._words: int | None = None
        self._verified = False

    @property
    def in_parallel(self) -> bool:
        """Whether this is OFT's class, which decodes all actions in one pass."""
        return hasattr(self.model, "_prepare_input_for_action_prediction")

    def attach(self, undo: ExitStack) -> None:
        """Listen to the projector, and to how many words and action slots a call has."""
        undo.callback(self.projector.register_forward_hook(self._see_patches).remove)
        if self.in_parallel:
            name = "_prepare_input_for_action_prediction"
            replace(self.model, name, self._counting(getattr(self.model, name)), undo)

    def _see_patches(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self._patches = output.detach()

    def _counting(self, prepare: Callable[..., Any]) -> Callable[..., Any]:
        def counted(input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
            result = prepare(input_ids, *args, **kwargs)
            self._words = result[0].shape[1]
            self._slots = self._words - input_ids.shape[1] - 1  # and the end-of-sequence token
            return result

        return counted

    def follow(self, session: Session, undo: ExitStack) -> None:
        """A call is a step; and a cache without tokens in it is no cache.

        `generate` of newer transformers hands the first step an empty cache. The remote code takes
        it for a filled one, cuts the prompt to its last token and never shows the image.
        """
        if hasattr(self.model, "predict_action"):
            one_step(self.model, "predict_action", session, undo)
        prepare = getattr(self.model, "prepare_inputs_for_generation", None)
        if prepare is None:
            return

        def prepared(input_ids: Tensor, past_key_values: Any = None, **kwargs: Any) -> Any:
            if hasattr(past_key_values, "get_seq_length") and not past_key_values.get_seq_length():
                past_key_values = None
            return prepare(input_ids, past_key_values=past_key_values, **kwargs)

        replace(self.model, "prepare_inputs_for_generation", prepared, undo)

    def towers(self) -> tuple[Tower, ...]:
        """The towers of timm, which are read one block before their last."""
        found: dict[str, Any] = {
            name: getattr(self.model.vision_backbone, name, None)
            for name in ("featurizer", "fused_featurizer")
        }
        return tuple(
            Tower(name, tuple(block.attn for block in tower.blocks[:-1]), tower.num_prefix_tokens)
            for name, tower in found.items()
            if hasattr(tower, "blocks")
        )

    def layout(self, inputs: Tensor, kwargs: Mapping[str, Any]) -> Layout | None:
        """Layout of embeddings [B, S, D]; None for token ids and for calls without an image.

        Raises:
            ValueError: on the first call, image tokens that are not behind the first token.
        """
        patches = self._patches
        if inputs.ndim != 3 or patches is None or inputs.shape[1] <= patches.shape[1]:
            return None
        length, count = inputs.shape[1], patches.shape[1]
        if not self._verified:
            self._verify(inputs, patches)
            self._verified = True
        mask = kwargs.get("attention_mask")
        mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        visual = torch.arange(1, 1 + count, device=inputs.device)[None]
        extra, behind = 0, 0
        rows: slice | None = None
        if self.in_parallel and self._words is not None:
            extra = length - count - self._words  # robot state, diffusion step
            behind = self._slots + 1
            rows = slice(-(self._slots + 2), -2)
        text = text_behind(visual, length, earliest=1 + count + extra, skip=extra, until=behind)
        return Layout(visual, self._views(count), mask, action_rows=rows, text_rows=text)

    def _views(self, count: int) -> tuple[int, ...]:
        """OFT's vision backbone knows how many images it gets."""
        images = getattr(self.model.vision_backbone, "get_num_images_in_input", None)
        cameras = 1 if images is None else int(images())
        return (count // cameras,) * cameras

    def _verify(self, inputs: Tensor, patches: Tensor) -> None:
        found = inputs[:, 1 : 1 + patches.shape[1]]
        if found.shape != patches.shape or not torch.equal(found, patches.to(found.dtype)):
            raise ValueError(
                f"{type(self.model).__name__} did not put its {patches.shape[1]} image tokens "
                "behind the first token; this version of the class is not known. Describe it with "
                "vp.models.Decoder."
            )


def adapter(model: nn.Module) -> OpenVLAPolicyAdapter:
    """The adapter of an OpenVLA policy of its authors."""
    return OpenVLAPolicyAdapter(model)
