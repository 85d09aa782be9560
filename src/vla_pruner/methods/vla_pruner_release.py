"""VLA-Pruner as its public release computes it, for those who compare with its numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from vla_pruner.methods.base import Evidence, OneCut, SemanticRows
from vla_pruner.pruning.budget import Budget
from vla_pruner.pruning.history import HistorySpec
from vla_pruner.pruning.options import require_choice, require_int
from vla_pruner.pruning.selection import combine_then_filter


@dataclass(frozen=True, kw_only=True)
class VLAPrunerRelease(OneCut):
    """The public release (OpenVLA branch, commit fa5bfed), where it differs from the paper.

    Action attention comes from one layer, index 15 of 32, instead of the latter half; the weights
    of the window are turned round, so that the oldest step weighs most; the first token of the
    search is the one whose nearest other token is farthest; and the budget is computed from the
    ratio that is pruned. The release runs its search in bf16 and this preset in fp32.

    Args:
        semantic: "prefill", the mean over all prefill queries, or "last", the last query alone
            (what the release does unless told otherwise).
        window: past steps that the forecast looks back on, and steps that run unpruned.
        gamma: decay rate of the window, in [0, 1].
        action_layer: layer of the action attention; None: the last layer of the first half, which
            is 15 in a decoder of 32 layers.
    """

    name: ClassVar[str] = "vla-pruner-release"
    summary: ClassVar[str] = "VLA-Pruner as its public code computes it"
    paper: ClassVar[str | None] = "https://arxiv.org/abs/2511.16449"

    semantic: Literal["prefill", "last"] = "prefill"

    window: int = 3
    gamma: float = 0.8
    action_layer: int | None = None

    def __post_init__(self) -> None:
        require_choice("semantic", self.semantic, ("prefill", "last"))
        if self.action_layer is not None:
            require_int("action_layer", self.action_layer, 0)
        super().__post_init__()
        _ = self.history

    @property
    def semantic_rows(self) -> SemanticRows | None:
        """All queries, or the last one."""
        return "all" if self.semantic == "prefill" else "last"

    @property
    def history(self) -> HistorySpec | None:
        """The window with its weights turned round, over one layer."""
        return HistorySpec(
            window=self.window,
            gamma=self.gamma,
            newest_heaviest=False,
            layers="middle" if self.action_layer is None else (self.action_layer,),
        )

    @property
    def warmup(self) -> int:
        """As many steps as the window looks back on."""
        return self.window

    def choose(self, evidence: Evidence, k: int) -> Tensor:
        """Algorithm 2 with the release's first token: `[B, k]`, ascending."""
        assert evidence.semantic is not None
        return combine_then_filter(
            evidence.features,
            evidence.semantic,
            evidence.forecast,
            k,
            first="nearest",
            valid=evidence.valid,
        )

    def _resolve(self, views: tuple[int, ...]) -> tuple[int, ...]:
        keep = 1 - (1 - self.keep) if isinstance(self.keep, float) else self.keep
        return Budget(keep, self.budget).resolve(views)
