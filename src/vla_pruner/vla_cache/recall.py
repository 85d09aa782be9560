"""What a method sees and decides that uses keys and values of the step before again."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class Recall:
    """What is known of the last step of each row's episode when the next one starts.

    M visual tokens, a decoder of T layers.

    Args:
        similarity: `[B, M]` fp64, cosine of each visual token's patch of the camera image with the
            same patch in the last step (`pruning.frames`).
        relevance: `[B, M]` fp32, attention that the token got from the instruction in the last
            step: mean over heads and rows of text in layer `VLACache.recalled_layer`.
        entropy: `[B, T]` fp32, how spread the last step's attention was in each layer
            (`pruning.entropy`).
        views: visual tokens of each camera; they sum to M.
        cuts: layers before which tokens leave, as `Method.cuts` says.
        valid: `[B|1, M]` bool, False for the tokens of a missing camera, and for those whose own
            output the caller reads; None: there are none.
    """

    similarity: Tensor
    relevance: Tensor
    entropy: Tensor
    views: tuple[int, ...]
    cuts: tuple[int, ...]
    valid: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Reuse:
    """Whose keys and values are used again, and from which cut on.

    Args:
        order: `[B, M]` int64, each row all of 0..M-1: the tokens that leave first come first.
        counts: `[B, C]` int64, how many of them have left after each of C cuts; never falling.
    """

    order: Tensor
    counts: Tensor
