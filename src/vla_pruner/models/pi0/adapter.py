"""Tell a pruning session where visual tokens and action queries are in pi0 and pi0.5."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from vla_pruner.core.layout import Adapter, Layout
from vla_pruner.models.flow_steps import Averaged, FlowSteps
from vla_pruner.towers.reading import Tower

from .feature_cache import feature_cache
from .modeling import Pi0
from .prefix_reuse import PrefixGate, prefix_reuse


class Pi0Adapter(Adapter):
    """The prefix is pruned, the expert reads what is left; its chunk rows are the action queries.

    Args:
        model: the policy.
        flow_steps: Euler steps whose action attention is averaged: the "latter-half" (the paper's
            appendix B.1.1) or "all" (its section 4.2).

    Raises:
        ValueError: another `flow_steps`.
    """

    gives_frames = True

    def __init__(self, model: Pi0, *, flow_steps: Averaged = "latter-half") -> None:
        self.model = model
        self.decoder, self.reader = model.language_model, model.expert
        self._steps = FlowSteps(flow_steps)

    def attach(self, undo: ExitStack) -> None:
        """Count the flow steps of each call."""
        for stack, hook in (
            (self.decoder, self._steps.restart),
            (self.model.expert, self._steps.count),
        ):
            undo.callback(stack.register_forward_pre_hook(hook).remove)

    def send_frames(self, take: Callable[[Tensor], None], undo: ExitStack) -> None:
        """The images that enter the vision tower, in colours 0..255; none for a reused prefix."""
        cameras = len(self.model.config.views)

        def send(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            pixels = args[0].detach().float().unflatten(0, (-1, cameras))
            take(((pixels + 1) * 127.5).round().clamp(0, 255))

        undo.callback(self.model.vision_tower.register_forward_pre_hook(send).remove)

    def cache_flow(self, interval: int, undo: ExitStack) -> None:
        """The expert's feature cache."""
        undo.enter_context(feature_cache(self.model, every=interval))

    def hold_prefix(self, calls: int, threshold: float, undo: ExitStack) -> PrefixGate:
        """Let a prefix serve several calls, until `undo`."""
        return undo.enter_context(prefix_reuse(self.model, calls=calls, threshold=threshold))

    def reader_rows(self, length: int) -> slice | None:
        """The chunk, behind pi0's state token; None in flow steps that are not averaged."""
        config = self.model.config
        if not self._steps.counts(config.flow_steps):
            return None
        return slice(length - config.chunk, length)

    def towers(self) -> tuple[Tower, ...]:
        """SigLIP."""
        layers: Any = self.model.vision_tower.encoder.layers
        return (Tower("vision_tower", tuple(layer.self_attn for layer in layers)),)

    def layout(self, inputs: Tensor, kwargs: Mapping[str, Any]) -> Layout:
        """Cameras first, then the prompt; a missing camera is padding."""
        config, length = self.model.config, inputs.shape[1]
        valid = kwargs["attention_mask"][:, 0, 0] >= 0  # [B, S]
        count, device = sum(config.views), inputs.device
        positions = torch.arange(length, device=device)[None]
        return Layout(
            visual=positions[:, :count],
            views=config.views,
            valid_rows=valid,
            visual_valid=valid[:, :count],
            text_rows=positions[:, count:],
        )


def adapter(model: Pi0) -> Pi0Adapter:
    """The adapter of a pi0 or pi0.5 policy."""
    return Pi0Adapter(model)
