"""FastV: keep the visual tokens that the last row of the prefill attends to most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vla_pruner.methods.base import Evidence, OneCut, SemanticRows
from vla_pruner.pruning.selection import top_k


@dataclass(frozen=True, kw_only=True)
class FastV(OneCut):
    """Rank visual tokens by the attention of the last prefill query at layer K-1, heads averaged.

    That row is the last token of the prompt where an answer follows; where action slots stand in
    the prefill it is the last of these, or the stop token behind them (OpenVLA-OFT).

    Reference: Chen et al., "An Image is Worth 1/2 Tokens After Layer 2", ECCV 2024.
    """

    name: ClassVar[str] = "fastv"
    summary: ClassVar[str] = "top attention of the last row of the prefill"
    paper: ClassVar[str | None] = "https://arxiv.org/abs/2403.06764"

    @property
    def semantic_rows(self) -> SemanticRows | None:
        """The last query."""
        return "last"

    def choose(self, evidence: Evidence, k: int) -> Tensor:
        """The k tokens with the highest semantic score: `[B, k]`, ascending."""
        assert evidence.semantic is not None
        return top_k(evidence.semantic, k, valid=evidence.valid)
