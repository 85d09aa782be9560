"""A minimal double of openpi's `PI0Pytorch`.

It has the names, the structure and the calls that the adapter relies on: stacks are run through
`.forward`, the expert reads a cache that it does not add to, masks are additive and 4-D, eager
attention is asked for in each call, `sample_actions` is compiled when the model is made. Vision and
text are tiny, and the stacks are Gemma's of transformers instead of openpi's patched ones.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace

import torch
from torch import nn
from transformers import GemmaConfig, GemmaModel

HORIZON, ACTION, WORDS = 6, 7, 8


def stack() -> GemmaModel:
    return GemmaModel(
        GemmaConfig(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=8,
        )
    )


class PaliGemmaWithExpertModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.paligemma = nn.Module()
        self.paligemma.language_model = stack()
        self.paligemma.vision_tower = nn.Conv2d(3, 32, kernel_size=8, stride=8)
        self.gemma_expert = nn.Module()
        self.gemma_expert.model = stack()
        self.gemma_expert.model.embed_tokens = None

    def embed_image(self, image):
        return self.paligemma.vision_tower(image).flatten(2).transpose(1, 2)

    def forward(self, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache):
        prefix, suffix = inputs_embeds
        run = self.gemma_expert.model if prefix is None else self.paligemma.language_model
        # openpi's patched Gemma joins keys without writing to the cache; ours gets a copy.
        output = run.forward(
            inputs_embeds=suffix if prefix is None else prefix,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=copy.deepcopy(past_key_values),
            use_cache=use_cache,
        )
        return output.last_hidden_state, output.past_key_values


class PI0Pytorch(nn.Module):
    def __init__(self, compiled=False):
        super().__init__()
        self.config = SimpleNamespace(action_horizon=HORIZON, action_dim=ACTION)
        self.paligemma_with_expert = PaliGemmaWithExpertModel()
        self.action_in_proj = nn.Linear(ACTION, 32)
        self.action_out_proj = nn.Linear(32, ACTION)
        self.state_proj = nn.Linear(ACTION, 32)
        if compiled:
            self.sample_actions = torch.compile(self.sample_actions, backend="eager")

    def embed_prefix(self, images, img_masks, lang_tokens, lang_masks):
        stacks = self.paligemma_with_expert
        parts = [stacks.embed_image(image) for image in images]
        seen = [m[:, None].expand(-1, p.shape[1]) for m, p in zip(img_masks, parts, strict=True)]
        parts.append(stacks.paligemma.language_model.embed_tokens(lang_tokens))
        pads = torch.cat([*seen, lang_masks], dim=1)
        return torch.cat(parts, dim=1), pads, torch.zeros_like(pads)

    @torch.no_grad()
    def sample_actions(self, device, observation, noise=None, num_steps=10):
        stacks = self.paligemma_with_expert
        prefix, pads, _ = self.embed_prefix(
            observation.images, observation.masks, observation.words, observation.word_masks
        )
        stacks.paligemma.language_model.config._attn_implementation = "eager"
        _, cache = stacks.forward(
            attention_mask=additive(pads[:, None] & pads[:, :, None]),
            position_ids=pads.cumsum(1) - 1,
            past_key_values=None,
            inputs_embeds=[prefix, None],
            use_cache=True,
        )
        actions = noise
        for _ in range(num_steps):
            flow = self.denoise_step(observation.state, pads, cache, actions)
            actions = actions - flow / num_steps
        return actions

    def denoise_step(self, state, pads, cache, actions):
        suffix = torch.cat([self.state_proj(state)[:, None], self.action_in_proj(actions)], dim=1)
        batch, queries = suffix.shape[:2]
        own = torch.ones(queries, queries, dtype=torch.bool)
        own[0, 1:] = False  # the state does not see the actions
        sees = torch.cat([pads[:, None].expand(-1, queries, -1), own.expand(batch, -1, -1)], dim=2)
        self.paligemma_with_expert.gemma_expert.model.config._attn_implementation = "eager"
        output, _ = self.paligemma_with_expert.forward(
            attention_mask=additive(sees),
            position_ids=pads.sum(1, keepdim=True) + torch.arange(queries),
            past_key_values=cache,
            inputs_embeds=[None, suffix],
            use_cache=False,
        )
        return self.action_out_proj(output[:, -HORIZON:])


def additive(sees):
    return torch.where(sees[:, None], 0.0, -2.3819763e38)


def observation(seed, batch=2, cameras=2):
    """One row has a missing camera and a shorter instruction."""
    generator = torch.Generator().manual_seed(seed)
    masks = [torch.ones(batch, dtype=torch.bool) for _ in range(cameras)]
    masks[-1][1:] = False
    word_masks = torch.ones(batch, WORDS, dtype=torch.bool)
    word_masks[1:, 5:] = False
    return SimpleNamespace(
        images=[torch.randn(batch, 3, 32, 32, generator=generator) for _ in range(cameras)],
        masks=masks,
        words=torch.randint(1, 90, (batch, WORDS), generator=torch.Generator().manual_seed(7)),
        word_masks=word_masks,
        state=torch.randn(batch, ACTION, generator=generator),
    )
