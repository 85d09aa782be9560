"""PACT: as many visual tokens as it takes to cover prompt and action attention."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vla_pruner.methods.base import Evidence, OneCut, SemanticRows
from vla_pruner.pruning.coverage import conflict, covering_level, shares
from vla_pruner.pruning.history import Count, HistorySpec
from vla_pruner.pruning.options import require_int
from vla_pruner.pruning.selection import top_k


@dataclass(frozen=True, kw_only=True)
class PACT(OneCut):
    """Keep the smallest of a few budgets whose tokens hold enough of two scores.

    Over the n visual tokens, with S the attention of the action queries in past steps, newest
    first:

        p      = normalise(prefill score + 1e-8)               sums to 1
        a      = normalise(sum_i gamma^i normalise(S^{t-i}))   p if nothing was observed yet
        theta  = clip(base + slope JSD(p, a) / ln 2, low, high)
        kept_B = the B tokens with the largest max(p_i, a_i)
        B      = the first of `levels` with min(sum p, sum a over kept_B) >= theta

    Taking the B largest of the union of both top B, as the source says it, gives the same tokens: a
    token among the B largest by max(p, a) is among the B largest of p or of a.

    How many tokens stay depends on what is seen. Rows of a batch share the largest B, so that run
    alone a row may keep fewer; such a method cannot be compiled.

    Args:
        keep: the most that may stay; levels above it are cut off there.
        levels: budgets to try, as fractions of n in (0, 1), rounded up; `keep` is the last.
        base, slope: share to be covered, and how much more of it the two scores' conflict asks for.
        bounds: low and high, in [0, 1].
        window, gamma: observations that a looks back on, and their decay.
        action_layers: layers of the action attention: "middle", "latter-half" or indices.

    Reference: the repository "pact-vla-pruner", an overlay on VLA-Pruner's code; no paper.

    Differences: the source computes one budget for all cameras together, and so do we; it counts on
    the layers of its base, where index 15 of 32 is "middle". That it runs unpruned until something
    was observed is not said, and we do not: a = p until then.
    """

    name: ClassVar[str] = "pact"
    summary: ClassVar[str] = "the smallest budget that covers both scores"
    paper: ClassVar[str | None] = "https://github.com/yangmu-0/pact-vla-pruner"
    licence: ClassVar[str] = "Apache-2.0 (public code: no licence, not used)"
    adaptive: ClassVar[bool] = True

    keep: float | int = 1.0

    levels: tuple[float, ...] = (0.125, 0.25, 0.5, 0.75)
    base: float = 0.4
    slope: float = 0.1
    bounds: tuple[float, float] = (0.15, 0.7)
    window: int = 3
    gamma: float = 0.8
    action_layers: Literal["latter-half", "middle"] | tuple[int, ...] = "middle"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget != "global":
            raise ValueError(
                f'`budget="{self.budget}"`: one budget is found for all cameras together; use '
                'budget="global".'
            )
        object.__setattr__(self, "levels", tuple(self.levels))
        object.__setattr__(self, "bounds", tuple(self.bounds))
        if any(not 0.0 < level < 1.0 for level in self.levels) or sorted(set(self.levels)) != list(
            self.levels
        ):
            raise ValueError(f"`levels={self.levels}` must ascend within (0, 1).")
        if len(self.bounds) != 2 or not 0.0 <= self.bounds[0] <= self.bounds[1] <= 1.0:
            raise ValueError(f"`bounds={self.bounds}` must be two numbers that ascend in [0, 1].")
        for name in ("base", "slope"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"`{name}={getattr(self, name)}` must be a finite number.")
        require_int("window", self.window, 1)
        if not isinstance(self.action_layers, str):
            object.__setattr__(self, "action_layers", tuple(self.action_layers))
        _ = self.history

    @property
    def semantic_rows(self) -> SemanticRows | None:
        """Every prefill query votes."""
        return "all"

    @property
    def history(self) -> HistorySpec | None:
        """A decaying window over steps that weigh the same."""
        return _Normalised(window=self.window, gamma=self.gamma, layers=self.action_layers)

    def select(self, evidence: Evidence) -> Tensor:
        """As many tokens as cover both scores in every row: `[B, k]`, ascending."""
        evidence.check(self.name, "semantic", "forecast")
        size = evidence.features.shape[1]
        most = self.kept(evidence.views) if evidence.keep_count is None else evidence.keep_count
        p, a = self._scores(evidence.semantic, evidence.forecast, evidence.valid)
        # Rounding must not make ceil() of 0.1 * 10 an 11th token.
        counts = [min(math.ceil(level * size - 1e-9), most) for level in self.levels]
        counts = sorted({*counts, most})
        theta = (self.base + self.slope * conflict(p, a)).clamp(*self.bounds)
        level = covering_level(p, a, counts, theta)
        return top_k(torch.maximum(p, a), counts[int(level.max())], valid=evidence.valid)

    def _scores(
        self, semantic: Tensor | None, forecast: Tensor | None, valid: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """p and a, `[B, n]`."""
        assert semantic is not None and forecast is not None
        p = shares(semantic.float() + 1e-8, valid)
        a = shares(forecast, valid)
        return p, torch.where(a.sum(dim=1, keepdim=True) > 0, a, p)


@dataclass(frozen=True, kw_only=True)
class _Normalised(HistorySpec):
    """Every step's action score is remembered as shares that sum to 1."""

    def update(
        self, history: Tensor, count: Count, observed: Tensor, kept: Tensor | None = None
    ) -> tuple[Tensor, Count]:
        return super().update(history, count, shares(observed), kept)
