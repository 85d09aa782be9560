"""pi0 and pi0.5: a PaliGemma prefix, and an action expert that turns noise into actions.

Prefix, one row per batch entry: `visual tokens of every camera | prompt | padding`. It runs once
and sees itself in both directions. Suffix: `robot state (pi0 alone) | chunk of actions`. It runs
once per flow step, and its layer i reads what layer i of the prefix left.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

from ..port import Port, check_attention, refuse_broken
from . import processing
from .chunking import Guide, decay, guided
from .config import Pi0Config
from .gemma import GemmaStack, SharedKV
from .processing import Inputs
from .vision import VisionTower

if TYPE_CHECKING:
    from contextlib import ExitStack

    from ..capture import Capture


@dataclass(frozen=True, eq=False)
class Prefix:
    """What the flow steps need of a prefix: its keys and values, and `valid` [B, P] bool."""

    shared: SharedKV
    valid: Tensor

    def repeat(self, times: int) -> Prefix:
        """The same prefixes, each `times` times in a row."""
        return Prefix(self.shared.repeat(times), self.valid.repeat_interleave(times, dim=0))


class Pi0(Port):
    """Vision-language-action policy with a flow-matching expert (arXiv:2410.24164, 2504.16054).

    Weights are random until loaded. `tokenizer` is needed by `predict_action` alone.

    Raises:
        ValueError: an unknown attention implementation.
    """

    def __init__(self, config: Pi0Config, *, attn_implementation: str = "sdpa") -> None:
        super().__init__()
        check_attention(attn_implementation)
        self.config = config
        self.tokenizer: Any = None
        width = config.expert.width
        options: dict[str, Any] = {
            "activation": config.activation,
            "attention": attn_implementation,
        }
        self.vision_tower = VisionTower(config.vision)
        self.projector = nn.Linear(config.vision.width, config.prefix.width)
        self.language_model = GemmaStack(config.prefix, vocab_size=config.vocab_size, **options)
        self.expert = GemmaStack(
            config.expert, condition=width if config.kind == "pi05" else None, **options
        )
        self.action_in_proj = nn.Linear(config.max_action_dim, width)
        self.action_out_proj = nn.Linear(width, config.max_action_dim)
        if config.kind == "pi0":
            self.state_proj = nn.Linear(config.max_state_dim, width)
            self.action_time_mlp_in = nn.Linear(2 * width, width)
            self.action_time_mlp_out = nn.Linear(width, width)
        else:
            self.time_mlp_in = nn.Linear(width, width)
            self.time_mlp_out = nn.Linear(width, width)
        self.reset_parameters()

    @property
    def device(self) -> torch.device:
        return self.projector.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.projector.weight.dtype

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fresh random weights in place, in the dtype and on the device the module has."""
        for module in self.modules():
            if isinstance(module, GemmaRMSNorm):
                module.weight.zero_()
            elif isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, nn.LayerNorm | nn.Embedding):
                module.reset_parameters()
            if isinstance(module, nn.Embedding):
                module.weight.mul_(0.02)

    # ------------------------------------------------------------------ the two passes
    def embed_prefix(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Embeddings [B, P, D] of images and prompt, and which of them are real, [B, P] bool."""
        cameras, width = inputs.images.shape[1], self.config.prefix.width
        features = self.vision_tower(inputs.images.flatten(0, 1).to(self.dtype))
        visual = self.projector(features).unflatten(0, (-1, cameras)).flatten(1, 2)
        words = self.language_model.embed_tokens(inputs.tokens) * math.sqrt(width)
        seen = inputs.image_mask.repeat_interleave(self.config.vision.patches, dim=1)
        valid = torch.cat([seen, inputs.token_mask], dim=1)
        return torch.cat([visual, words], dim=1), valid

    def read_prefix(self, inputs: Inputs) -> Prefix:
        """Run the prefix once. Padding is seen by nobody and counts for no position."""
        shared = SharedKV()
        return Prefix(shared, self._run_prefix(inputs, shared))

    def _run_prefix(self, inputs: Inputs, shared: SharedKV) -> Tensor:
        """Fill `shared`; which tokens of the prefix are real, [B, P] bool."""
        embeds, valid = self.embed_prefix(inputs)
        length = embeds.shape[1]
        mask = additive(valid, embeds.dtype)[:, None, None, :].expand(-1, -1, length, -1)
        self.language_model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=(valid.long().cumsum(1) - 1).clamp_min(0),
            past_key_values=shared,
        )
        return valid

    def _attach(self, capture: Capture, undo: ExitStack) -> None:
        from .captured import attach

        attach(self, capture, undo)

    def embed_suffix(
        self, state: Tensor, noisy: Tensor, time: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Embeddings [B, Q, D] of state and noisy actions, and what the norms are told [B, D]."""
        width = self.config.expert.width
        actions = self.action_in_proj(noisy.to(self.dtype))
        clock = sinusoid(time, width, self.config.min_period, self.config.max_period)
        clock = clock.to(actions.dtype)
        if self.config.kind == "pi05":
            condition = F.silu(self.time_mlp_out(F.silu(self.time_mlp_in(clock))))
            return actions, condition
        both = torch.cat([actions, clock[:, None].expand_as(actions)], dim=2)
        actions = self.action_time_mlp_out(F.silu(self.action_time_mlp_in(both)))
        return torch.cat([self.state_proj(state.to(self.dtype))[:, None], actions], dim=1), None

    def velocity(self, prefix: Prefix, state: Tensor, noisy: Tensor, time: Tensor) -> Tensor:
        """Where the noisy actions should move, fp32 [B, chunk, max_action_dim].

        Args:
            prefix: of the same B rows.
            state: `[B, max_state_dim]`, scaled and padded; pi0.5 does not look at it.
            noisy: `[B, chunk, max_action_dim]`, `time` parts noise and `1 - time` parts actions.
            time: `[B]`, from 1 (noise) to 0.
        """
        embeds, condition = self.embed_suffix(state, noisy, time)
        batch, rows = embeds.shape[:2]
        # The state sees prefix and itself; actions see everything.
        own = torch.ones(rows, rows, dtype=torch.bool, device=embeds.device)
        own[: rows - self.config.chunk, rows - self.config.chunk :] = False
        seen = prefix.valid[:, None].expand(-1, rows, -1)
        seen = torch.cat([seen, own.expand(batch, -1, -1)], dim=2)
        behind = prefix.valid.sum(dim=1, keepdim=True)
        hidden = self.expert(
            inputs_embeds=embeds,
            attention_mask=additive(seen, embeds.dtype)[:, None],
            position_ids=behind + torch.arange(rows, device=embeds.device),
            past_key_values=prefix.shared,
            condition=condition,
        ).last_hidden_state
        return self.action_out_proj(hidden[:, -self.config.chunk :]).float()

    # ------------------------------------------------------------------ acting
    @torch.no_grad()
    def sample(
        self, inputs: Inputs, noise: Tensor | None = None, guide: Guide | None = None
    ) -> Tensor:
        """Scaled actions, fp32 [B, chunk, max_action_dim]: Euler steps from noise.

        `noise` has that shape; None draws it as the configuration says. With `guide` they continue
        a chunk that is being carried out.
        """
        batch, steps = len(inputs.tokens), self.config.flow_steps
        actions = self.make_noise(batch) if noise is None else noise.to(self.device).float()
        prefix = self.read_prefix(inputs)
        if guide is not None:
            wanted, weights = self._wanted(guide)
        for step in range(steps):
            now = 1 - step / steps
            time = torch.full((batch,), now, dtype=torch.float32, device=self.device)
            velocity = partial(self._velocity_at, prefix, inputs.state, time)
            if guide is None:
                actions = actions - velocity(actions) / steps
            else:
                actions = actions - guided(velocity, actions, now, wanted, weights, guide) / steps
        return actions

    def _velocity_at(self, prefix: Prefix, state: Tensor, time: Tensor, noisy: Tensor) -> Tensor:
        return self.velocity(prefix, state, noisy, time)

    def _wanted(self, guide: Guide) -> tuple[Tensor, Tensor]:
        """Actions to continue, in the policy's units, and how much: `[chunk, max_action_dim]`."""
        known = guide.left[: self.config.chunk]
        if known.shape[1] != self.config.action_dim or not np.isfinite(known).all():
            raise ValueError(
                f"guide: expected finite actions [n, {self.config.action_dim}], got {known.shape}"
            )
        size = (self.config.chunk, self.config.max_action_dim)
        wanted = torch.zeros(size, dtype=torch.float32)
        scaled = processing.scale(self.config, "action").normalise(known.astype(np.float64))
        wanted[: len(known), : self.config.action_dim] = torch.from_numpy(scaled).float()
        weights = torch.zeros_like(wanted)
        own = decay(len(known), guide.delay, self.config.chunk)
        weights[:, : self.config.action_dim] = own[:, None]
        return wanted.to(self.device), weights.to(self.device)

    def make_noise(self, batch: int) -> Tensor:
        """Normal noise [batch, chunk, max_action_dim]; the same in every row if it is seeded."""
        shape, seed = (self.config.chunk, self.config.max_action_dim), self.config.noise_seed
        if seed is None:
            return torch.randn(batch, *shape, dtype=torch.float32, device=self.device)
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(shape, generator=generator, dtype=torch.float32)
        return noise.to(self.device).expand(batch, -1, -1)

    def predict_action(
        self,
        images: Any,
        instruction: str,
        proprio: Any = None,
        *,
        noise: Tensor | None = None,
        guide: Guide | None = None,
    ) -> np.ndarray:
        """Chunk of actions in robot units, float32 [chunk, action_dim].

        Args:
            images: uint8 [H, W, 3] or PIL images: a list with one per camera in the order of
                `config.cameras`, or a dict by their names. None, or a name left out, is a missing
                camera.
            instruction: what to do, such as "pick up the can".
            proprio: robot state [proprio_dim] in robot units.
            noise: `[chunk, max_action_dim]` to start from; None: as the configuration says.
            guide: what the chunk is to continue; None: nothing.

        Errors: TypeError and ValueError that say which argument is wrong and what is expected;
        NonFiniteActionError when the policy works out no numbers.
        """
        observation = {"images": images, "instruction": instruction, "proprio": proprio}
        batched = None if noise is None else noise[None]
        (action,) = self.predict_actions([observation], noise=batched, guide=guide)
        return action

    def predict_actions(
        self,
        observations: Sequence[Mapping[str, Any]],
        *,
        noise: Tensor | None = None,
        guide: Guide | None = None,
    ) -> np.ndarray:
        """Chunks of several observations in one pass, float32 [B, chunk, action_dim].

        An observation is a dict with `images`, `instruction` and `proprio`, see `predict_action`.
        All of them continue the same `guide`.
        """
        scale = processing.scale(self.config, "action")
        inputs = self.prepare(observations)
        if noise is not None:
            shape = (len(inputs.tokens), self.config.chunk, self.config.max_action_dim)
            processing.check_noise(noise, shape)
        actions = self.sample(inputs, noise, guide)[..., : self.config.action_dim].cpu().numpy()
        with np.errstate(over="ignore"):  # What is too large for fp32 is refused next.
            made = scale.unnormalise(actions.astype(np.float64)).astype(np.float32)
        refuse_broken(~np.isfinite(made), "actions")
        return made

    def prepare(self, observations: Sequence[Mapping[str, Any]]) -> Inputs:
        """Model inputs of a list of observations, on the model's device; as `predict_actions`."""
        return processing.prepare(observations, self.config, self.tokenizer).to(self.device)


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask: 0 where `seen`, the lowest number elsewhere."""
    return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


def sinusoid(time: Tensor, width: int, min_period: float, max_period: float) -> Tensor:
    """Sines, then cosines, of `time` [B] at `width / 2` periods each: fp64 [B, width]."""
    share = torch.linspace(0, 1, width // 2, dtype=torch.float64, device=time.device)
    period = min_period * (max_period / min_period) ** share
    angles = time.double()[:, None] * (2 * math.pi / period)
    return torch.cat([angles.sin(), angles.cos()], dim=1)
