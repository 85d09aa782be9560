"""SparseVLM as VLA-Pruner's release computes it: one cut, no recycling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vla_pruner.baselines.query_weights import query_weights
from vla_pruner.methods.base import Evidence, OneCut, ScoreSpec
from vla_pruner.pruning.budget import Budget
from vla_pruner.pruning.options import require_int
from vla_pruner.pruning.selection import top_k


@dataclass(frozen=True, kw_only=True)
class SparseVLMRelease(OneCut):
    """One cut before layer K, by the attention of the raters in layer K-1, at the common budget.

    With E_v `[M, D]` and E_t `[T', D]` the embeddings of image and text as they enter layer 0, the
    text without its first and its last token, and A `[H, S, S]` the attention of layer K-1:

        Z   = softmax over text of E_v E_t^T
        r_j = mean over v of Z[v, j],   R = {j : r_j >= mean r}
        s_m = mean over j in R and heads h of A[h, j, m]

    The k tokens with the largest s stay. It is what VLA-Pruner's tables call SparseVLM, on OpenVLA;
    `sparsevlm` is the method of its own paper.

    Args:
        layer: K, at least 1.

    Reference: "VLA-Pruner: Temporal-Aware Dual-Level Visual Token Pruning for Efficient
    Vision-Language-Action Inference", arXiv 2511.16449v2, its public code (commit fa5bfed); for the
    raters: Zhang et al., "SparseVLM", ICML 2025.

    Differences: none from the release, whose tokens and logits it reproduces, but for texts of one
    or two tokens, where all of them vote. From SparseVLM's paper: one cut instead of three,
    no recycling, `>=` instead of `>`, and the text span, one token short at both ends.
    """

    name: ClassVar[str] = "sparsevlm-release"
    summary: ClassVar[str] = "SparseVLM with one cut, as VLA-Pruner's code does"
    paper: ClassVar[str | None] = "https://arxiv.org/abs/2511.16449"
    licence: ClassVar[str] = "Apache-2.0 (public code not used)"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_int("layer", self.layer, 1)

    @property
    def needs(self) -> tuple[str, ...]:
        """The rows of the instruction."""
        return ("text",)

    def scores(self, cut: int) -> Mapping[str, ScoreSpec]:
        """Attention of the raters in the layer before the cut."""
        return {"semantic": ScoreSpec(layer=cut - 1, rows="weighted")}

    def query_weights(self, visual: Tensor, text: Tensor, text_valid: Tensor) -> Tensor:
        """1 for raters, 0 for other tokens: `[B, T]`."""
        number = text_valid.int().cumsum(dim=1)
        inner = text_valid & (number > 1) & (number < number[:, -1:])
        inner = torch.where(inner.any(dim=1, keepdim=True), inner, text_valid)
        return query_weights(visual, text, inner, strict=False)

    def choose(self, evidence: Evidence, k: int) -> Tensor:
        """The k tokens with the highest score: `[B, k]`, ascending."""
        if evidence.semantic is None:
            raise ValueError("method 'sparsevlm-release' needs the semantic score; got None.")
        return top_k(evidence.semantic, k, valid=evidence.valid)

    def _resolve(self, views: tuple[int, ...]) -> tuple[int, ...]:
        keep = 1 - (1 - self.keep) if isinstance(self.keep, float) else self.keep
        return Budget(keep, self.budget).resolve(views)
