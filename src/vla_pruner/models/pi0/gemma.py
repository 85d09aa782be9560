"""The two Gemma stacks of pi0 and the keys and values that they share."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GemmaConfig
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.gemma.modeling_gemma import GemmaAttention, GemmaRMSNorm

from .config import StackConfig

ROPE_THETA = 10000.0
_NAMES = inspect.signature(GemmaAttention.forward).parameters
CACHE = "cache" if "cache" in _NAMES else "past_key_values"
"""What attention calls its cache: the former since transformers 5.24."""


class SharedKV:
    """Keys and values of a prefix, layer by layer, with room behind them for one flow step.

    The first `update` of a layer is the prefix's and fills it. Every later one is a suffix's: it is
    written behind the prefix, over the suffix of the flow step before, so that the prefix is copied
    once per call of the policy. With `pure`, or where gradients are recorded, nothing is written
    over.
    """

    def __init__(self, *, pure: bool = False) -> None:
        self._pure = pure
        self._prefix: dict[int, tuple[Tensor, Tensor]] = {}
        self._both: dict[int, tuple[Tensor, Tensor]] = {}

    def update(
        self, key: Tensor, value: Tensor, layer: int, *unused: Any, **unread: Any
    ) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, N, d] that a layer attends to, given its own [B, H, n, d]."""
        if layer not in self._prefix:
            self._prefix[layer] = (key, value)
            return key, value
        prefix = self._prefix[layer]
        if self._pure or torch.is_grad_enabled():
            return torch.cat([prefix[0], key], dim=2), torch.cat([prefix[1], value], dim=2)
        held, length = prefix[0].shape[2], prefix[0].shape[2] + key.shape[2]
        both = self._both.get(layer)
        if both is None or both[0].shape[2] != length:
            both = (torch.cat([prefix[0], key], dim=2), torch.cat([prefix[1], value], dim=2))
            self._both[layer] = both
        else:
            both[0][:, :, held:] = key
            both[1][:, :, held:] = value
        return both

    def get_seq_length(self, layer: int = 0) -> int:
        """Tokens of the prefix that a layer holds."""
        return self._prefix[layer][0].shape[2] if layer in self._prefix else 0

    def repeat(self, times: int) -> SharedKV:
        """The same prefixes, each `times` times in a row."""
        other = SharedKV(pure=self._pure)
        other._prefix = {
            layer: (key.repeat_interleave(times, dim=0), value.repeat_interleave(times, dim=0))
            for layer, (key, value) in self._prefix.items()
        }
        return other


class AdaptiveRMSNorm(nn.Module):
    """RMS norm whose scale, shift and gate come from a condition (pi0.5)."""

    def __init__(self, width: int, condition: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.dense = nn.Linear(condition, 3 * width)

    def forward(self, x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Normed [B, n, D], and the gate [B, 1, D] of what is made of it; condition [B, C]."""
        scale, shift, gate = self.dense(condition)[:, None].chunk(3, dim=-1)
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return (normed * (1 + scale.float()) + shift.float()).to(x.dtype), gate.to(x.dtype)


class Mlp(nn.Module):
    """Gated feed-forward."""

    def __init__(self, width: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)
        self.activation = ACT2FN[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Pre-norm decoder layer."""

    def __init__(self, config: GemmaConfig, index: int, condition: int | None) -> None:
        super().__init__()
        self.self_attn = GemmaAttention(config, layer_idx=index)
        self.mlp = Mlp(config.hidden_size, config.intermediate_size, config.hidden_act)
        self.input_layernorm = make_norm(config, condition)
        self.post_attention_layernorm = make_norm(config, condition)

    def forward(
        self,
        hidden_states: Tensor,
        *,
        attention_mask: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        past_key_values: SharedKV,
        condition: Tensor | None = None,
    ) -> Tensor:
        def attend(x: Tensor) -> Tensor:
            return self.self_attn(
                hidden_states=x,
                attention_mask=attention_mask,
                position_embeddings=position_embeddings,
                **{CACHE: past_key_values},
            )[0]

        hidden_states = _residual(hidden_states, self.input_layernorm, attend, condition)
        return _residual(hidden_states, self.post_attention_layernorm, self.mlp, condition)


class GemmaStack(nn.Module):
    """Gemma's decoder layers and final norm over embeddings that are taken as they are.

    Args:
        sizes: what it is made of.
        activation: of the feed-forward, by its name in transformers.
        attention: "sdpa" or "eager".
        vocab_size: rows of the token table; None: no table (the expert).
        condition: width of what the norms are told; None: plain norms.
    """

    def __init__(
        self,
        sizes: StackConfig,
        *,
        activation: str,
        attention: str,
        vocab_size: int | None = None,
        condition: int | None = None,
    ) -> None:
        super().__init__()
        self.config = GemmaConfig(
            vocab_size=vocab_size or 1,
            hidden_size=sizes.width,
            intermediate_size=sizes.mlp,
            num_hidden_layers=sizes.depth,
            num_attention_heads=sizes.heads,
            num_key_value_heads=sizes.kv_heads,
            head_dim=sizes.head_dim,
            hidden_act=activation,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
        )
        self.config._attn_implementation = attention
        if vocab_size is not None:
            self.embed_tokens = nn.Embedding(vocab_size, sizes.width)
        self.layers = nn.ModuleList(Layer(self.config, i, condition) for i in range(sizes.depth))
        self.norm = make_norm(self.config, condition)

    def forward(
        self,
        *,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past_key_values: SharedKV,
        condition: Tensor | None = None,
    ) -> BaseModelOutput:
        """Hidden states [B, S, D] behind the final norm, as `last_hidden_state`.

        Args:
            inputs_embeds: `[B, S, D]`.
            attention_mask: `[B, 1, S, N]` additive, over what is held already and the S new ones.
            position_ids: `[B, S]`.
            past_key_values: filled by the first stack that gets it, read by the second.
            condition: `[B, C]` for adaptive norms.
        """
        tables = rotary(position_ids, self.config.head_dim, inputs_embeds.dtype)
        hidden = inputs_embeds
        for layer in self.layers:
            hidden = layer(
                hidden,
                attention_mask=attention_mask,
                position_embeddings=tables,
                past_key_values=past_key_values,
                condition=condition,
            )
        hidden = self.norm(hidden) if condition is None else self.norm(hidden, condition)[0]
        return BaseModelOutput(last_hidden_state=hidden)


def make_norm(config: GemmaConfig, condition: int | None) -> nn.Module:
    """Gemma's norm, or one that listens to a condition of that width."""
    if condition is None:
        return GemmaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
    return AdaptiveRMSNorm(config.hidden_size, condition, config.rms_norm_eps)


def rotary(position_ids: Tensor, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine tables [B, S, head_dim] of positions [B, S], worked out in fp32."""
    exponents = torch.arange(0, head_dim, 2, device=position_ids.device).float() / head_dim
    angles = position_ids[..., None].float() * ROPE_THETA**-exponents
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _residual(
    x: Tensor, norm: nn.Module, block: Callable[[Tensor], Tensor], condition: Tensor | None
) -> Tensor:
    if condition is None:
        return x + block(norm(x))
    normed, gate = norm(x, condition)
    return x + block(normed) * gate
