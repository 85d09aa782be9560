"""VLA-Cache as loops over layers and tokens, one sequence at a time, everything computed."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass
class SlowStep:
    """What one step gives and leaves behind; `keys` and `values` per layer, [Hkv, prompt, d]."""

    output: Tensor = field(default_factory=lambda: torch.empty(0))
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)
    relevance: list[float] = field(default_factory=list)
    frame: Tensor = field(default_factory=lambda: torch.empty(0))


def slow_pass(
    decoder: nn.Module,
    x: Tensor,
    *,
    prompt: int,
    visual: range,
    text: range,
    text_layer: int,
    causal: bool,
    reused: list[set[int]],
    past: SlowStep | None,
) -> SlowStep:
    """Run `x` [n, D], a prompt and what is decoded after it, through a decoder like Llama.

    `reused` names, for each layer, the visual tokens whose key and value come from `past`.
    """
    step, n, hidden = SlowStep(), len(x), x
    cos, sin = (table[0] for table in decoder.rotary_emb(x[None], torch.arange(n)[None]))
    for number, layer in enumerate(decoder.layers):
        attention, normed = layer.self_attn, layer.input_layernorm(hidden)

        def heads(name: str, a=attention, z=normed) -> Tensor:
            made = getattr(a, f"{name}_proj")(z).view(n, -1, a.head_dim)
            norm = getattr(a, f"{name}_norm", None)
            return (made if norm is None else norm(made)).transpose(0, 1)

        query, key, value = rotated(heads("q"), cos, sin), rotated(heads("k"), cos, sin), heads("v")
        key, value = key.clone(), value.clone()
        for token in reused[number]:
            assert past is not None
            key[:, visual[token]] = past.keys[number][:, visual[token]]
            value[:, visual[token]] = past.values[number][:, visual[token]]
        step.keys.append(key[:, :prompt])
        step.values.append(value[:, :prompt])
        group = query.shape[0] // key.shape[0]
        weights, mixed = [], []
        for head in range(query.shape[0]):
            logits = query[head] @ key[head // group].T / math.sqrt(attention.head_dim)
            if causal:
                logits = logits.masked_fill(~torch.ones(n, n).tril().bool(), float("-inf"))
            weights.append(torch.softmax(logits, dim=-1))
            mixed.append(weights[-1] @ value[head // group])
        hidden = hidden + attention.o_proj(torch.cat(mixed, dim=-1))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        mean = sum(weights) / len(weights)
        gone = {visual[token] for token in reused[number]}
        rows = [row for row in range(prompt) if row not in gone]
        step.entropy.append(sum(spread(mean[row].tolist()) for row in rows) / len(rows))
        if number == text_layer:
            step.relevance = [float(mean[list(text), at].mean()) for at in visual]
    step.output = decoder.norm(hidden)
    return step


def rotated(z: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = z.shape[-1] // 2
    return z * cos + torch.cat([-z[..., half:], z[..., :half]], dim=-1) * sin


def spread(row: list[float]) -> float:
    return -sum(p * math.log(p) for p in row if p > 0)


def slow_similarity(before: Tensor, now: Tensor, size: int) -> list[float]:
    """Cosine of each patch of `[cameras, 3, H, W]`, camera by camera, row by row."""
    found = []
    for camera in range(now.shape[0]):
        for y in range(0, now.shape[2], size):
            for x in range(0, now.shape[3], size):
                a, b = (
                    frame[camera, :, y : y + size, x : x + size].double().flatten()
                    for frame in (before, now)
                )
                same = torch.equal(a, b)
                found.append(1.0 if same else float(a @ b / (a.norm() * b.norm())))
    return found


def slow_choice(
    past: SlowStep,
    similarity: list[float],
    *,
    views: tuple[int, ...],
    cuts: tuple[int, ...],
    keep: float,
    limits: str = "paper",
    order: str = "position",
    threshold: float = 0.996,
    growth: float = 0.55,
) -> list[set[int]]:
    """Tokens that are reused in each layer."""
    reusable: list[int] = []
    start = 0
    for size in views:
        tokens, k = range(start, start + size), size - max(1, round(keep * size))
        static, relevant = round(1.5 * k), round(0.5 * k)
        if limits == "code":
            p, t = (130, 120) if len(views) == 1 else (150, 100)
            static, relevant = round(p * size / 256), round(t * size / 256)
        by_similarity = sorted(tokens, key=lambda token: (-similarity[token], token))
        by_relevance = sorted(tokens, key=lambda token: (-past.relevance[token], token))
        left = [
            token
            for token in by_similarity[:static]
            if similarity[token] >= threshold and token not in by_relevance[:relevant]
        ]
        reusable += left[:k]
        start += size
    reusable.sort(key=(lambda t: (-similarity[t], t)) if order == "similarity" else None)
    low, high = min(past.entropy), max(past.entropy)
    shares: list[float] = []
    for entropy in past.entropy:
        share = 1 - (entropy - low) / (high - low)
        if shares and share > shares[-1]:
            share = shares[-1] + growth * (share - shares[-1])
        shares.append(share)
    count, found = 0, []
    for layer in range(len(past.entropy)):
        if layer in cuts and reusable:
            count = max(count, 1, math.floor(shares[layer] * len(reusable)))
        found.append(set(reusable[:count]))
    return found
