"""VLA-Pruner: what the prompt looks at, joined with what the last actions looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from vla_pruner.methods.base import HistorySpec, Method, SemanticRows, require_choice, require_int
from vla_pruner.pruning.selection import combine_then_filter


@dataclass(frozen=True, kw_only=True)
class VLAPruner(Method):
    """Dual-level pruning as the paper describes it (section 4.2, Algorithms 1 and 2).

    The semantic score is the mean attention of all prefill queries (Eq. 2), the action score a
    forecast from the action attention of the last steps (Eq. 7). The k best tokens of each are
    pooled, and a greedy max-min search keeps the k least redundant of the pool. The first `window`
    steps of an episode run on all tokens.

    Args:
        window: past steps that the forecast looks back on, and steps that run unpruned.
        gamma: decay rate of the window, in [0, 1].
        smoothing: "window" (Eq. 7) or "ema" (Eq. 6).
        alpha: weight of the newest step in (0, 1], for "ema" alone.
        action_layers: layers whose action attention is averaged: "latter-half" or indices.
        first: first token of the search: "second-nearest" (the paper) or "nearest".
        score_layer: layer of the semantic score; None: the last one before the cut.

    Reference: "VLA-Pruner: Temporal-Aware Dual-Level Visual Token Pruning for Efficient
    Vision-Language-Action Inference", arXiv 2511.16449v2.
    """

    name: ClassVar[str] = "vla-pruner"
    summary: ClassVar[str] = "prompt attention joined with forecast action attention"
    paper: ClassVar[str | None] = "https://arxiv.org/abs/2511.16449"

    window: int = 3
    gamma: float = 0.8

    smoothing: Literal["window", "ema"] = "window"
    alpha: float = 0.5
    action_layers: Literal["latter-half"] | tuple[int, ...] = "latter-half"
    first: Literal["second-nearest", "nearest"] = "second-nearest"
    score_layer: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.action_layers, str):
            object.__setattr__(self, "action_layers", tuple(self.action_layers))
        require_choice("first", self.first, ("second-nearest", "nearest"))
        if self.score_layer is not None:
            require_int("score_layer", self.score_layer, 0)
            if self.score_layer >= self.layer:
                raise ValueError(
                    f"`score_layer={self.score_layer}` runs after tokens are cut before layer "
                    f"{self.layer}; use at most {self.layer - 1}."
                )
        _ = self.history

    @property
    def semantic_rows(self) -> SemanticRows | None:
        """Every prefill query votes."""
        return "all"

    @property
    def history(self) -> HistorySpec | None:
        """The decaying window, or the moving average."""
        return HistorySpec(
            kind=self.smoothing,
            window=self.window,
            gamma=self.gamma,
            alpha=self.alpha,
            layers=self.action_layers,
        )

    @property
    def warmup(self) -> int:
        """As many steps as the window looks back on."""
        return self.window

    def semantic_layer(self, cut: int) -> int:
        """`score_layer`, or the last layer before the cut."""
        return cut - 1 if self.score_layer is None else self.score_layer

    def choose(
        self,
        features: Tensor,
        semantic: Tensor | None,
        forecast: Tensor | None,
        k: int,
        *,
        valid: Tensor | None = None,
        seeds: Tensor | None = None,
    ) -> Tensor:
        """Algorithm 2: `[B, k]`, ascending."""
        assert semantic is not None
        return combine_then_filter(features, semantic, forecast, k, first=self.first, valid=valid)
