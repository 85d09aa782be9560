"""Where the instruction stands, for adapters of models that write it behind the image."""

from __future__ import annotations

import torch
from torch import Tensor


def text_behind(
    visual: Tensor, length: int, *, earliest: int, skip: int = 0, until: int = 0
) -> Tensor | None:
    """`Layout.text_rows` where the instruction stands behind the visual tokens.

    Args:
        visual: `[B|1, M]`, see `Layout`.
        length: S.
        earliest: first position of text in any row.
        skip: positions right behind the visual tokens that are no text (a robot state).
        until: positions at the end that are no text (action slots).

    Returns:
        `[B|1, length - until - earliest]` int64, or None if nothing stands there.
    """
    end = max(earliest, length - until)
    rows = torch.arange(earliest, end, device=visual.device)[None]
    if rows.shape[1] == 0:
        return None
    return torch.where(rows > visual[:, -1:] + skip, rows, -1)
