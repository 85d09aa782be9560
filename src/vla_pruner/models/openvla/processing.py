"""Observations to model inputs and back: images, prompt, normalisation, with checks that explain.

Images follow the original evaluation: resize to the policy's side with a Lanczos filter, then, for
policies fine-tuned on random crops, cut out the middle 90 % of the area and stretch it back with
bilinear sampling on the pixel grid of `tf.image.crop_and_resize`. Success rates depend on it: the
policy has seen nothing but such crops. A policy trained on crops of the camera's own image says
`crop_first` in its configuration and gets one Lanczos resize of the cut-out instead.
The original evaluation also passes camera images through JPEG (quality 95) before the first
resize, as its training data was stored; that is left to whoever reads the camera.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..given.checks import check_instruction, check_keys, check_state, flags, listed, numbers
from ..given.images import check_image, check_nesting, is_one_image
from .config import OpenVLAConfig, OpenVLAOFTConfig, TowerConfig

PROMPT = "In: What action should the robot take to {instruction}?\nOut:"
CROP_AREA = 0.9
_FARTHEST = 1e30  # actions are fp32
OBSERVATION_KEYS = ("images", "instruction", "proprio", "unnorm_key")


@dataclass(frozen=True)
class Inputs:
    """What a policy reads.

    `input_ids` [B, P] and `attention_mask` [B, P] (None: nothing is padded), `pixel_values`
    [B, 6 * cameras, H, W], `proprio` [B, proprio_dim] normalised, or None.
    """

    input_ids: Tensor
    pixel_values: Tensor
    attention_mask: Tensor | None = None
    proprio: Tensor | None = None


# ---------------------------------------------------------------------- images
def check_images(images: Any, cameras: int) -> list[np.ndarray]:
    """One uint8 array [H, W, 3] per camera, from arrays or PIL images.

    Errors: TypeError for another type or dtype, ValueError for another shape or camera count.
    """
    if is_one_image(images):
        images = [images]
    if not isinstance(images, list | tuple | np.ndarray | Tensor):
        raise TypeError(
            f"images must be a uint8 array [H, W, 3], a PIL image or a list of them, one per "
            f"camera; got {type(images).__name__}"
        )
    check_nesting(images)
    if len(images) != cameras:
        raise ValueError(
            f"this policy sees {cameras} camera(s), got {len(images)} image(s); give one image per "
            "camera, the third-person view first"
        )
    return [check_image(image, index) for index, image in enumerate(images)]


def prepare_image(
    image: np.ndarray, size: int, *, center_crop: bool, crop_first: bool = False
) -> np.ndarray:
    """uint8 [H, W, 3] to uint8 [size, size, 3] as the policy saw it in training (see above)."""
    height, width = image.shape[:2]
    if center_crop and crop_first:
        margin = (1 - CROP_AREA**0.5) / 2
        box = (margin * width, margin * height, (1 - margin) * width, (1 - margin) * height)
        return np.asarray(_lanczos(image, size, box))
    if (height, width) != (size, size):
        image = np.asarray(_lanczos(image, size))
    return crop_and_stretch(image, CROP_AREA) if center_crop else image


def _lanczos(
    image: np.ndarray, size: int, box: tuple[float, float, float, float] | None = None
) -> Image.Image:
    return Image.fromarray(image).resize((size, size), Image.Resampling.LANCZOS, box=box)


def crop_and_stretch(image: np.ndarray, area: float) -> np.ndarray:
    """Middle `area` of a uint8 image [H, W, 3], stretched back to [H, W, 3] bilinearly.

    Sample points run from edge pixel to edge pixel of the cut-out, values are rounded as
    `tf.image.convert_image_dtype` rounds: the arithmetic of the original evaluation.
    """
    side = np.sqrt(np.float32(area))
    x = image.astype(np.float32) * np.float32(1 / 255)
    x = _stretch(x, side, axis=1)
    x = _stretch(x, side, axis=0)
    return (np.clip(x, 0, 1) * np.float32(255.5)).astype(np.uint8)


def _stretch(x: np.ndarray, side: np.float32, axis: int) -> np.ndarray:
    """Sample the middle `side` of one axis at as many points as it has pixels."""
    last = np.float32(x.shape[axis] - 1)
    start = (1 - side) / 2
    step = side * last / max(last, np.float32(1))
    points = np.clip(start * last + np.arange(x.shape[axis], dtype=np.float32) * step, 0, last)
    below = np.floor(points).astype(int)
    above = np.ceil(points).astype(int)
    weight = (points - below).astype(np.float32)
    weight = weight.reshape([-1 if i == axis else 1 for i in range(x.ndim)])
    low, high = x.take(below, axis), x.take(above, axis)
    return low + (high - low) * weight


def normalise_pixels(images: Tensor, config: OpenVLAConfig) -> Tensor:
    """uint8 [B, cameras, H, W, 3] to fp32 [B, 6 * cameras, H, W], colours as each tower wants."""
    x = images.permute(0, 1, 4, 2, 3)
    x = x.to(torch.float32, memory_format=torch.contiguous_format) / 255
    batch, cameras, channels, height, width = x.shape
    towers = len(config.towers)
    wanted = x.new_empty(batch, cameras, towers, channels, height, width)
    for number, tower in enumerate(config.towers):
        mean, std = _statistics(tower, x.device)
        wanted[:, :, number] = (x - mean) / std
    return wanted.view(batch, cameras * towers * channels, height, width)


def colours(pixel_values: Tensor, tower: TowerConfig) -> Tensor:
    """Undo `normalise_pixels`: [B, 6 * cameras, H, W] to fp32 [B, cameras, 3, H, W] in 0..255.

    `tower` is the first of the two, whose channels are read.
    """
    pixels = pixel_values.detach().float().unflatten(1, (-1, 6))[:, :, :3]
    mean, std = _statistics(tower, pixels.device)
    return ((pixels * std + mean) * 255).round().clamp(0, 255)


def _statistics(tower: TowerConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation of a tower's colours, fp32 [3, 1, 1]."""
    both = torch.tensor([tower.mean, tower.std], dtype=torch.float32, device=device)
    return both[0].view(3, 1, 1), both[1].view(3, 1, 1)


# ---------------------------------------------------------------------- prompt
def tokenize(
    instructions: Sequence[str], tokenizer: Any, config: OpenVLAConfig
) -> tuple[Tensor, Tensor | None]:
    """Prompts [B, P], padded on the left, and their mask (None when all have the same length).

    The prompt ends with the empty token, which stood there in training and which the tokenizer
    does not produce.
    """
    rows = []
    for instruction in instructions:
        text = PROMPT.format(instruction=instruction.lower())
        ids = list(tokenizer(text)["input_ids"])
        if ids[-1] != config.empty_token_id:
            ids.append(config.empty_token_id)
        if not all(0 <= i < config.text["vocab_size"] for i in ids):
            raise ValueError(
                f"the tokenizer gives the ids {min(ids)} to {max(ids)}; this policy knows "
                f"{config.text['vocab_size']} words: it is another model's tokenizer, or "
                f"`empty_token_id={config.empty_token_id}` is wrong"
            )
        rows.append(ids)
    longest = max(map(len, rows))
    padding = [longest - len(ids) for ids in rows]
    padded = [[config.pad_token_id] * n + ids for n, ids in zip(padding, rows, strict=True)]
    if not any(padding):
        return torch.tensor(padded, dtype=torch.int64), None
    mask = [[0] * n + [1] * (longest - n) for n in padding]
    return torch.tensor(padded, dtype=torch.int64), torch.tensor(mask, dtype=torch.int64)


def check_observation(observation: Any, config: OpenVLAConfig) -> dict[str, Any]:
    """Checked copy of one observation: `images` as a list, `instruction`, `proprio`, `unnorm_key`.

    Errors: TypeError and ValueError that name the entry.
    """
    check_keys(observation, OBSERVATION_KEYS)
    return {
        "images": check_images(observation["images"], config.num_images),
        "instruction": check_instruction(observation["instruction"]),
        "proprio": check_proprio(observation.get("proprio"), config),
        "unnorm_key": observation.get("unnorm_key"),
    }


# ---------------------------------------------------------------------- numbers
def check_proprio(proprio: Any, config: OpenVLAConfig) -> np.ndarray | None:
    """Robot state fp64 [proprio_dim], or None for a policy without one.

    Errors: ValueError when it is missing, not wanted, of another shape or not finite; TypeError for
    what holds no numbers.
    """
    wanted = config.proprio_dim if isinstance(config, OpenVLAOFTConfig) else None
    if wanted is None:
        if proprio is not None:
            raise ValueError("this policy reads no robot state; leave `proprio` out")
        return None
    return check_state(proprio, wanted)


@dataclass(frozen=True)
class Bounds:
    """The interval of each dimension that a policy knows as [-1, 1]; arrays [dim].

    Dimensions outside `mask` (a gripper command) are passed through.
    """

    low: np.ndarray
    high: np.ndarray
    mask: np.ndarray
    epsilon: float = 0.0

    def normalise(self, values: np.ndarray) -> np.ndarray:
        """Robot units to [-1, 1], clipped."""
        span = self.high - self.low + self.epsilon
        scaled = 2 * (values - self.low) / np.where(span == 0, 1.0, span) - 1
        return np.clip(np.where(self.mask, scaled, values), -1.0, 1.0)

    def unnormalise(self, values: np.ndarray) -> np.ndarray:
        """[-1, 1] to robot units."""
        span = self.high - self.low + self.epsilon
        return np.where(self.mask, 0.5 * (values + 1) * span + self.low, values)


def resolve_key(norm_stats: Mapping[str, Any], key: str | None) -> str:
    """The dataset whose statistics to use; a LIBERO suite also finds its `_no_noops` statistics.

    Errors: ValueError with the known keys.
    """
    known = listed(sorted(norm_stats)) or "none: this model carries no statistics"
    if key is None:
        if len(norm_stats) == 1:
            return next(iter(norm_stats))
        raise ValueError(f"choose the statistics to un-normalise with, `unnorm_key=` ({known})")
    for name in (key, f"{key}_no_noops"):
        if name in norm_stats:
            return name
    raise ValueError(f"unknown unnorm_key {key!r}; this model knows: {known}")


def opens_at_one(action: Mapping[str, Any]) -> bool | None:
    """Whether statistics of actions say that the last number is a gripper of 0 close, 1 open.

    None: they hold no range. RLDS data, such as that of all published checkpoints, is written so.
    """
    low, high = (
        action.get(end) or action.get(other) for end, other in (("q01", "min"), ("q99", "max"))
    )
    if not low or not high:
        return None
    return float(low[-1]) >= -0.05 and float(high[-1]) <= 1.05


def bounds(config: OpenVLAConfig, key: str | None, what: str) -> Bounds:
    """Bounds of `what` ("action" or "proprio") in dataset `key`.

    Errors: ValueError for an unknown key, or statistics that are missing or damaged.
    """
    key = resolve_key(config.norm_stats, key)
    dataset = config.norm_stats[key]
    entry = dataset.get(what) if isinstance(dataset, Mapping) else None
    low_name, high_name, epsilon = "q01", "q99", 0.0
    if isinstance(config, OpenVLAOFTConfig):
        epsilon = 1e-8
        if config.bounds == "min-max":
            low_name, high_name = "min", "max"
    if not isinstance(entry, Mapping) or low_name not in entry or high_name not in entry:
        raise ValueError(
            f"the statistics {key!r} have no {low_name}/{high_name} for {what!r}; add them to "
            "dataset_statistics.json"
        )
    size = config.action_dim if what == "action" else getattr(config, "proprio_dim", None)
    if size is None:
        raise ValueError(f"this policy reads no {what}")
    where = f"the {what} statistics {key!r}: "
    low = numbers(f"{where}{low_name}", entry[low_name])
    high = numbers(f"{where}{high_name}", entry[high_name])
    mask = flags(f"{where}mask", entry.get("mask", [True] * len(low)))
    if not low.shape == high.shape == mask.shape == (size,):
        raise ValueError(
            f"the {what} statistics {key!r} have {low.shape}, {high.shape} and mask {mask.shape} "
            f"entries; this policy has {size} dimensions"
        )
    if swapped := np.flatnonzero(mask & (low > high)).tolist():
        raise ValueError(f"{where}{low_name} is above {high_name} in the dimensions {swapped}")
    if not (np.abs([low, high]) < _FARTHEST).all():
        raise ValueError(f"{where}{low_name} and {high_name} must lie below {_FARTHEST:g}")
    return Bounds(low, high, mask, epsilon=epsilon)
