"""Which token of an earlier step shows what a token shows now (SAFE-Pruner)."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def correspondence(now: Tensor, then: Tensor, views: tuple[int, ...]) -> Tensor:
    """For each token the most similar one of another step, by cosine, in the same camera.

    Args:
        now, then: `[B, M, D]`, compared in fp32; a token of length zero is similar to none.
        views: tokens of each camera; they sum to M.

    Returns:
        `[B, M]` int64 indices into the tokens of `then`; a token that is as similar to its own
        place as to any other stays there, other ties go to the lowest index.
    """
    with torch.autocast(now.device.type, enabled=False):
        one = torch.nn.functional.normalize(now.float(), dim=-1)
        other = torch.nn.functional.normalize(then.float(), dim=-1)
        found, start = [], 0
        for size in views:
            span = slice(start, start + size)
            cosine = one[:, span] @ other[:, span].transpose(1, 2)
            here = torch.arange(start, start + size, device=now.device)
            best = cosine.max(dim=2)
            own = (one[:, span] * other[:, span]).sum(dim=-1)
            stays = own >= best.values - 1e-6  # fp32 rounds the two products differently.
            found.append(torch.where(stays, here, start + best.indices))
            start += size
    return torch.cat(found, dim=1)
