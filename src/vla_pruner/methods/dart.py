"""DART: a few pivots, and the tokens that repeat them least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vla_pruner.baselines.determinant import text_likeness
from vla_pruner.methods.base import Evidence, OneCut, Positions
from vla_pruner.pruning.options import require_choice, require_int
from vla_pruner.pruning.selection import top_k


@dataclass(frozen=True, kw_only=True)
class DART(OneCut):
    """Keep pivots, and the tokens whose nearest pivot is farthest away.

    With v the embeddings of image tokens and t those of the instruction's words, as both enter
    layer 0, and |x|_1 the sum of the absolute entries of x:

        P = the p tokens with the largest |v_i|_1,   Q = the words with the largest |t_j|_1
        d_i = max over x in P and Q of cos(v_i, x)
        kept = P, and of the others the k - p with the smallest d_i

    Args:
        pivots: p, of each camera if the budget is per view; at least 1. Never more than k.
        text_pivots: words in Q, at least 0; 0: the image alone.
        layer: K; 0 cuts before the decoder.
        budget: "view", a budget for every image as in NVIDIA's version, or "global".
        positions: "keep", or "compact".

    Reference: Wen et al., "Stop Looking for Important Tokens in Multimodal Language Models:
    Duplication Matters More", EMNLP 2025; and its production version, `DartPruner` of NVIDIA's
    TensorRT-Edge-LLM, whose documentation this follows where the two differ.

    Differences: the paper cuts before layer 2, by keys and hidden states there. How the distances
    to several pivots are joined, and the number of pivots, are our specification.
    """

    name: ClassVar[str] = "dart"
    summary: ClassVar[str] = "the tokens that repeat a few pivots least"
    paper: ClassVar[str | None] = "https://arxiv.org/abs/2502.11494"
    licence: ClassVar[str] = "Apache-2.0 (written from the documentation)"

    layer: int = 0
    budget: Literal["global", "view"] = "view"

    pivots: int = 4
    text_pivots: int = 4
    positions: Positions = "keep"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_int("pivots", self.pivots, 1)
        require_int("text_pivots", self.text_pivots, 0)
        require_choice("positions", self.positions, ("keep", "compact"))

    @property
    def needs(self) -> tuple[str, ...]:
        """The instruction, if words are pivots."""
        return ("text",) if self.text_pivots else ()

    def choose(self, evidence: Evidence, k: int) -> Tensor:
        """Pivots, and what is farthest from them: `[B, k]`, ascending."""
        features, valid = evidence.features, evidence.valid
        first = top_k(_length(features), min(self.pivots, k), valid=valid)
        index = first[..., None].expand(-1, -1, features.shape[2])
        among = None if valid is None else valid.gather(1, first)
        nearest = text_likeness(features, features.gather(1, index), among, pool="max")
        if self.text_pivots:
            words, there = self._words(evidence)
            said = text_likeness(features, words, there, pool="max")
            nearest = torch.where(there.any(dim=1, keepdim=True), nearest.maximum(said), nearest)
        score = (-nearest).scatter(1, first, float("inf"))
        return top_k(score, k, valid=valid)

    def _words(self, evidence: Evidence) -> tuple[Tensor, Tensor]:
        """Q: embeddings `[B, q, D]`, and which of them are real `[B, q]`."""
        text, there = evidence.text, evidence.text_valid
        if text is None:
            raise ValueError("method 'dart' compares with the instruction; got no text.")
        if there is None:
            there = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
        count = min(self.text_pivots, text.shape[1])
        longest = top_k(_length(text), count, valid=there)
        index = longest[..., None].expand(-1, -1, text.shape[2])
        return text.gather(1, index), there.gather(1, longest)


def _length(vectors: Tensor) -> Tensor:
    """Sum of absolute entries `[B, n]` of `[B, n, D]`, fp32."""
    return vectors.float().abs().sum(dim=-1)
