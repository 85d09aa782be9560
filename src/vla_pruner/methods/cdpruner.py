"""CDPruner: tokens that are unlike each other and concern the instruction, by a determinant."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vla_pruner.baselines.determinant import most_determinant, stretched, text_likeness
from vla_pruner.methods.base import Evidence, OneCut, Positions, ScoreSpec
from vla_pruner.pruning.options import require_choice

_LEAST = 1e-6
_MOST = 0.98


@dataclass(frozen=True, kw_only=True)
class CDPruner(OneCut):
    """The most likely k tokens of a determinantal point process, greedily.

    With v `[n, D]` the projected embeddings and q `[n]` how much each token concerns the
    instruction:

        r_i  = (q_i - min q + 1e-6) / (max q - min q)        1 for all if max q = min q
        L_ij = r_i cos(v_i, v_j) r_j
        next = argmax_j det(L of S and j)                    S, the chosen ones, not among the j

    until k are chosen. `weight` in [0, 1) takes `exp(a r_i)`, a = weight / (2 (1 - weight)), in the
    place of r_i: 0 is the determinant of the cosines alone.

    Args:
        relevance: what q is: "text", the cosine with the instruction's words as both enter layer 0;
            "logits", the products of the words' queries with the token's key in layer `layer`,
            before rotary positions; "nothing", r = 1.
        pool: "mean" of the cosines over the words, or "max"; for `relevance="text"`.
        negate: take -q, as the public code does with CLIP's cosines.
        weight: in [0, 0.98], see above; None: r itself, as the public code does.
        layer: K; 0 cuts before the decoder, as the source does.
        budget: "view", every image for itself as in the source, or "global".
        positions: "compact", the source's; "keep".

    Reference: Zhang et al., "Beyond Attention or Similarity: Maximizing Conditional Diversity for
    Token Pruning in MLLMs", NeurIPS 2025.

    Differences: q comes from CLIP's two towers in the source; a policy has none, hence `relevance`.
    Minimum and maximum are taken over the tokens among which is chosen, in the public code over the
    whole batch. Similarities are fp32, where the public code's half precision ends in NaN; what is
    taken when the determinant can only be 0 is our choice (`pruning.determinant`).
    """

    name: ClassVar[str] = "cdpruner"
    summary: ClassVar[str] = "diverse and relevant tokens, by a determinant"
    paper: ClassVar[str | None] = "https://arxiv.org/abs/2506.10967"
    licence: ClassVar[str] = "Apache-2.0 (public code: Apache-2.0)"

    layer: int = 0
    budget: Literal["global", "view"] = "view"

    relevance: Literal["text", "logits", "nothing"] = "text"
    pool: Literal["mean", "max"] = "mean"
    negate: bool = False
    weight: float | None = None
    positions: Positions = "compact"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("relevance", self.relevance, ("text", "logits", "nothing"))
        require_choice("pool", self.pool, ("mean", "max"))
        if not isinstance(self.negate, bool):
            raise ValueError(f"`negate={self.negate!r}` must be true or false.")
        require_choice("positions", self.positions, ("keep", "compact"))
        if self.weight is not None and not 0.0 <= self.weight <= _MOST:
            raise ValueError(
                f"`weight={self.weight}` must lie in [0, {_MOST}], or be None for the plain "
                "product; above it the determinant plays no part any more."
            )

    @property
    def needs(self) -> tuple[str, ...]:
        """The instruction, unless nothing is asked of it."""
        return () if self.relevance == "nothing" else ("text",)

    def scores(self, cut: int) -> Mapping[str, ScoreSpec]:
        """Products of queries and keys in the layer about to run, for `relevance="logits"`."""
        if self.relevance != "logits":
            return {}
        return {"relevance": ScoreSpec(layer=cut, rows="text", kind="logits")}

    def choose(self, evidence: Evidence, k: int) -> Tensor:
        """The greedy maximum: `[B, k]`, ascending."""
        quality = self.quality(evidence)
        return most_determinant(evidence.features, k, quality=quality, valid=evidence.valid)

    def quality(self, evidence: Evidence) -> Tensor | None:
        """r, or what `weight` makes of it: `[B, n]` fp32; None: 1 for all."""
        if self.relevance == "nothing" or self.weight == 0:
            return None
        if self.relevance == "logits":
            score = evidence.scores["relevance"]
        elif evidence.text is None:
            raise ValueError("method 'cdpruner' compares with the instruction; got no text.")
        else:
            score = text_likeness(
                evidence.features, evidence.text, evidence.text_valid, pool=self.pool
            )
        score = -score if self.negate else score
        relevance = stretched(score, evidence.valid, least=_LEAST)
        if self.weight is None:
            return relevance
        return torch.exp(self.weight / (2 * (1 - self.weight)) * (relevance - 1))
