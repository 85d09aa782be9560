"""A minimal double of lerobot's `GrootPolicy`, for environments without lerobot.

It has the names, the structure and the calls that the adapter relies on: a backbone that hands on
its last layer's output with masks per token, a head whose self-attention over it has no mask, and a
transformer in which blocks attend to the head's own rows and to the backbone's tokens in turn.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig, LlamaModel

IMAGE, PATCHES, HORIZON, ACTION, WIDTH = 90, 16, 6, 7, 32


class Attention(nn.Module):
    heads, scale = 4, 8**-0.5

    def __init__(self, cross):
        super().__init__()
        self.is_cross_attention = cross
        self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, hidden, encoder_hidden_states=None, attention_mask=None):
        other = hidden if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = self.to_q(hidden), self.to_k(other), self.to_v(other)
        split = [x.unflatten(-1, (4, 8)).transpose(1, 2) for x in (query, key, value)]
        mask = None if attention_mask is None else attention_mask[:, None, None]
        return scaled_dot_product_attention(*split, attn_mask=mask).transpose(1, 2).flatten(2)


class Block(nn.Module):
    def __init__(self, cross=False):
        super().__init__()
        self.norm, self.attn1, self.pos_embed = nn.LayerNorm(WIDTH), Attention(cross), None

    def forward(self, hidden, **kwargs):
        return hidden + self.attn1(self.norm(hidden), **kwargs)


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.transformer_blocks = nn.ModuleList([Block()])

    def forward(self, hidden):
        return self.transformer_blocks[0](hidden)


class DiT(nn.Module):
    attend_text_every_n_blocks = 2

    def __init__(self):
        super().__init__()
        self.transformer_blocks = nn.ModuleList(Block(index % 2 == 0) for index in range(8))

    def forward(self, hidden_states, encoder_hidden_states, image_mask, valid):
        for index, block in enumerate(self.transformer_blocks):
            if index % 2:
                hidden_states = block(hidden_states)
                continue
            seen = image_mask if index % 4 else ~image_mask
            hidden_states = block(
                hidden_states,
                encoder_hidden_states=encoder_hidden_states,
                attention_mask=seen & valid,
            )
        return hidden_states


class Head(nn.Module):
    action_horizon, num_inference_timesteps = HORIZON, 4

    def __init__(self):
        super().__init__()
        self.model, self.vl_self_attention = DiT(), Mixer()
        self.state, self.inwards = nn.Linear(ACTION, WIDTH), nn.Linear(ACTION, WIDTH)
        self.outwards = nn.Linear(WIDTH, ACTION)

    def process_backbone_output(self, output):
        output["backbone_features"] = self.vl_self_attention(output["backbone_features"])
        return output

    def get_action(self, output, state, noise):
        output = self.process_backbone_output(output)
        actions, steps = noise, self.num_inference_timesteps
        for _ in range(steps):
            rows = torch.cat([self.state(state)[:, None], self.inwards(actions)], dim=1)
            rows = self.model(
                rows,
                output["backbone_features"],
                output["image_mask"],
                output["backbone_attention_mask"],
            )
            actions = actions + self.outwards(rows[:, -HORIZON:]) / steps
        return actions


class VLM(nn.Module):
    config = SimpleNamespace(image_token_id=IMAGE)

    def __init__(self):
        super().__init__()
        self.language_model = LlamaModel(
            LlamaConfig(
                vocab_size=97,
                hidden_size=WIDTH,
                intermediate_size=48,
                num_hidden_layers=6,
                num_attention_heads=4,
                num_key_value_heads=2,
            )
        )
        self.tower = nn.Conv2d(3, WIDTH, kernel_size=8, stride=8)

    def get_input_embeddings(self):
        return self.language_model.embed_tokens

    def forward(self, input_ids, attention_mask, pixel_values):
        embeds = self.get_input_embeddings()(input_ids)
        patches = self.tower(pixel_values).flatten(2).transpose(1, 2).reshape(-1, WIDTH)
        embeds = embeds.masked_scatter((input_ids == IMAGE)[..., None], patches)
        return self.language_model(inputs_embeds=embeds, attention_mask=attention_mask)


class Backbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = VLM()

    def forward(self, inputs):
        seen = []
        last = self.model.language_model.layers[-1]
        hook = last.register_forward_hook(lambda module, args, output: seen.append(output))
        self.model(**inputs)
        hook.remove()
        return {
            "backbone_features": seen[0][0] if isinstance(seen[0], tuple) else seen[0],
            "backbone_attention_mask": inputs["attention_mask"] == 1,
            "image_mask": inputs["input_ids"] == IMAGE,
        }


class GR00TN17(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone, self.action_head = Backbone(), Head()


class GrootPolicy(nn.Module):
    def __init__(self):
        super().__init__()
        self._groot_model = GR00TN17()

    def reset(self):
        pass

    @torch.no_grad()
    def predict_action_chunk(self, batch):
        batch = dict(batch)
        state, noise = batch.pop("state"), batch.pop("noise")
        model = self._groot_model
        return model.action_head.get_action(model.backbone(batch), state, noise)


def observation(seed):
    """Two cameras; the second row has a shorter instruction, padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    picture = [91, *[IMAGE] * PATCHES, 92]
    rows = [[5, 6, *picture * 2, 7, 8, 9, 10], [0, 0, 5, 6, *picture * 2, 7, 8]]
    mask = torch.ones(2, len(rows[0]), dtype=torch.int64)
    mask[1, :2] = 0
    return {
        "input_ids": torch.tensor(rows),
        "attention_mask": mask,
        "pixel_values": torch.rand(4, 3, 32, 32, generator=generator),
        "state": torch.randn(2, ACTION, generator=generator),
        "noise": torch.randn(2, HORIZON, ACTION, generator=torch.Generator().manual_seed(5)),
    }
