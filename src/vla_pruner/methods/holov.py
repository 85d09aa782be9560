"""HoloV: a budget for every region of the image, by attention and variety."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vla_pruner.baselines.diversity import crop_quotas
from vla_pruner.methods.base import Evidence, OneCut, Positions, SemanticRows
from vla_pruner.pruning.options import require_choice, require_int

Surrogate = Literal["received", "last", "features"]


@dataclass(frozen=True, kw_only=True)
class HoloV(OneCut):
    """Cut the sequence of visual tokens into crops and share the budget among them.

    With a `[n]` an attention score and v `[n, D]` the projected embeddings, in each of G contiguous
    crops of n_p tokens (S_ij = cos(v_i, v_j), S_ii = 0):

        u_i     = sum_j S_ij / (n_p - 1)
        var_i   = sum_j (S_ij - u_i)^2 / (n_p - 1)
        token_i = a_i + beta var_i mean|a| / (mean|var| + 1e-6)
        quota_p = floor(k mean(token) / sum over crops of mean(token))

    Places that rounding leaves over, or that a crop is too small for, go one by one to the crops
    with the largest scores. Inside a crop the tokens with the largest a stay.

    Args:
        attention: what stands for a, which in the source is the attention of the vision tower's
            class token: "received", the mean attention of all prefill rows in layer K-1; "last",
            that of the last row; "features", (1 + cosine to the mean embedding) / 2, which needs no
            attention and allows `layer=0`.
        crops: G.
        beta: weight of the variety, at least 0.
        layer: K; at least 1 unless `attention="features"`.
        positions: "keep", or "compact", as the public code for LLaVA does.

    Reference: Zou et al., "Don't Just Chase 'Highlighted Tokens' in MLLMs: Revisiting Visual
    Holistic Context Retention", NeurIPS 2025.

    Differences: the source prunes before the decoder with the class token's attention. OpenVLA's
    towers give none, so a score takes its place, and K = 3 as for the other methods. The public
    code multiplies a by 1000, which cancels; it loses places beyond a crop's size and fills them
    with zero vectors, and puts the tokens of a crop in order of attention: here exactly k tokens
    stay, in the order of the image.
    """

    name: ClassVar[str] = "holov"
    summary: ClassVar[str] = "a budget per region, by attention and variety"
    paper: ClassVar[str | None] = "https://arxiv.org/abs/2510.02912"
    licence: ClassVar[str] = "Apache-2.0 (public code: Apache-2.0)"

    attention: Surrogate = "received"
    crops: int = 16
    beta: float = 0.09

    positions: Positions = "keep"

    def __post_init__(self) -> None:
        require_choice("attention", self.attention, ("received", "last", "features"))
        if self.layer == 0 and self.attention != "features":
            raise ValueError(
                f'`attention="{self.attention}"` is read in the layer before the cut; use '
                '`layer` >= 1, or `attention="features"`.'
            )
        super().__post_init__()
        require_int("crops", self.crops, 1)
        if not self.beta >= 0:
            raise ValueError(f"`beta={self.beta}` must be at least 0.")
        require_choice("positions", self.positions, ("keep", "compact"))

    @property
    def semantic_rows(self) -> SemanticRows | None:
        """All rows, the last one, or no attention."""
        rows: dict[Surrogate, SemanticRows | None]
        rows = {"received": "all", "last": "last", "features": None}
        return rows[self.attention]

    def choose(self, evidence: Evidence, k: int) -> Tensor:
        """The most attended tokens of each crop: `[B, k]`, ascending."""
        score = (
            likeness(evidence.features, evidence.valid)
            if self.attention == "features"
            else evidence.semantic
        )
        assert score is not None
        return crop_quotas(
            score, evidence.features, k, crops=self.crops, beta=self.beta, valid=evidence.valid
        )


def likeness(features: Tensor, valid: Tensor | None = None) -> Tensor:
    """How alike each token is to the mean of all: `[B, n]` fp32 in [0, 1] from `[B, n, D]`."""
    with torch.autocast(features.device.type, enabled=False):
        whole = features.float()
        weight = torch.ones_like(whole[..., :1]) if valid is None else valid[..., None].float()
        mean = (whole * weight).sum(dim=1, keepdim=True) / weight.sum(dim=1, keepdim=True)
        return (1 + F.cosine_similarity(whole, mean.nan_to_num(), dim=-1)) / 2
