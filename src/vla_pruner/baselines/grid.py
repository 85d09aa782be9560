"""Neighbourhoods on the grid of a camera's visual tokens."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def grids(views: tuple[int, ...], columns: int | None = None) -> tuple[tuple[int, int], ...]:
    """Rows and columns of each camera's grid.

    Args:
        views: visual tokens of each camera.
        columns: tokens in a row of every camera; None: the grids are square.

    Raises:
        ValueError: a camera whose tokens are no such grid.
    """
    found = []
    for size in views:
        width = math.isqrt(size) if columns is None else columns
        if size % max(width, 1) or (columns is None and width * width != size):
            shape = "a square" if columns is None else f"a grid with `columns={columns}`"
            raise ValueError(
                f"the {size} visual tokens of a camera are not {shape}; say with `columns` how "
                "many stand in a row, or use a method without neighbourhoods."
            )
        found.append((size // width, width))
    return tuple(found)


def on_grids(tokens: Tensor, shapes: tuple[tuple[int, int], ...]) -> list[Tensor]:
    """`[B, M]` as one `[B, 1, rows, columns]` per camera."""
    sizes = [rows * columns for rows, columns in shapes]
    parts = tokens.split(sizes, dim=1)
    return [part.unflatten(1, (1, *shape)) for part, shape in zip(parts, shapes, strict=True)]


def off_grids(parts: list[Tensor]) -> Tensor:
    """What `on_grids` took apart, `[B, M]`."""
    return torch.cat([part.flatten(1) for part in parts], dim=1)


def count_around(mask: Tensor, shapes: tuple[tuple[int, int], ...]) -> Tensor:
    """How many of the 3 x 3 cells around each token are True: `[B, M]` int64 from bool `[B, M]`."""
    ones = torch.ones(1, 1, 3, 3, dtype=torch.float32, device=mask.device)
    parts = on_grids(mask.float(), shapes)
    with torch.autocast(mask.device.type, enabled=False):
        counted = off_grids([F.conv2d(part, ones, padding=1) for part in parts])
    return counted.round().long()


def dilate(mask: Tensor, shapes: tuple[tuple[int, int], ...]) -> Tensor:
    """True wherever one of the 3 x 3 cells around a token is, bool `[B, M]`."""
    return count_around(mask, shapes) > 0


def close_gaps(mask: Tensor, shapes: tuple[tuple[int, int], ...]) -> Tensor:
    """Morphological closing by 3 x 3 cells, bool `[B, M]`: gaps fill up, the rim does not spread.

    As on a grid that goes on, empty, beyond each camera's rim.
    """
    ones = torch.ones(1, 1, 3, 3, dtype=torch.float32, device=mask.device)
    found = []
    for part in on_grids(mask.float(), shapes):
        with torch.autocast(mask.device.type, enabled=False):
            grown = F.conv2d(F.pad(part, (1, 1, 1, 1)), ones, padding=1) > 0.5
            found.append(F.conv2d((~grown).float(), ones) < 0.5)
    return off_grids(found)
