"""Tell a pruning session where visual tokens and action queries are in OpenVLA and OpenVLA-OFT."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from vla_pruner._numbers import on_device
from vla_pruner.core.layout import Adapter, Layout
from vla_pruner.models.decoder import text_behind
from vla_pruner.towers.reading import Tower

from .config import OpenVLAOFTConfig
from .modeling import OpenVLA, left_padding
from .processing import colours

_MOST_PADDINGS = 256


class OpenVLAAdapter(Adapter):
    """Both classes: visual tokens stand behind BOS, camera by camera.

    OpenVLA writes its action token by token; OpenVLA-OFT has its action queries in the prefill, the
    rows that feed the head.
    """

    gives_frames = True

    def __init__(self, model: OpenVLA) -> None:
        self.model = model
        self.decoder = model.language_model.model
        self.views = model.config.views
        config = model.config
        self.action_rows: slice | None = None
        self.robot_state, self.behind_text = 0, 0  # tokens between image and text, and at the end
        if isinstance(config, OpenVLAOFTConfig):
            self.action_rows = config.action_rows
            self.robot_state = int(config.proprio_dim is not None)
            self.behind_text = config.slots + 1
        self._unpadded: dict[tuple[torch.device, int], Layout] = {}
        self._by_padding: dict[tuple[torch.device, int, tuple[int, ...]], Layout] = {}

    def send_frames(self, take: Callable[[Tensor], None], undo: ExitStack) -> None:
        """The images that enter the vision towers, in colours 0..255, as the first tower gets them.

        Exact up to rounding in fp32; in bf16 colours are off by one or two.
        """
        backbone, tower = self.model.vision_backbone, self.model.config.towers[0]

        def send(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            pixels = args[0] if args else kwargs["pixel_values"]
            take(colours(pixels, tower))

        undo.callback(backbone.register_forward_pre_hook(send, with_kwargs=True).remove)

    def towers(self) -> tuple[Tower, ...]:
        """DINOv2 and SigLIP, all blocks that run."""
        backbone = self.model.vision_backbone
        return tuple(
            Tower(name, tuple(block.attn for block in tower.blocks), tower.prefix)  # type: ignore
            for name, tower in backbone.named_children()
        )

    def layout(self, inputs: Tensor, kwargs: Mapping[str, Any]) -> Layout | None:
        """Layout of embeddings [B, S, D]; None for token ids (a decode step) and short passes."""
        length = inputs.shape[1]
        if inputs.ndim != 3 or length <= sum(self.views):
            return None
        mask, padding = kwargs.get("attention_mask"), kwargs.get("padding")
        if padding is not None:  # Of a captured step: known without a look at the mask.
            return self._padded(padding, length, inputs.device)
        # The model gives positions exactly when the batch is padded.
        if mask is None or kwargs.get("position_ids") is None:
            known = (inputs.device, length)
            if known not in self._unpadded:
                with torch.inference_mode(False):  # It may be saved for a backward pass later.
                    first = torch.ones(1, dtype=torch.int64, device=inputs.device)
                    self._unpadded[known] = self._at(first, length)
            return self._unpadded[known]
        # [B, S] as given to the causal decoder, [B, 1, S, S] additive for the bidirectional one.
        valid = mask.bool() if mask.ndim == 2 else mask[:, 0, 0] >= 0
        return self._at(left_padding(valid) + 1, length, valid)

    def _padded(self, padding: tuple[int, ...], length: int, device: torch.device) -> Layout:
        """Layout of rows with so many padded positions before each; the same object every time."""
        known = (device, length, padding)
        if known not in self._by_padding:
            if len(self._by_padding) >= _MOST_PADDINGS:
                self._by_padding.clear()
            before = on_device(padding, device)
            valid = torch.arange(length, device=device) >= before[:, None]
            self._by_padding[known] = self._at(before + 1, length, valid)
        return self._by_padding[known]

    def _at(self, first: Tensor, length: int, valid: Tensor | None = None) -> Layout:
        """Layout of visual tokens that start at `first` [B], the longest row right behind BOS."""
        count = sum(self.views)
        visual = first[:, None] + torch.arange(count, device=first.device)
        text = text_behind(
            visual,
            length,
            earliest=1 + count + self.robot_state,
            skip=self.robot_state,
            until=self.behind_text,
        )
        return Layout(
            visual=visual,
            views=self.views,
            valid_rows=valid,
            action_rows=self.action_rows,
            text_rows=text,
        )


def adapter(model: OpenVLA) -> OpenVLAAdapter:
    """The adapter of an OpenVLA or OpenVLA-OFT policy."""
    return OpenVLAAdapter(model)
