"""OpenVLA on current transformers: fused vision backbone, projector, Llama, published names.

Sequence that the language model reads, one row per batch entry, padded on the left:
`[pad ...] BOS | visual tokens of every camera | rest of the prompt`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ..port import Port, check_attention, refuse_broken
from . import processing
from .config import PUBLISHED, OpenVLAConfig
from .processing import Inputs
from .vision import LayerScale, Projector, VisionBackbone, VisionTower

if TYPE_CHECKING:
    from contextlib import ExitStack
    from pathlib import Path
    from typing import Self

    from ..capture import Capture


class OpenVLA(Port):
    """Vision-language-action policy that writes an action as seven tokens (arXiv:2406.09246).

    `attn_implementation` ("sdpa" or "eager") is the language model's attention. Weights are random
    until loaded. `tokenizer` (a `PreTrainedTokenizerFast`) is needed by `predict_action` alone.
    Errors: ValueError for an unknown attention implementation.
    """

    config_class: ClassVar[type[OpenVLAConfig]] = OpenVLAConfig

    def __init__(self, config: OpenVLAConfig, *, attn_implementation: str = "sdpa") -> None:
        super().__init__()
        check_attention(attn_implementation)
        text = LlamaConfig(**config.text)
        text._attn_implementation = attn_implementation
        if type(config) is not self.config_class:
            raise TypeError(
                f"{type(self).__name__} is built from a {self.config_class.__name__}, got a "
                f"{type(config).__name__}"
            )
        self.config = config
        self.tokenizer: Any = None
        self.vision_backbone = VisionBackbone(config.towers)
        self.projector = Projector(self.vision_backbone.embed_dim, text.hidden_size)
        self.language_model = LlamaForCausalLM(text)
        self._build_heads(text.hidden_size)
        self.reset_parameters()

    def _build_heads(self, hidden_size: int) -> None:
        """Modules beyond vision, projector and language model: none here."""

    @property
    def device(self) -> torch.device:
        return self.projector.fc1.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.projector.fc1.weight.dtype

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fresh random weights in place, in the dtype and on the device the module has."""
        initialise(self, std=self.language_model.config.initializer_range)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or cast; rotary frequencies are computed afresh and stay fp32, ties are made again.

        They are no parameters: `to_empty` would leave them undefined, `.to(bfloat16)` would round
        them and shift every position.
        """
        super()._apply(fn, recurse)
        rotary = self.language_model.model.rotary_emb
        with torch.device("cpu"):
            fresh = LlamaRotaryEmbedding(self.language_model.config)
        for name, buffer in fresh.named_buffers():
            setattr(rotary, name, buffer.to(rotary.inv_freq.device))
        self.language_model.tie_weights()
        return self

    # ------------------------------------------------------------------ sequence
    def embed(
        self, input_ids: Tensor, pixel_values: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Decoder input [B, V + P, D] of prompts `input_ids` [B, P] and images [B, 6 n, H, W].

        `attention_mask` [B, P] is 0 on left padding; None says there is none.
        """
        embeds = self.language_model.get_input_embeddings()(input_ids)
        return insert_after_bos(embeds, self.visual_embeds(pixel_values), attention_mask)

    def visual_embeds(self, pixel_values: Tensor) -> Tensor:
        """Projected visual tokens [B, V, D] of images [B, 6 n, H, W]."""
        return self.projector(self.vision_backbone(pixel_values.to(self.dtype)))

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the language model over prompt and image, with its own keyword arguments and output.

        The logits have one row per sequence position, visual tokens included: [B, V + P, vocab].
        """
        embeds = self.embed(input_ids, pixel_values, attention_mask)
        visual = embeds.shape[1] - input_ids.shape[1]
        return self.language_model(
            inputs_embeds=embeds,
            **sequence_arguments(widen_mask(attention_mask, visual)),
            **kwargs,
        )

    def training_logits(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        *,
        last: int = 0,
    ) -> Tensor:
        """Teacher forcing: logits [B, P, vocab], row i predicts `input_ids[:, i + 1]`.

        `last` > 0 computes the last `last` rows alone. Prompts shorter than the longest one are
        padded on the left and marked 0 in `attention_mask` [B, P].
        """
        rows = last or input_ids.shape[1]
        return self(
            input_ids, pixel_values, attention_mask, use_cache=False, logits_to_keep=rows
        ).logits

    # ------------------------------------------------------------------ acting
    @torch.no_grad()
    def predict_tokens(
        self, input_ids: Tensor, pixel_values: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Greedy action tokens [B, action_dim]: one prefill, then `action_dim - 1` single steps.

        The last token is never fed back. The cache is made here and the whole prompt goes through
        it, so the image is always seen. A token whose logits have no finite maximum is -1.
        """
        cache = DynamicCache(config=self.language_model.config)
        output = self(
            input_ids,
            pixel_values,
            attention_mask,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        mask = widen_mask(attention_mask, sum(self.config.views))
        tokens = [greedy(output.logits[:, -1])]
        while len(tokens) < self.config.action_dim:
            mask = None if mask is None else torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            arguments = sequence_arguments(mask)
            if mask is not None:
                arguments["position_ids"] = arguments["position_ids"][:, -1:]
            output = self.language_model(
                input_ids=tokens[-1].clamp_min(0),
                past_key_values=cache,
                use_cache=True,
                **arguments,
            )
            tokens.append(greedy(output.logits[:, -1]))
        return torch.cat(tokens, dim=1)

    def infer(self, inputs: Inputs) -> np.ndarray:
        """Normalised actions of prepared inputs, fp64 [B, action_dim]."""
        made = self.predict_tokens(inputs.input_ids, inputs.pixel_values, inputs.attention_mask)
        tokens = made.cpu().numpy()
        refuse_broken(tokens < 0, "logits")
        return self.decode_actions(tokens)

    def predict_action(
        self,
        images: Any,
        instruction: str,
        proprio: Any = None,
        *,
        unnorm_key: str | None = None,
        center_crop: bool | None = None,
    ) -> np.ndarray:
        """Action in robot units, float32 [action_dim]; a chunk [chunk, action_dim] for OpenVLA-OFT.

        Args:
            images: uint8 [H, W, 3] or PIL image, or a list with one per camera.
            instruction: what to do, such as "pick up the can".
            proprio: robot state [proprio_dim] in robot units, for policies that read one.
            unnorm_key: dataset whose statistics scale the action; needed if there are several.
            center_crop: overrides the configuration's (see `processing`).

        Errors: TypeError and ValueError that say which argument is wrong and what is expected;
        NonFiniteActionError when the policy works out no numbers.
        """
        observation = {"images": images, "instruction": instruction, "proprio": proprio}
        (action,) = self.predict_actions(
            [observation], unnorm_key=unnorm_key, center_crop=center_crop
        )
        return action

    def predict_actions(
        self,
        observations: Sequence[Mapping[str, Any]],
        *,
        unnorm_key: str | None = None,
        center_crop: bool | None = None,
    ) -> np.ndarray:
        """Actions of several observations in one pass, float32 [B, ...] as `predict_action`.

        An observation is a dict with `images`, `instruction` and, where needed, `proprio` and its
        own `unnorm_key`. Prompts of different lengths are padded on the left. Errors as
        `predict_action`.
        """
        rows = self._checked(observations, unnorm_key)
        scales = [processing.bounds(self.config, row["unnorm_key"], "action") for row in rows]
        actions = self.infer(self._inputs(rows, center_crop))
        scaled = [scale.unnormalise(action) for scale, action in zip(scales, actions, strict=True)]
        made = np.stack(scaled).astype(np.float32)
        refuse_broken(~np.isfinite(made), "actions")
        return made

    def prepare(
        self,
        observations: Sequence[Mapping[str, Any]],
        *,
        unnorm_key: str | None = None,
        center_crop: bool | None = None,
    ) -> Inputs:
        """Model inputs of a list of observations, on the model's device; as `predict_actions`."""
        return self._inputs(self._checked(observations, unnorm_key), center_crop)

    def _checked(
        self, observations: Sequence[Mapping[str, Any]], unnorm_key: str | None
    ) -> list[dict[str, Any]]:
        """Checked copies of the observations, each with the statistics key it uses."""
        if not len(observations):
            raise ValueError("no observation given; expected a list with at least one")
        rows = [processing.check_observation(o, self.config) for o in observations]
        for row in rows:
            row["unnorm_key"] = row["unnorm_key"] or unnorm_key
        return rows

    def _inputs(self, rows: list[dict[str, Any]], center_crop: bool | None) -> Inputs:
        """Inputs of checked observations."""
        if self.tokenizer is None:
            raise ValueError(
                "this model has no tokenizer; load a checkpoint with from_pretrained or set "
                "`model.tokenizer`"
            )
        config = self.config
        crop = config.center_crop if center_crop is None else center_crop
        images = np.stack(
            [
                [
                    processing.prepare_image(
                        image, config.image_size, center_crop=crop, crop_first=config.crop_first
                    )
                    for image in row["images"]
                ]
                for row in rows
            ]
        )  # [B, cameras, H, W, 3]
        instructions = [row["instruction"] for row in rows]
        input_ids, mask = processing.tokenize(instructions, self.tokenizer, config)
        self._check_length(input_ids.shape[1])
        device = self.device
        pixels = processing.normalise_pixels(torch.from_numpy(images).to(device), config)
        return Inputs(
            input_ids=input_ids.to(device),
            pixel_values=pixels.to(self.dtype),
            attention_mask=None if mask is None else mask.to(device),
            proprio=self._proprio(rows),
        )

    def _check_length(self, prompt: int) -> None:
        """Refuse a prompt that the decoder has no positions for; attention to it is quadratic."""
        config = self.config
        behind = getattr(config, "slots", config.action_dim) + 2  # robot state, stop token
        room = self.language_model.config.max_position_embeddings - sum(config.views) - behind
        if prompt > room:
            raise ValueError(
                f"the prompt has {prompt} tokens; beside its images this policy reads at most "
                f"{room}: give a shorter instruction"
            )

    def _proprio(self, rows: list[dict[str, Any]]) -> Tensor | None:
        """Normalised robot states [B, proprio_dim] of checked observations, None without one."""
        if rows[0]["proprio"] is None:
            return None
        states = [
            processing.bounds(self.config, row["unnorm_key"], "proprio").normalise(row["proprio"])
            for row in rows
        ]
        return torch.from_numpy(np.stack(states)).to(self.device, self.dtype)

    @property
    def bin_centers(self) -> np.ndarray:
        """Normalised action value of each bin, [n_action_bins - 1] in (-1, 1)."""
        edges = np.linspace(-1.0, 1.0, self.config.n_action_bins)
        return (edges[:-1] + edges[1:]) / 2.0

    def encode_actions(self, actions: np.ndarray) -> np.ndarray:
        """Normalised actions [..., dim] in [-1, 1] to action token ids of the same shape."""
        edges = np.linspace(-1.0, 1.0, self.config.n_action_bins)
        bins = np.digitize(np.clip(actions, -1.0, 1.0), edges)  # 1 .. n_action_bins
        return self.config.action_vocab_end - bins

    def decode_actions(self, tokens: np.ndarray) -> np.ndarray:
        """Action token ids to normalised actions; any other token is clamped to the nearest bin."""
        bins = self.config.action_vocab_end - np.asarray(tokens) - 1
        return self.bin_centers[np.clip(bins, 0, self.config.n_action_bins - 2)]

    def _attach(self, capture: Capture, undo: ExitStack) -> None:
        from .captured import attach_openvla

        attach_openvla(self, capture, undo)

    # ------------------------------------------------------------------ building
    @classmethod
    def from_config(
        cls,
        name: str,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        text_layers: int | None = None,
        attn_implementation: str = "sdpa",
    ) -> OpenVLA:
        """A published model ("openvla-7b", "openvla-oft-7b") with random weights, for benchmarks.

        `text_layers` builds fewer decoder layers. Errors: ValueError for an unknown name.
        """
        if name not in PUBLISHED:
            raise ValueError(f"unknown model {name!r}; choose one of {', '.join(PUBLISHED)}")
        config = PUBLISHED[name]
        if text_layers is not None:
            config = config.with_text(num_hidden_layers=text_layers)
        kinds: list[type[OpenVLA]] = [OpenVLA, *OpenVLA.__subclasses__()]
        kind = next(kind for kind in kinds if kind.config_class is type(config))
        return kind.build(
            config, device=device, dtype=dtype, attn_implementation=attn_implementation
        )

    def export(
        self,
        folder: str | Path,
        tokenizer: Any = None,
        norm_stats: Mapping[str, Any] | None = None,
        *,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        """Write a policy folder in the published layout (see `checkpoint.save_pretrained`).

        `tokenizer` and `norm_stats` become the model's own first, when given.
        """
        from .checkpoint import save_pretrained

        if tokenizer is not None:
            self.tokenizer = tokenizer
        if norm_stats is not None:
            self.config = replace(self.config, norm_stats=dict(norm_stats))
        save_pretrained(self, folder, dtype=dtype)


def greedy(logits: Tensor) -> Tensor:
    """The likeliest token of each row [B, 1]; -1 where NaN or infinity stands above all others."""
    highest, token = logits.max(dim=-1, keepdim=True)
    return torch.where(torch.isfinite(highest), token, -1)


def initialise(model: nn.Module, *, std: float) -> None:
    """Random weights in place: Llama with `std`, other linear layers with 1 / sqrt(fan in)."""
    for name, module in model.named_modules():
        text = name.startswith("language_model")
        if isinstance(module, nn.Linear | nn.Conv2d):
            fan_in = module.weight[0].numel()
            module.weight.normal_(0.0, std if text else fan_in**-0.5)
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, nn.Embedding):
            module.weight.normal_(0.0, std)
        elif isinstance(module, LayerScale):
            module.scale_factor.fill_(module.value)
        elif isinstance(module, VisionTower):
            for token in ("cls_token", "reg_token", "pos_embed"):
                if hasattr(module, token):
                    getattr(module, token).normal_(0.0, 0.02)
        elif "Norm" in type(module).__name__:
            module.weight.fill_(1.0)
            if getattr(module, "bias", None) is not None:
                module.bias.zero_()


def insert_after_bos(
    embeds: Tensor, visual: Tensor, attention_mask: Tensor | None = None
) -> Tensor:
    """Put `visual` [B, V, D] behind the first real token of `embeds` [B, P, D]: [B, V + P, D]."""
    visual = visual.to(embeds.dtype)
    if attention_mask is None:
        return torch.cat([embeds[:, :1], visual, embeds[:, 1:]], dim=1)
    prompt, inserted = embeds.shape[1], visual.shape[1]
    bos = left_padding(attention_mask)[:, None]  # [B, 1] position of BOS
    position = torch.arange(prompt + inserted, device=embeds.device)[None]
    source = torch.where(position > bos, position - inserted, position)
    is_visual = (position > bos) & (position <= bos + inserted)
    source = torch.where(is_visual, prompt + position - bos - 1, source)
    index = source[..., None].expand(-1, -1, embeds.shape[2])
    return torch.cat([embeds, visual], dim=1).gather(1, index)


def left_padding(attention_mask: Tensor) -> Tensor:
    """Number of padded positions before each prompt, [B]."""
    return attention_mask.shape[1] - attention_mask.long().sum(1)


def widen_mask(attention_mask: Tensor | None, inserted: int) -> Tensor | None:
    """Mask [B, P] to [B, inserted + P]: what is inserted counts as real, padding stays left."""
    if attention_mask is None:
        return None
    new = attention_mask.new_ones(attention_mask.shape[0], inserted)
    return torch.cat([attention_mask, new], dim=1)


def sequence_arguments(mask: Tensor | None) -> dict[str, Tensor]:
    """What the decoder needs for a padded batch: mask [B, S] and positions counted from BOS."""
    if mask is None:
        return {}
    positions = (mask.long().cumsum(1) - 1).clamp_min(0)
    return {"attention_mask": mask, "position_ids": positions}
