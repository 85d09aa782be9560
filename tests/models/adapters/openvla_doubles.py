"""Minimal doubles of the OpenVLA classes of their authors.

They have the names, the structure and the calls that the adapter relies on, the early return for
one-token inputs and the trimming by any cache that make the image vanish on newer transformers.
Vision, tokens and heads are tiny.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

BOS, EMPTY, STOP = 1, 80, 2
TEXT = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=5,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
)


class PrismaticConfig(PreTrainedConfig):
    model_type = "prismatic-double"
    sub_configs = {"text_config": LlamaConfig}  # noqa: RUF012 - as transformers declares it

    def __init__(self, text_config=None, **kwargs):
        self.text_config = text_config or LlamaConfig(**TEXT)
        super().__init__(**kwargs)


class Backbone(nn.Module):
    """16 patches of each 32 x 32 image; images lie behind each other in the channels."""

    def __init__(self, images=1):
        super().__init__()
        self.images = images
        self.patch = nn.Conv2d(3, 24, kernel_size=8, stride=8)

    def forward(self, pixels):
        views = pixels.unflatten(1, (self.images, 3))
        patches = self.patch(views.flatten(0, 1)).flatten(2).transpose(1, 2)
        return patches.reshape(len(pixels), -1, 24)


class PrismaticForConditionalGeneration(PreTrainedModel, GenerationMixin):
    config_class = PrismaticConfig
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.vision_backbone = Backbone()
        self.projector = nn.Linear(24, 32)
        self.language_model = LlamaForCausalLM(config.text_config)
        self.post_init()

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        pixel_values=None,
        past_key_values=None,
        use_cache=None,
        **unused,
    ):
        if input_ids.shape[1] == 1:
            assert past_key_values is not None
            return self.language_model(
                input_ids=input_ids, past_key_values=past_key_values, use_cache=use_cache
            )
        assert past_key_values is None
        if pixel_values is None:
            return self.language_model(input_ids=input_ids, attention_mask=attention_mask)
        patches = self.projector(self.vision_backbone(pixel_values))
        words = self.get_input_embeddings()(input_ids)
        sequence = torch.cat([words[:, :1], patches, words[:, 1:]], dim=1)
        if attention_mask is not None:
            seen = attention_mask.new_ones(patches.shape[:2])
            attention_mask = torch.cat([attention_mask[:, :1], seen, attention_mask[:, 1:]], dim=1)
        output = self.language_model(
            inputs_embeds=sequence, attention_mask=attention_mask, use_cache=use_cache
        )
        return CausalLMOutputWithPast(logits=output.logits, past_key_values=output.past_key_values)

    def prepare_inputs_for_generation(
        self, input_ids=None, past_key_values=None, pixel_values=None, attention_mask=None, **kwargs
    ):
        if past_key_values is not None:
            input_ids = input_ids[:, -1:]
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "pixel_values": pixel_values,
            "past_key_values": past_key_values,
            "use_cache": kwargs.get("use_cache"),
        }


class OpenVLAForActionPrediction(PrismaticForConditionalGeneration):
    def predict_action(self, input_ids, **kwargs):
        """Seven action tokens [7]."""
        if not torch.all(input_ids[:, -1] == EMPTY):
            input_ids = torch.cat([input_ids, torch.full((1, 1), EMPTY)], dim=1)
        written = self.generate(
            input_ids, max_new_tokens=7, min_new_tokens=7, do_sample=False, **kwargs
        )
        return written[0, -7:]


class BidirectionalLlama(LlamaModel):
    """What OFT's fork of transformers makes of LlamaModel: everything sees everything."""

    def forward(self, *, inputs_embeds, attention_mask, **kwargs):
        length = inputs_embeds.shape[1]
        seen = attention_mask[:, None, None].bool().expand(-1, 1, length, -1)
        kwargs["use_cache"] = False
        return super().forward(inputs_embeds=inputs_embeds, attention_mask=seen, **kwargs)


SLOTS = 6  # 3 actions of 2 numbers


class OpenVLAForActionPredictionOFT(PrismaticForConditionalGeneration):
    """OFT's class, which has the same name as OpenVLA's in its own repository."""

    def __init__(self, config, images=1):
        super().__init__(config)
        self.vision_backbone = Backbone(images)
        self.vision_backbone.get_num_images_in_input = lambda: images
        self.language_model.model = BidirectionalLlama(config.text_config)

    def _prepare_input_for_action_prediction(self, input_ids, attention_mask):
        slots = torch.full((len(input_ids), SLOTS), 3)
        stop = torch.full((len(input_ids), 1), STOP)
        input_ids = torch.cat([input_ids, slots, stop], dim=1)
        more = attention_mask.new_ones(len(input_ids), SLOTS + 1)
        return input_ids, torch.cat([attention_mask, more], dim=1)

    def predict_action(
        self,
        input_ids,
        proprio=None,
        proprio_projector=None,
        action_head=None,
        noisy_action_projector=None,
        **kwargs,
    ):
        """Actions [3, 2] and the hidden states that the head read."""
        prompt = input_ids.shape[1] - 1
        input_ids, mask = self._prepare_input_for_action_prediction(
            input_ids, kwargs["attention_mask"]
        )
        words = self.get_input_embeddings()(input_ids)
        patches = self.projector(self.vision_backbone(kwargs["pixel_values"]))
        if proprio is not None:
            patches = torch.cat([patches, proprio_projector(proprio)[:, None]], dim=1)
        chunk = torch.zeros(1, SLOTS)
        steps = action_head.timesteps if noisy_action_projector is not None else (None,)
        for step in steps:
            visual, sequence = patches, words.clone()
            slots = torch.zeros(1, SLOTS, 32)
            if step is not None:
                visual = torch.cat([patches, torch.full((1, 1, 32), float(step))], dim=1)
                slots = noisy_action_projector(chunk[..., None])
            sequence[:, -(SLOTS + 1) : -1] = slots
            sequence = torch.cat([sequence[:, :1], visual, sequence[:, 1:]], dim=1)
            more = mask.new_ones(1, visual.shape[1])
            hidden = self.language_model(
                inputs_embeds=sequence,
                attention_mask=torch.cat([mask[:, :1], more, mask[:, 1:]], dim=1),
                output_hidden_states=True,
            ).hidden_states[-1]
            start = visual.shape[1] + prompt
            read = hidden[:, start : start + SLOTS]
            chunk = chunk + action_head.net(read)[..., 0]
        return chunk.view(3, 2), read


def head(steps=()):
    """An action head with its projectors."""
    return SimpleNamespace(
        net=nn.Linear(32, 1),
        timesteps=steps,
        proprio=nn.Linear(4, 32),
        noisy=nn.Linear(1, 32) if steps else None,
    )
