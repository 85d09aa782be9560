"""OpenVLA-OFT: several cameras, robot state, and a chunk of actions from one bidirectional pass.

Sequence, padded on the left:
`[pad ...] BOS | visual tokens | robot state | rest of the prompt | zeroed action slots | stop`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..port import refuse_broken
from .config import OpenVLAConfig, OpenVLAOFTConfig
from .modeling import OpenVLA, insert_after_bos, sequence_arguments, widen_mask
from .processing import Inputs

if TYPE_CHECKING:
    from contextlib import ExitStack

    from ..capture import Capture


class ProprioProjector(nn.Module):
    """Robot state [B, proprio_dim] to one embedding [B, D]."""

    def __init__(self, proprio_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(proprio_dim, hidden_size)
        self.fc2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, proprio: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(proprio)))


class ResidualBlock(nn.Module):
    """Norm, linear, ReLU, added to the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ffn(x)


class ResidualMLP(nn.Module):
    """Norm, linear, ReLU, residual blocks, norm, linear."""

    def __init__(self, blocks: int, inputs: int, width: int, outputs: int) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(inputs)
        self.fc1 = nn.Linear(inputs, width)
        self.mlp_resnet_blocks = nn.ModuleList(ResidualBlock(width) for _ in range(blocks))
        self.layer_norm2 = nn.LayerNorm(width)
        self.fc2 = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.fc1(self.layer_norm1(x)))
        for block in self.mlp_resnet_blocks:
            x = block(x)
        return self.fc2(self.layer_norm2(x))


class L1ActionHead(nn.Module):
    """Hidden states of chunk steps [B, chunk, dim * D] to normalised actions [B, chunk, dim]."""

    def __init__(self, config: OpenVLAOFTConfig, hidden_size: int) -> None:
        super().__init__()
        width = config.head_width or hidden_size
        inputs = config.action_dim * hidden_size
        self.model = ResidualMLP(config.head_blocks, inputs, width, config.action_dim)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.model(hidden)


class OpenVLAOFT(OpenVLA):
    """OpenVLA with parallel decoding, action chunks and an L1 head (arXiv:2502.19645)."""

    config: OpenVLAOFTConfig
    config_class: ClassVar[type[OpenVLAConfig]] = OpenVLAOFTConfig
    _one_pass = True

    def _build_heads(self, hidden_size: int) -> None:
        if self.config.proprio_dim is not None:
            self.proprio_projector = ProprioProjector(self.config.proprio_dim, hidden_size)
        self.action_head = L1ActionHead(self.config, hidden_size)

    def action_hidden(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        proprio: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Hidden states behind the action slots, [B, chunk, dim * D].

        `input_ids` [B, P] is the prompt up to and including its closing empty token, `proprio`
        [B, proprio_dim] the normalised robot state, `attention_mask` [B, P] 0 on left padding.
        Every position sees every other one that is not padding.
        """
        config = self.config
        batch = input_ids.shape[0]
        slots = config.slots
        table = self.language_model.get_input_embeddings()
        words = table(input_ids)
        stop = table(input_ids.new_full((batch, 1), config.stop_token_id))
        embeds = torch.cat([words, words.new_zeros(batch, slots, words.shape[2]), stop], dim=1)
        inserted = self._inserted(pixel_values, proprio)
        if attention_mask is not None:
            attention_mask = widen_mask(attention_mask, slots + 1)
        embeds = insert_after_bos(embeds, inserted, attention_mask)

        valid = widen_mask(attention_mask, inserted.shape[1])
        arguments = sequence_arguments(valid)
        arguments["attention_mask"] = bidirectional_mask(embeds, valid)
        hidden = self.language_model.model(
            inputs_embeds=embeds, use_cache=False, **arguments
        ).last_hidden_state
        rows = hidden[:, config.action_rows]  # [B, chunk * dim, D], slot by slot
        return rows.reshape(batch, config.chunk, -1)

    def _inserted(self, pixel_values: Tensor, proprio: Tensor | None) -> Tensor:
        """What stands between BOS and the prompt: visual tokens, then the robot state."""
        wanted = self.config.proprio_dim
        if wanted is None and proprio is not None:
            raise ValueError("this policy reads no robot state, leave `proprio` out")
        if wanted is not None and proprio is None:
            raise ValueError(f"this policy reads a robot state: give `proprio` [B, {wanted}]")
        visual = self.visual_embeds(pixel_values)
        if proprio is None:
            return visual
        state = self.proprio_projector(proprio.to(visual.dtype))
        return torch.cat([visual, state[:, None]], dim=1)

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        proprio: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Normalised actions [B, chunk, dim]; arguments as for `action_hidden`."""
        return self.action_head(
            self.action_hidden(input_ids, pixel_values, proprio, attention_mask)
        )

    def _attach(self, capture: Capture, undo: ExitStack) -> None:
        from .captured import attach_oft

        attach_oft(self, capture, undo)

    @torch.no_grad()
    def infer(self, inputs: Inputs) -> np.ndarray:
        """Normalised actions of prepared inputs, fp32 [B, chunk, action_dim]."""
        actions = self(inputs.input_ids, inputs.pixel_values, inputs.proprio, inputs.attention_mask)
        made = actions.float().cpu().numpy()
        refuse_broken(~np.isfinite(made), "actions")
        return made


def bidirectional_mask(embeds: Tensor, valid: Tensor | None) -> Tensor:
    """Additive mask [B, 1, S, S]: 0 everywhere except in the columns of padding."""
    batch, length = embeds.shape[:2]
    columns = embeds.new_zeros(batch, length)
    if valid is not None:
        columns = columns.masked_fill(valid == 0, torch.finfo(embeds.dtype).min)
    return columns[:, None, None, :].expand(-1, -1, length, -1)
