"""Observations to model inputs and back: images, prompt, scaling, with checks that explain.

Images are resized without distortion, padded with black and scaled to [-1, 1], as openpi's client
does. What a dataset does beyond that (joint actions relative to the state, flipped grippers)
belongs to the robot and is left to the caller.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..given.checks import check_instruction, check_keys, check_state, numbers
from ..given.images import check_image, check_nesting, is_one_image
from .config import Pi0Config

OBSERVATION_KEYS = ("images", "instruction", "proprio")
_STATE_BINS = 256
_FARTHEST = 1e30  # actions are fp32
_RESAMPLE = {"bilinear": Image.Resampling.BILINEAR, "lanczos": Image.Resampling.LANCZOS}


@dataclass(frozen=True, eq=False)
class Inputs:
    """What a policy reads.

    `images` fp32 [B, cameras, 3, H, W] in [-1, 1]; `image_mask` [B, cameras] bool, False for a
    missing camera; `tokens` [B, T] int64 and `token_mask` [B, T] bool; `state` fp32
    [B, max_state_dim], scaled and padded with zeros.
    """

    images: Tensor
    image_mask: Tensor
    tokens: Tensor
    token_mask: Tensor
    state: Tensor

    def to(self, device: torch.device) -> Inputs:
        """The same on another device."""
        return Inputs(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


def prepare(observations: Sequence[Mapping[str, Any]], config: Pi0Config, tokenizer: Any) -> Inputs:
    """Inputs of observations, see `Pi0.predict_actions`.

    Errors: TypeError and ValueError that name the entry.
    """
    if not len(observations):
        raise ValueError("no observation given; expected a list with at least one")
    if tokenizer is None:
        raise ValueError(
            "this model has no tokenizer; give `tokenizer=` to from_pretrained (published policies "
            "use that of google/paligemma-3b-pt-224), or set `model.tokenizer`"
        )
    images, seen, states, instructions = [], [], [], []
    for observation in observations:
        check_keys(observation, OBSERVATION_KEYS)
        views = check_images(observation["images"], config.cameras)
        images.append([prepare_image(view, config) for view in views])
        seen.append([view is not None for view in views])
        state = check_proprio(observation.get("proprio"), config)
        states.append(scale(config, "state").normalise(state))
        instructions.append(check_instruction(observation["instruction"]))
    padded = np.zeros((len(states), config.max_state_dim))
    padded[:, : config.proprio_dim] = states
    if not (np.abs(padded) < np.finfo(np.float32).max).all():
        raise ValueError("proprio is too large to be scaled by the policy's statistics")
    prompts = [prompt(text, row, config) for text, row in zip(instructions, padded, strict=True)]
    tokens, mask = tokenize(prompts, tokenizer, config.max_tokens)
    if int(tokens.max()) >= config.vocab_size:
        raise ValueError(
            f"the tokenizer gives ids up to {int(tokens.max())}; this policy knows "
            f"{config.vocab_size} words: it is another model's tokenizer"
        )
    pixels = torch.from_numpy(np.stack(images)).permute(0, 1, 4, 2, 3).float() / 127.5 - 1
    return Inputs(
        images=pixels,
        image_mask=torch.tensor(seen, dtype=torch.bool),
        tokens=tokens,
        token_mask=mask,
        state=torch.from_numpy(padded).float(),
    )


# ---------------------------------------------------------------------- images
def check_images(images: Any, cameras: tuple[str, ...]) -> list[np.ndarray | None]:
    """One uint8 array [H, W, 3] per camera, None where it is missing.

    Errors: TypeError for another type or dtype, ValueError for unknown cameras, another number of
    them, another shape, or no image at all.
    """
    if is_one_image(images):
        images = [images]
    if isinstance(images, Mapping):
        unknown = sorted(str(name) for name in set(images) - set(cameras))
        if unknown:
            raise ValueError(
                f"this policy has no camera {', '.join(unknown)}; it has {', '.join(cameras)}"
            )
        images = [images.get(camera) for camera in cameras]
    if not isinstance(images, list | tuple | np.ndarray | Tensor):
        raise TypeError(
            f"images must be a list with one image per camera, or a dict by camera name; got "
            f"{type(images).__name__}"
        )
    check_nesting(images)
    if len(images) != len(cameras):
        raise ValueError(
            f"this policy sees {len(cameras)} camera(s) ({', '.join(cameras)}), got {len(images)} "
            "image(s); give one per camera, and None for one that is missing"
        )
    if all(image is None for image in images):
        raise ValueError("every camera is missing; give at least one image")
    return [
        None if image is None else check_image(image, camera)
        for image, camera in zip(images, cameras, strict=True)
    ]


def prepare_image(image: np.ndarray | None, config: Pi0Config) -> np.ndarray:
    """uint8 [size, size, 3]: the middle of an image, resized and padded; black if it is missing."""
    size = config.image_size
    canvas = np.zeros((size, size, 3), dtype=np.uint8)
    if image is None:
        return canvas
    height, width = image.shape[:2]
    margin = (1 - config.crop_area**0.5) / 2
    box = (margin * width, margin * height, (1 - margin) * width, (1 - margin) * height)
    ratio = max(height, width) / size
    new = (max(int(width / ratio), 1), max(int(height / ratio), 1))
    filter_ = _RESAMPLE[config.resample]
    if (width, height) == new and config.crop_area == 1:
        resized = image
    else:
        resized = np.asarray(Image.fromarray(image).resize(new, filter_, box=box))
    top, left = (size - new[1]) // 2, (size - new[0]) // 2
    canvas[top : top + new[1], left : left + new[0]] = resized
    return canvas


# ---------------------------------------------------------------------- prompt
def prompt(instruction: str, state: np.ndarray, config: Pi0Config) -> str:
    """What the language model reads; `state` [max_state_dim] is scaled and padded."""
    text = instruction.strip().replace("_", " ").replace("\n", " ")
    if config.kind == "pi0":
        return f"{text}\n"
    shown = state if config.pad_state else state[: config.proprio_dim]
    edges = np.linspace(-1, 1, _STATE_BINS + 1)[:-1]
    bins = " ".join(str(i) for i in np.digitize(shown, edges) - 1)
    return f"Task: {text}, State: {bins};\nAction: "


def tokenize(
    prompts: Sequence[str], tokenizer: Any, max_tokens: int | None
) -> tuple[Tensor, Tensor]:
    """Token ids [B, T] padded on the right with 0, and which are real."""
    rows = [list(tokenizer(text)["input_ids"])[:max_tokens] for text in prompts]
    length = max_tokens or max(map(len, rows))
    padded = [ids + [0] * (length - len(ids)) for ids in rows]
    tokens = torch.tensor(padded, dtype=torch.int64)
    lengths = torch.tensor([len(ids) for ids in rows], dtype=torch.int64)
    return tokens, torch.arange(length) < lengths[:, None]


# ---------------------------------------------------------------------- other entries
def check_proprio(proprio: Any, config: Pi0Config) -> np.ndarray:
    """Robot state fp64 [proprio_dim]. Errors: TypeError, ValueError."""
    return check_state(proprio, config.proprio_dim)


def check_noise(noise: Any, shape: tuple[int, ...]) -> None:
    """Refuse what is no noise to start from. Errors: TypeError, ValueError."""
    if not isinstance(noise, Tensor) or not noise.is_floating_point():
        raise TypeError(f"noise must be a floating-point tensor, got {type(noise).__name__}")
    if noise.shape != shape:
        raise ValueError(f"noise has shape {tuple(noise.shape)}; expected {shape}")
    # Elsewhere this would wait for the device; the actions are looked at anyway.
    if noise.device.type == "cpu" and not bool(torch.isfinite(noise).all()):
        raise ValueError("noise is not finite")


# ---------------------------------------------------------------------- scaling
@dataclass(frozen=True)
class Scale:
    """Robot units are `offset + span * scaled`, entry by entry; arrays [dim]."""

    offset: np.ndarray
    span: np.ndarray

    def normalise(self, values: np.ndarray) -> np.ndarray:
        """Robot units to the policy's."""
        return (values - self.offset) / self.span

    def unnormalise(self, values: np.ndarray) -> np.ndarray:
        """The policy's units to the robot's."""
        return values * self.span + self.offset


def scale(config: Pi0Config, what: str) -> Scale:
    """Scale of "action" or "state".

    Errors: ValueError when statistics are missing or of another size.
    """
    size = config.action_dim if what == "action" else config.proprio_dim
    kind = config.action_scaling if what == "action" else config.state_scaling
    if kind == "identity":
        return Scale(np.zeros(size), np.ones(size))
    names = {"quantiles": ("q01", "q99"), "mean-std": ("mean", "std"), "min-max": ("min", "max")}
    entry = config.norm_stats.get(what) or {}
    if not isinstance(entry, Mapping):
        raise ValueError(f"the {what} statistics must be numbers by name, got {entry!r:.80}")
    absent = [name for name in names[kind] if name not in entry]
    if absent:
        raise ValueError(
            f"this policy has no {'/'.join(absent)} of the {what}, which its scaling {kind!r} "
            f"needs; give `norm_stats={{{what!r}: {{...}}, ...}}` to from_pretrained (base models "
            f'are published without), or `{what}_scaling="identity"`'
        )
    first, second = (
        numbers(f"{name} of the {what} statistics", entry[name]) for name in names[kind]
    )
    if first.shape != (size,) or second.shape != (size,):
        raise ValueError(
            f"the {what} statistics have {first.shape} and {second.shape} entries; this policy has "
            f"{size} dimensions"
        )
    if not (np.abs([first, second]) < _FARTHEST).all():
        raise ValueError(f"the {what} statistics must lie below {_FARTHEST:g}")
    if kind == "mean-std":
        if (second + config.epsilon <= 0).any():
            raise ValueError(f"std of the {what} statistics must be above 0: {second.tolist()}")
        return Scale(first, second + config.epsilon)
    if (second - first + config.epsilon <= 0).any():
        low, high = names[kind]
        where = np.flatnonzero(second - first + config.epsilon <= 0).tolist()
        raise ValueError(f"{low} of the {what} statistics is not below {high} in {where}")
    half = (second - first + config.epsilon) / 2
    return Scale(first + half, half)
