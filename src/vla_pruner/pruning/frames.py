"""Which patches of a camera image are the same as a step before."""

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
    if frames.ndim != 5:
        raise ValueError(f"frames must be [B, cameras, 3, H, W]; got {tuple(frames.shape)}.")
    batch, cameras, colours, height, width = frames.shape
    size = math.isqrt(cameras * height * width // tokens)
    if size == 0 or height % size or width % size or size**2 * tokens != cameras * height * width:
        raise ValueError(
            f"{cameras} images of {height} x {width} pixels cannot be cut into {tokens} square "
            "patches, one for each visual token; give them as the vision tower sees them, after "
            "crop and resize."
        )
    rows, columns = height // size, width // size
    cut = frames.float().reshape(batch, cameras, colours, rows, size, columns, size)
    return cut.permute(0, 1, 3, 5, 2, 4, 6).reshape(batch, tokens, colours * size**2)


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
