"""Rules without dense calls that were tried against VLA-Pruner; see results/log.md, 2026-11-30.

    python experiments/deviation.py mini-oft 6 OUT.csv "quick:Quick(keep=0.25)"

No name of the registry: on recorded observations none of them beat VLA-Pruner.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from vla_pruner.baselines.determinant import most_determinant
from vla_pruner.methods import Evidence, HistorySpec, Method, ScoreSpec
from vla_pruner.pruning.coverage import shares
from vla_pruner.pruning.selection import combine_then_filter, top_k


@dataclass(frozen=True, kw_only=True)
class Quick(Method):
    """Two cuts by what the action queries of this very call look at; no call runs on all tokens.

    Before each of `layers`, with a and s the attention of the action queries and of all rows in the
    layer before, as shares, and f the forecast from past calls in which cut tokens carry on:

        q = (1 - past) (a + s) / 2 + past f

    Args:
        keep: what one cut before the first of `layers` would keep, at about the same cost.
        layers: before which tokens are cut.
        left: of `keep`, for each cut.
        rule: "determinant", of the cosines of hidden states, weighed by q; "pool", VLA-Pruner's on
            hidden states; "top", the largest q.
        past: weight of f, in [0, 1]; 0: nothing is remembered.
    """

    name: ClassVar[str] = "quick"
    summary: ClassVar[str] = "two cuts by what this call's action looks at"

    layers: tuple[int, ...] = (3, 5)
    left: tuple[float, ...] = (1.4, 0.72)
    rule: Literal["determinant", "pool", "top"] = "determinant"
    past: float = 0.0

    def cuts(self, num_layers: int) -> tuple[int, ...]:
        """`layers`."""
        return self.layers

    def schedule(self, views: tuple[int, ...], num_layers: int) -> tuple[int, ...]:
        """`left` times the budget."""
        kept = self.kept(views)
        return tuple(min(sum(views), max(1, round(share * kept))) for share in self.left)

    def scores(self, cut: int) -> Mapping[str, ScoreSpec]:
        """a and s."""
        return {
            "acting": ScoreSpec(layer=cut - 1, rows="action"),
            "all": ScoreSpec(layer=cut - 1, rows="all"),
        }

    @property
    def history(self) -> HistorySpec | None:
        """A moving average in which tokens that were cut carry on."""
        return HistorySpec(kind="window", window=1, censored="carry") if self.past else None

    def select(self, evidence: Evidence) -> Tensor:
        """The tokens of a cut: `[B, k]`, ascending."""
        k, valid = evidence.keep_count, evidence.valid
        assert k is not None and evidence.hidden is not None
        acting = shares(evidence.scores["acting"], valid)
        every = shares(evidence.scores["all"], valid)
        score = (acting + every) / 2
        if evidence.forecast is not None:
            score = (1 - self.past) * score + self.past * shares(evidence.forecast, valid)
        if self.rule == "top" or k == score.shape[1]:
            return top_k(score, k, valid=valid)
        if self.rule == "pool":
            return combine_then_filter(evidence.hidden, every, acting, k, valid=valid)
        return most_determinant(evidence.hidden, k, quality=score, valid=valid)
