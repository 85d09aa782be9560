"""Patches of a camera image: which are the same as a step before, how bright, how edged."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_BELOW_ONE = 1 - 2**-53  # the largest fp64 number that is


def patches(frames: Tensor, tokens: int) -> Tensor:
    """Cut camera images into square patches, one for each visual token.

    Args:
        frames: `[B, cameras, 3, H, W]`.
        tokens: M, visual tokens of all cameras. Those of a camera are a grid over its image, row by
            row.

    Returns:
        `[B, M, 3 P P]` fp32, with patches of P x P pixels.

    Raises:
        ValueError: images that M square patches do not tile.
    """
    size = patch_size(frames, tokens)
    batch, _, colours, height, width = frames.shape
    rows, columns = height // size, width // size
    cut = frames.float().reshape(batch, -1, colours, rows, size, columns, size)
    return cut.permute(0, 1, 3, 5, 2, 4, 6).reshape(batch, tokens, colours * size**2)


def patch_size(frames: Tensor, tokens: int) -> int:
    """P, where each of `tokens` is a patch of P x P pixels of `frames` `[B, cameras, 3, H, W]`.

    Raises:
        ValueError: images that so many square patches do not tile.
    """
    if frames.ndim != 5:
        raise ValueError(f"frames must be [B, cameras, 3, H, W]; got {tuple(frames.shape)}.")
    _, cameras, _, height, width = frames.shape
    size = math.isqrt(cameras * height * width // tokens)
    if size == 0 or height % size or width % size or size**2 * tokens != cameras * height * width:
        raise ValueError(
            f"{cameras} images of {height} x {width} pixels cannot be cut into {tokens} square "
            "patches, one for each visual token; give them as the vision tower sees them, after "
            "crop and resize."
        )
    return size


def grey(frames: Tensor) -> Tensor:
    """Brightness `[..., H, W]` fp32 of colours `[..., 3, H, W]`, weighed as ITU-R BT.601 does."""
    weight = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float32, device=frames.device)
    return (frames.float() * weight[:, None, None]).sum(dim=-3)


def mean_over_patches(values: Tensor, tokens: int, size: int) -> Tensor:
    """Mean of each patch of P x P pixels: `[B, cameras, H, W]` to `[B, tokens]`."""
    height, width = values.shape[2] // size, values.shape[3] // size
    cut = values.unflatten(3, (width, size)).unflatten(2, (height, size))
    return cut.mean(dim=(3, 5)).reshape(len(values), tokens)


def edges(brightness: Tensor) -> Tensor:
    """Length of the Sobel gradient at each pixel, `[B, cameras, H, W]`; images go on at the rim."""
    ramp = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]], dtype=torch.float32)
    kernel = torch.stack([ramp, ramp.T])[:, None].to(brightness.device)
    flat = brightness.flatten(0, 1)[:, None]
    with torch.autocast(brightness.device.type, enabled=False):
        padded = torch.nn.functional.pad(flat, (1, 1, 1, 1), mode="replicate")
        slopes = torch.nn.functional.conv2d(padded, kernel)
    return slopes.square().sum(dim=1).sqrt().unflatten(0, brightness.shape[:2])


def patch_similarity(before: Tensor, now: Tensor) -> Tensor:
    """Cosine of the same patch in two steps; 1 where a patch is exactly the same, a black one too.

    In fp32 half of the patches that changed by one colour would have a cosine of 1, too. Here a
    patch that changed is below 1, also one that is only brighter.

    Args:
        before, now: `[B, M, P]`, colours from 0 up: adding a constant to all changes the cosine.

    Returns:
        `[B, M]` fp64 in [-1, 1].
    """
    cosine = torch.cosine_similarity(before.double(), now.double(), dim=-1)
    cosine = cosine.clamp(-1.0, _BELOW_ONE)
    return cosine.masked_fill((before == now).all(dim=-1), 1.0)
