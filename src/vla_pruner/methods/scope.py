"""SCOPE: attended tokens to one of which every other token is similar."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from vla_pruner.baselines.facility import most_covering
from vla_pruner.methods.base import Evidence, OneCut, Positions, SemanticRows
from vla_pruner.methods.holov import likeness
from vla_pruner.pruning.options import require_choice


@dataclass(frozen=True, kw_only=True)
class SCOPE(OneCut):
    """Greedy facility location, each gain weighed by attention.

    With v `[n, D]` the projected embeddings, a `[n]` an attention score, S the chosen tokens and
    c_i = max(0, max over s in S of cos(v_i, v_s)):

        next = argmax_j  (sum_i max(0, cos(v_i, v_j) - c_i)) a_j^alpha

    until k are chosen.

    Args:
        attention: what stands for a, which in the source is the attention of the vision tower's
            class token: "received", the mean attention of all prefill rows in layer K-1; "last",
            that of the last row; "features", (1 + cosine to the mean embedding) / 2, which needs no
            attention and allows `layer=0`.
        alpha: at least 0; 0 leaves the coverage alone.
        layer: K; at least 1 unless `attention="features"`.
        positions: "keep", or "compact", as the public code for LLaVA does.

    Reference: Deng et al., "SCOPE: Saliency-Coverage Oriented Token Pruning for Efficient
    Multimodal LLMs", NeurIPS 2025.

    Differences: the source prunes before the decoder with the class token's attention. OpenVLA's
    towers give none, so a score takes its place, and K = 3 as for the other methods. Similarities
    are fp32; tokens stay in the order of the image.
    """

    name: ClassVar[str] = "scope"
    summary: ClassVar[str] = "attended tokens that stand for all others"
    paper: ClassVar[str | None] = "https://arxiv.org/abs/2510.24214"
    licence: ClassVar[str] = "Apache-2.0 (public code: no licence at its root, not used)"

    attention: Literal["received", "last", "features"] = "received"
    alpha: float = 1.0
    positions: Positions = "keep"

    def __post_init__(self) -> None:
        require_choice("attention", self.attention, ("received", "last", "features"))
        if self.layer == 0 and self.attention != "features":
            raise ValueError(
                f'`attention="{self.attention}"` is read in the layer before the cut; use '
                '`layer` >= 1, or `attention="features"`.'
            )
        super().__post_init__()
        if not 0.0 <= self.alpha < float("inf"):
            raise ValueError(f"`alpha={self.alpha}` must be a finite number of at least 0.")
        require_choice("positions", self.positions, ("keep", "compact"))

    @property
    def semantic_rows(self) -> SemanticRows | None:
        """All rows, the last one, or no attention."""
        if self.attention == "features":
            return None
        return "all" if self.attention == "received" else "last"

    def choose(self, evidence: Evidence, k: int) -> Tensor:
        """The greedy cover: `[B, k]`, ascending."""
        score = (
            likeness(evidence.features, evidence.valid)
            if self.attention == "features"
            else evidence.semantic
        )
        assert score is not None
        weight = score.float() ** self.alpha
        return most_covering(evidence.features, k, weight=weight, valid=evidence.valid)
