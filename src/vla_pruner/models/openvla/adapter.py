"""Tell a pruning session where visual tokens and action queries are in OpenVLA and OpenVLA-OFT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vla_pruner.surgery.layout import Adapter, Layout

from .config import OpenVLAOFTConfig
from .modeling import OpenVLA, left_padding


class OpenVLAAdapter(Adapter):
    """Both classes: visual tokens stand behind BOS, camera by camera.

    OpenVLA writes its action token by token; OpenVLA-OFT has its action queries in the prefill, the
    rows that feed the head.
    """

    def __init__(self, model: OpenVLA) -> None:
        self.decoder = model.language_model.model
        self.views = model.config.views
        config = model.config
        self.action_rows = config.action_rows if isinstance(config, OpenVLAOFTConfig) else None
        self._unpadded: dict[torch.device, Layout] = {}

    def layout(self, inputs: Tensor, kwargs: Mapping[str, Any]) -> Layout | None:
        """Layout of embeddings [B, S, D]; None for token ids (a decode step) and short passes."""
        visual = sum(self.views)
        if inputs.ndim != 3 or inputs.shape[1] <= visual:
            return None
        mask = kwargs.get("attention_mask")
        # The model gives positions exactly when the batch is padded.
        if mask is None or kwargs.get("position_ids") is None:
            if inputs.device not in self._unpadded:
                self._unpadded[inputs.device] = self._at(torch.ones(1, device=inputs.device))
            return self._unpadded[inputs.device]
        # [B, S] as given to the causal decoder, [B, 1, S, S] additive for the bidirectional one.
        valid = mask.bool() if mask.ndim == 2 else mask[:, 0, 0] >= 0
        return self._at(left_padding(valid) + 1, valid)

    def _at(self, first: Tensor, valid: Tensor | None = None) -> Layout:
        """Layout of visual tokens that start at `first` [B]."""
        offsets = torch.arange(sum(self.views), device=first.device)
        return Layout(
            visual=first.long()[:, None] + offsets,
            views=self.views,
            valid_rows=valid,
            action_rows=self.action_rows,
        )


def adapter(model: OpenVLA) -> OpenVLAAdapter:
    """The adapter of an OpenVLA or OpenVLA-OFT policy."""
    return OpenVLAAdapter(model)
