"""The passes of pi0 and pi0.5, as functions that can be compiled whole."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vla_pruner.core.hooks import replace

from .gemma import SharedKV
from .modeling import Pi0, Prefix, additive
from .processing import Inputs

if TYPE_CHECKING:
    from ..capture import Capture


def attach(policy: Pi0, capture: Capture, undo: ExitStack) -> None:
    """The prefix is one pass, and so is each flow step."""
    config = policy.config
    session = capture.session
    steps: Any = None if session is None else session.adapter._steps  # type: ignore[attr-defined]
    if steps is not None:
        undo.callback(setattr, steps, "captured", None)

    def embed_and_run(inputs: Inputs, shared: SharedKV) -> Tensor:
        return policy._run_prefix(inputs, shared)

    def read_prefix(inputs: Inputs) -> Prefix:
        seen = inputs.image_mask.repeat_interleave(config.vision.patches, dim=1)
        valid = torch.cat([seen, inputs.token_mask], dim=1)
        shared = SharedKV(pure=True)
        call = {
            "inputs_embeds": capture.placeholder(*valid.shape, config.prefix.width),
            "attention_mask": additive(valid, policy.dtype)[:, None, None, :],
            "past_key_values": shared,
        }
        if steps is not None:
            steps.captured, steps.begun = False, 0
        valid = capture.run("prefix", policy.language_model, call, embed_and_run, inputs, shared)
        return Prefix(shared, valid)

    def velocity(prefix: Prefix, state: Tensor, noisy: Tensor, time: Tensor) -> Tensor:
        averaged = False
        if steps is not None:
            steps.captured = None
            steps.count()
            averaged = steps.counts(config.flow_steps)
            steps.captured = averaged
        rows = config.chunk + (config.kind == "pi0")
        call = {
            "inputs_embeds": capture.placeholder(len(noisy), rows, config.expert.width),
            "past_key_values": prefix.shared,
        }
        return capture.run(
            f"flow {averaged}", policy.expert, call, step, prefix, state, noisy, time
        )

    def step(prefix: Prefix, state: Tensor, noisy: Tensor, time: Tensor) -> Tensor:
        return Pi0.velocity(policy, prefix, state, noisy, time)

    replace(policy, "read_prefix", read_prefix, undo)
    replace(policy, "velocity", velocity, undo)
