"""Which words of an instruction concern the image: the raters of SparseVLM."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def query_weights(
    visual: Tensor, text: Tensor, text_valid: Tensor, *, strict: bool = True
) -> Tensor:
    """Words that are at least as similar to the image as the average word.

    `Z = softmax over words of E_v E_t^T`, `r_j = mean over v of Z[v, j]`; j is a rater if r_j is
    larger than the mean of r, or equal to it unless `strict`.

    Args:
        visual: `[B, M, D]`, text: `[B, T, D]`, embeddings.
        text_valid: `[B, T]` bool, False for what is no word.

    Returns:
        `[B, T]` fp32, 1 for raters and 0 for others; where no word is above the mean, all words.

    Raises:
        ValueError: shapes that do not fit together.
    """
    if visual.ndim != 3 or text.ndim != 3 or text_valid.shape != text.shape[:2]:
        raise ValueError(
            "expected visual [B, M, D], text [B, T, D] and text_valid [B, T]; got "
            f"{tuple(visual.shape)}, {tuple(text.shape)} and {tuple(text_valid.shape)}."
        )
    with torch.autocast(visual.device.type, enabled=False):
        similar = visual.float() @ text.float().transpose(1, 2)
        similar = similar.masked_fill(~text_valid[:, None], -1e30)
        rating = torch.softmax(similar, dim=2).mean(dim=1).masked_fill(~text_valid, 0.0)
    words = text_valid.sum(dim=1, keepdim=True)
    mean = rating.sum(dim=1, keepdim=True) / words.clamp_min(1)
    rates = (rating > mean if strict else rating >= mean) & text_valid
    return torch.where(rates.any(dim=1, keepdim=True), rates, text_valid).float()
