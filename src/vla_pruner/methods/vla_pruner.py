"""VLA-Pruner: what the prompt looks at, joined with what the last actions looked at."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

from torch import Tensor

from vla_pruner.methods.base import Evidence, OneCut, SemanticRows, StepContext
from vla_pruner.pruning.coverage import shares
from vla_pruner.pruning.history import Censored, HistorySpec
from vla_pruner.pruning.options import require_choice, require_int
from vla_pruner.pruning.selection import combine, top_k


@dataclass(frozen=True, kw_only=True)
class VLAPruner(OneCut):
    """Dual-level pruning as the paper describes it (section 4.2, Algorithms 1 and 2).

    The semantic score is the mean attention of all prefill queries (Eq. 2), the action score a
    forecast from the action attention of the last steps (Eq. 7). The k best tokens of each are
    pooled, and a greedy max-min search keeps the k least redundant of the pool. The first `window`
    steps of an episode run on all tokens.

    The defaults are the paper's. Cut tokens get no action attention, so that the forecast then only
    names what was kept in the last `window` steps; `censored="carry"` and `refresh` are remedies.

    Args:
        window: past steps that the forecast looks back on, and steps that run unpruned.
        gamma: decay rate of the window, in [0, 1].
        smoothing: "window" (Eq. 7) or "ema" (Eq. 6).
        alpha: weight of the newest step in (0, 1], for "ema" alone.
        action_layers: layers whose action attention is averaged: "latter-half" or indices.
        first: first token of the search: "second-nearest" (the paper) or "nearest".
        score_layer: layer of the semantic score; None: the last one before the cut.
        censored: what is remembered of cut tokens, "zero" (the paper) or "carry"; `HistorySpec`.
        refresh: every so many steps one runs on all tokens, at least 2; None: never.
        levels: "both", or ablations: "prefill", the k best tokens of the semantic score, or
            "action", those of the forecast. The first `window` steps run on all tokens in either.
        fusion: ablation: weight of the semantic score in [0, 1]; the k best tokens by
            `fusion * S_vl / sum(S_vl) + (1 - fusion) * S_hat / sum(S_hat)` stay, and nothing else
            is filtered. Sums are over the tokens among which is chosen (a camera's if the budget is
            per view). None: pool and filter.

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
    censored: Censored = "zero"
    refresh: int | None = None
    levels: Literal["both", "prefill", "action"] = "both"
    fusion: float | None = None

    def __post_init__(self) -> None:
        require_choice("levels", self.levels, ("both", "prefill", "action"))
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
        _ = self._memory
        if self.refresh is not None:
            require_int("refresh", self.refresh, 2)
        if self.fusion is not None and not 0.0 <= self.fusion <= 1.0:
            raise ValueError(f"`fusion={self.fusion}` must lie in [0, 1].")
        if self.fusion is not None and self.levels != "both":
            raise ValueError(
                f'`fusion={self.fusion}` weighs two scores and `levels="{self.levels}"` has one; '
                "leave one of them out."
            )
        if self.censored != "zero" and self.levels == "prefill":
            raise ValueError(
                f"`censored={self.censored!r}` is about action scores, which "
                '`levels="prefill"` does without; leave one of them out.'
            )

    @property
    def semantic_rows(self) -> SemanticRows | None:
        """Every prefill query votes, if anything asks for the semantic score."""
        return None if self.levels == "action" else "all"

    @property
    def history(self) -> HistorySpec | None:
        """The decaying window, or the moving average."""
        return None if self.levels == "prefill" else self._memory

    @cached_property
    def _memory(self) -> HistorySpec:
        return HistorySpec(
            kind=self.smoothing,
            window=self.window,
            gamma=self.gamma,
            alpha=self.alpha,
            layers=self.action_layers,
            censored=self.censored,
        )

    @property
    def warmup(self) -> int:
        """As many steps as the window looks back on."""
        return self.window

    def full_step(self, context: StepContext) -> bool:
        """Warm-up, or a refresh that is due."""
        due = self.refresh is not None and context.since_full >= self.refresh - 1
        return context.step < self.window or due

    def semantic_layer(self, cut: int) -> int:
        """`score_layer`, or the last layer before the cut."""
        return cut - 1 if self.score_layer is None else self.score_layer

    def choose(self, evidence: Evidence, k: int) -> Tensor:
        """Algorithm 2, or the ablation that `levels` or `fusion` names: `[B, k]`, ascending."""
        if self.levels != "both" or self.fusion is not None:
            return self._ablated(evidence, k)
        semantic, forecast, valid = evidence.semantic, evidence.forecast, evidence.valid
        assert semantic is not None and forecast is not None
        return combine(evidence.features, semantic, forecast, k, self.first, valid)

    def _ablated(self, evidence: Evidence, k: int) -> Tensor:
        """What `levels` or `fusion` names."""
        semantic, forecast, valid = evidence.semantic, evidence.forecast, evidence.valid
        if self.levels != "both":
            score = forecast if self.levels == "action" else semantic
            assert score is not None
            return top_k(score, k, valid=valid)
        assert semantic is not None and forecast is not None and self.fusion is not None
        own, other = shares(semantic, valid), shares(forecast, valid)
        return top_k(self.fusion * own + (1 - self.fusion) * other, k, valid=valid)
