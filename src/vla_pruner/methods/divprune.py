"""DivPrune: the most diverse visual tokens, whatever anybody attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from vla_pruner.baselines.diversity import most_diverse
from vla_pruner.methods.base import Evidence, OneCut, Positions
from vla_pruner.pruning.options import require_choice


@dataclass(frozen=True, kw_only=True)
class DivPrune(OneCut):
    """Maximise the smallest distance between any two tokens that stay, greedily.

    With v `[n, D]` the projected visual embeddings and `d_ij = 1 - cos(v_i, v_j)`:

        first:  argmax_i min over j != i of d_ij
        next:   argmax_j min over i in S of d_ij       S, the chosen ones, not among the j

    until k = round(keep n) are chosen. No attention and no text is asked for.

    Args:
        layer: K; 0 cuts before the decoder, as the source does.
        first: "nearest", the source's rule above; "second-nearest" looks at the second-nearest
            other token, as VLA-Pruner's paper does.
        positions: "compact", the source's; "keep".

    Reference: Alvar et al., "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal
    Models", CVPR 2025.

    Differences: none from the paper, which cuts before the decoder; the FLOPs that VLA-Pruner's
    paper gives for it imply one to three full layers: use `layer` for those. The public code
    compares in half precision, where near-duplicates tie and a chosen token can be chosen again;
    here it is fp32, and chosen tokens are masked. Written from the formula alone: the public code
    may not be used commercially, and none of it is here.
    """

    name: ClassVar[str] = "divprune"
    summary: ClassVar[str] = "the most diverse tokens, before the decoder"
    paper: ClassVar[str | None] = "https://arxiv.org/abs/2503.02175"
    licence: ClassVar[str] = "Apache-2.0 (public code: CC BY-NC 4.0, not used)"

    layer: int = 0

    first: Literal["nearest", "second-nearest"] = "nearest"
    positions: Positions = "compact"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("first", self.first, ("nearest", "second-nearest"))
        require_choice("positions", self.positions, ("keep", "compact"))

    def choose(self, evidence: Evidence, k: int) -> Tensor:
        """The greedy max-min set: `[B, k]`, ascending."""
        return most_diverse(evidence.features, k, first=self.first, valid=evidence.valid)
