"""One pruned step of VLA-Pruner, slow and obvious: no hooks, no classes, no cache, one image.

Read this first. `vla_pruner` does the same inside a model that it does not own; a test holds both
against each other. S tokens in the prompt, M of them visual, D wide, K full layers, k that stay.

    python docs/one_step.py
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM


def one_step(
    model: LlamaForCausalLM,
    embeds: Tensor,
    visual: slice,
    past_scores: list[Tensor],
    *,
    k: int,
    layer: int,
    window: int = 3,
    gamma: float = 0.8,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the decoder once and drop visual tokens before layer `layer`.

    Args:
        model: with eager attention, which returns its probabilities.
        embeds: `[S, D]`, the prompt: words, and image features at the places `visual`.
        past_scores: `[M]` action scores of the episode's earlier steps, newest first.

    Returns:
        Logits `[vocabulary]` of the last row, kept visual tokens `[k]` (0..M-1), and this step's
        action score `[M]`, for `past_scores` of the next.
    """
    x, decoder = embeds[None], model.model
    positions = torch.arange(len(embeds))
    tokens = torch.arange(visual.start, visual.stop)  # where visual tokens are in the prompt
    kept = torch.arange(len(tokens))
    semantic, action = torch.zeros(2, len(tokens))
    depth = len(decoder.layers)
    for index, block in enumerate(decoder.layers):
        if index == layer and len(past_scores) >= window:
            kept = choose(embeds[visual], semantic, forecast(past_scores, window, gamma), k)
            stays = torch.ones(len(embeds), dtype=torch.bool)
            stays[tokens] = False
            stays[tokens[kept]] = True
            x, positions = x[:, stays], positions[stays]  # survivors keep their positions
        x, attention = run(block, x, positions, decoder.rotary_emb)
        columns = torch.isin(positions, tokens)
        seen = attention.mean(0)[:, columns]  # mean over heads: [rows, visual tokens left]
        if index == layer - 1:
            semantic = seen.mean(0)  # Eq. 2: what the whole prompt looks at
        if index >= depth // 2:  # Eq. 3-4: what the action query looks at, latter half of layers
            action[kept] += seen[-1] / (depth - depth // 2)
    logits = model.lm_head(decoder.norm(x))[0, -1]
    return logits, kept, action


def forecast(past_scores: list[Tensor], window: int, gamma: float) -> Tensor:
    """Eq. 7: the action score expected now, from the last `window` steps."""
    return sum(gamma ** (i + 1) * past for i, past in enumerate(past_scores[:window]))


def choose(features: Tensor, semantic: Tensor, expected: Tensor, k: int) -> Tensor:
    """Algorithm 2: pool the k best of both scores, keep the k least alike of the pool, `[k]`."""
    pool = sorted({*semantic.topk(k).indices.tolist(), *expected.topk(k).indices.tolist()})
    unit = torch.nn.functional.normalize(features[pool], dim=-1)
    distance = 1 - unit @ unit.T
    # Algorithm 1 begins with the token whose second-nearest other is farthest ...
    others = distance.clone().fill_diagonal_(float("inf"))
    picked = [int(others.sort(dim=1).values[:, min(1, len(pool) - 2)].argmax())]
    # ... and goes on with the one that is farthest from all that were picked.
    while len(picked) < k:
        nearest = distance[:, picked].min(dim=1).values
        nearest[picked] = -1
        picked.append(int(nearest.argmax()))
    return torch.tensor(sorted(pool[i] for i in picked))


def run(block, x: Tensor, positions: Tensor, rotary) -> tuple[Tensor, Tensor]:
    """A decoder layer on `x` `[1, n, D]` at `positions`: its output, and attention `[H, n, n]`."""
    n = x.shape[1]
    mask = torch.full((n, n), torch.finfo(x.dtype).min).triu(1)[None, None]
    attention = []
    hook = block.self_attn.register_forward_hook(lambda *call: attention.append(call[2][1][0]))
    x = block(x, attention_mask=mask, position_embeddings=rotary(x, positions[None]))
    hook.remove()
    return (x[0] if isinstance(x, tuple) else x), attention[0]


def tiny() -> LlamaForCausalLM:
    """A decoder with random weights, large enough that attention is far from uniform."""
    sizes = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_attention_heads=4)
    config = LlamaConfig(**sizes, num_hidden_layers=6)
    model = LlamaForCausalLM._from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.15, generator=generator)
    return model


if __name__ == "__main__":
    model, scores = tiny(), []
    with torch.no_grad():
        for step in range(5):
            frame = torch.randn(36, 32, generator=torch.Generator().manual_seed(step))
            logits, kept, action = one_step(model, frame, slice(1, 25), scores, k=6, layer=3)
            print(
                f"step {step}: {len(kept)} of 24 visual tokens {kept.tolist()}, "
                f"next token {int(logits.argmax())}"
            )
            scores.insert(0, action)
