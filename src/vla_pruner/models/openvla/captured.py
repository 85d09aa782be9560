"""The passes of OpenVLA and OpenVLA-OFT, as functions that can be compiled whole."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from vla_pruner._numbers import on_device
from vla_pruner.core.hooks import replace

from .modeling import OpenVLA, greedy, sequence_arguments, widen_mask
from .oft import OpenVLAOFT

if TYPE_CHECKING:
    from ..capture import Capture


class Prompts:
    """Prompts of one padded length: ids, their mask, and what a session is told of them."""

    def __init__(self, capture: Capture) -> None:
        self.capture = capture
        self._masks: dict[tuple[Any, ...], Tensor] = {}

    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor | None, behind: int
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Ids and mask `[B, P']` of prompts `[B, P]`, and the arguments of the decoder's prefill.

        `behind`: tokens of the sequence that are no prompt.
        """
        batch, prompt = input_ids.shape
        size = self.capture.padded(prompt)
        extra = size - prompt
        ids = F.pad(input_ids, (extra, 0))
        width = self.capture.policy.language_model.config.hidden_size
        call: dict[str, Any] = {
            "inputs_embeds": self.capture.placeholder(batch, size + behind, width)
        }
        if attention_mask is not None and attention_mask.device.type != "cpu":
            mask = F.pad(attention_mask, (extra, 0))  # Counting it would mean waiting.
            call["attention_mask"] = call["position_ids"] = widen_mask(mask, behind)
            return ids, mask, call
        padding = (extra,) * batch
        if attention_mask is not None:
            padding = tuple((size - attention_mask.long().sum(1)).tolist())
        known = (padding, size, ids.device)
        if known not in self._masks:
            before = on_device(padding, ids.device)
            place = torch.arange(size, device=ids.device)
            self._masks[known] = (place >= before[:, None]).long()
        return ids, self._masks[known], call | {"padding": padding}


def attach_oft(policy: OpenVLAOFT, capture: Capture, undo: ExitStack) -> None:
    """One pass: images, prompt and state in, a chunk of actions out."""
    config, prompts = policy.config, Prompts(capture)
    behind = sum(config.views) + (config.proprio_dim is not None) + config.slots + 1

    def forward(
        input_ids: Tensor,
        pixel_values: Tensor,
        proprio: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        ids, mask, call = prompts(input_ids, attention_mask, behind)
        step = partial(OpenVLAOFT.forward, policy)
        return capture.run(
            "oft", policy.language_model.model, call, _of(step), ids, pixel_values, proprio, mask
        )

    replace(policy, "forward", forward, undo)


def attach_openvla(policy: OpenVLA, capture: Capture, undo: ExitStack) -> None:
    """A prefill, and one pass for each action token behind the first."""
    model, prompts = policy.language_model, Prompts(capture)
    visual = sum(policy.config.views)

    def prefill(cache: DynamicCache, ids: Tensor, pixels: Tensor, mask: Tensor) -> Tensor:
        embeds = policy.embed(ids, pixels, mask)
        arguments = sequence_arguments(widen_mask(mask, visual))
        return next_token(cache, arguments, inputs_embeds=embeds)

    def decode(cache: DynamicCache, token: Tensor, mask: Tensor) -> Tensor:
        arguments = sequence_arguments(mask)
        arguments["position_ids"] = arguments["position_ids"][:, -1:]
        return next_token(cache, arguments, input_ids=token.clamp_min(0))

    def next_token(cache: DynamicCache, arguments: dict[str, Tensor], **inputs: Tensor) -> Tensor:
        output = model(
            **inputs, past_key_values=cache, use_cache=True, logits_to_keep=1, **arguments
        )
        return greedy(output.logits[:, -1])

    @torch.no_grad()
    def predict_tokens(
        input_ids: Tensor, pixel_values: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        ids, mask, call = prompts(input_ids, attention_mask, visual)
        cache = DynamicCache(config=model.config)
        call["past_key_values"] = cache
        tokens = [
            capture.run("prefill", model.model, call, prefill, cache, ids, pixel_values, mask)
        ]
        mask = F.pad(mask, (0, visual), value=1)
        while len(tokens) < policy.config.action_dim:
            mask = F.pad(mask, (0, 1), value=1)
            call = {"input_ids": tokens[-1], "past_key_values": cache, "attention_mask": mask}
            tokens.append(
                capture.run(
                    f"decode {len(tokens)}", model.model, call, decode, cache, tokens[-1], mask
                )
            )
        return torch.cat(tokens, dim=1)

    replace(policy, "predict_tokens", predict_tokens, undo)


def _of(function: Any) -> Any:
    def call(*args: Any) -> Any:
        return function(*args)

    return call
