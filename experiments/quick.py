"""Rules that were tried against VLA-Pruner; see results/log.md, and search.py for the comparison.

    python experiments/search.py search "quick:Quick(keep=0.25)"

No name of the registry: what is in here is what was not good enough, or has not been shown to be.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vla_pruner.baselines.correspondence import correspondence
from vla_pruner.baselines.determinant import most_determinant
from vla_pruner.methods import Evidence, HistorySpec, Method, ScoreSpec
from vla_pruner.pruning.coverage import shares
from vla_pruner.pruning.selection import combine_then_filter, top_k
from vla_pruner.temporal.method import Memory, Now, Remembering, Seen


@dataclass(frozen=True, kw_only=True)
class Quick(Remembering, Method):
    """One cut or several, by what action queries look at, with a forecast that may follow likeness.

    Before each of `layers`, with a and s the attention of the action queries and of all rows in the
    `early` layers before, as shares, and f what deep layers of the last call's action looked at:

        q = (1 - past) ((1 - every) a + every s) + past f

    Args:
        keep: what one cut before the first of `layers` would keep, at about the same cost.
        layers: before which tokens are cut.
        left: of `keep`, for each cut.
        rule: "determinant", of the cosines of hidden states, weighed by q; "top", the largest q;
            "pool", the k best of s and of q without s, then the max-min search on hidden states;
            "pool-determinant", the same pool, then the determinant of hidden states.
        every: weight of s beside a, in [0, 1].
        early: layers before a cut whose attention is averaged.
        past: weight of f, in [0, 1]; 0: nothing is remembered.
        by: how f gets from a token of then to one of now: by its "place", or by the "likeness" of
            embeddings. Tokens that were cut carry what was expected of them.
        dense: whether the first call of an episode runs on all tokens.
        power: of q, where a determinant weighs it.
    """

    name: ClassVar[str] = "quick"
    summary: ClassVar[str] = "what this call's action looks at, and the last one's"

    layers: tuple[int, ...] = (3, 5)
    left: tuple[float, ...] = (1.4, 0.72)
    rule: Literal["determinant", "pool", "pool-determinant", "top"] = "determinant"
    every: float = 0.5
    early: int = 1
    past: float = 0.0
    by: Literal["place", "likeness"] = "place"
    dense: bool = False
    power: float = 1.0

    def cuts(self, num_layers: int) -> tuple[int, ...]:
        """`layers`."""
        return self.layers

    def schedule(self, views: tuple[int, ...], num_layers: int) -> tuple[int, ...]:
        """`left` times the budget."""
        kept = self.kept(views)
        return tuple(min(sum(views), max(1, round(share * kept))) for share in self.left)

    @property
    def warmup(self) -> int:
        """The first call, if it is dense."""
        return int(self.dense)

    def scores(self, cut: int) -> Mapping[str, ScoreSpec]:
        """a and s of each early layer."""
        return {
            f"{rows}{layer}": ScoreSpec(layer=layer, rows=rows)
            for layer in range(max(0, cut - self.early), cut)
            for rows in ("action", "all")
        }

    @property
    def history(self) -> HistorySpec | None:
        """Which layers' action attention is watched."""
        return HistorySpec(window=1) if self.past else None

    def starts_full(self, memory: Memory | None) -> bool:
        """The first call, if it is dense."""
        return self.dense and memory is None

    def expect(self, now: Now) -> Mapping[str, Tensor]:
        """f, and whether there is one: `[B, M]`."""
        blank = torch.zeros_like(now.features[..., 0], dtype=torch.float32)
        if not now.memory:
            return {"past": blank, "known": blank}
        then = now.memory["action"]
        if self.by == "likeness":
            then = then.gather(1, correspondence(now.features, now.memory["features"], now.views))
        return {"past": then, "known": blank + now.known[:, None]}

    def remember(self, seen: Seen) -> Memory:
        """What the action looked at; what was cut is worth what was expected of it."""
        if seen.action is None:
            return {}
        action = seen.action.float().clone()
        if seen.expected:
            action = torch.where(action > 0, action, seen.expected["past"])
        return {"action": action, "features": seen.features.clone()}

    def select(self, evidence: Evidence) -> Tensor:
        """The tokens of a cut: `[B, k]`, ascending."""
        k, valid, hidden = evidence.keep_count, evidence.valid, evidence.hidden
        assert k is not None and hidden is not None
        acting, every = (
            torch.stack(
                [shares(s, valid) for n, s in evidence.scores.items() if n.startswith(rows)]
            ).mean(dim=0)
            for rows in ("action", "all")
        )
        score = (1 - self.every) * acting + self.every * every
        own = acting
        if self.past:
            past = shares(evidence.scores["past"], valid)
            weight = self.past * evidence.scores["known"]
            score = (1 - weight) * score + weight * past
            own = (1 - weight) * acting + weight * past
        if self.rule == "top" or k == score.shape[1]:
            return top_k(score, k, valid=valid)
        if self.rule == "pool":
            return combine_then_filter(hidden, every, own, k, valid=valid)
        if self.rule == "pool-determinant":
            pool = torch.zeros_like(score, dtype=torch.bool)
            for one in (every, own):
                pool = pool.scatter(1, top_k(one, k, valid=valid), True)
            valid, score = pool, torch.ones_like(score)
        return most_determinant(hidden, k, quality=score**self.power, valid=valid)
