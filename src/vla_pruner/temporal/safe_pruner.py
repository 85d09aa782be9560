"""SAFE-Pruner: what actions look at in deep layers, forecast from a key step by correspondence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vla_pruner.baselines.correspondence import correspondence
from vla_pruner.methods.base import Evidence, OneCut, ScoreSpec
from vla_pruner.pruning.coverage import shares
from vla_pruner.pruning.history import HistorySpec
from vla_pruner.pruning.options import require_int
from vla_pruner.pruning.selection import top_k
from vla_pruner.temporal.method import Memory, Now, Remembering, Seen


@dataclass(frozen=True, kw_only=True)
class SAFEPruner(Remembering, OneCut):
    """Mix the shallow saliency of now with the deep one of a key step, carried over by likeness.

    A key step runs on all tokens and leaves its visual embeddings F and two saliencies of them, the
    action queries' mean attention in layer K-1 (`R`) and over the deep layers (`D`). At any other
    step, with f the embeddings, S the action queries' attention in layer K-1, and p(x) = x / sum x:

        c(i)  = argmax_j cos(f_i, F_j)              j in the same camera
        kappa = cos(S, R_c)                         R_c(i) = R(c(i))
        s     = (1 - mix) p(S) + mix p(D_c)         the k best by s stay before layer K

    If kappa < `gamma` the scene is another one: this step keeps all tokens and is the next key
    step. The first step of an episode is one.

    How many tokens stay depends on what is seen: k, or all. A row of a batch whose neighbour keeps
    all does so, too, without becoming a key step.

    Args:
        mix: weight of the forecast, in [0, 1].
        gamma: least cosine of expected and seen shallow saliency; at most -1: never refreshed by
            it, above 1: every step is a key step.
        refresh: steps after which a key step is due in any case, at least 1; None: never.
        deep: layers of the forecast saliency: "latter-half", or indices.

    Reference: "SAFE-Pruner", arXiv 2605.29662, ECCV 2026; no public code was found, and only its
    abstract and a summary were at hand.

    Differences: what the sources leave open is our specification: embeddings as they enter layer 0
    are compared, each camera by itself; saliencies are divided by their sums before they are mixed;
    the values of `mix`, `gamma`, K and `deep`, and `refresh`. A model whose actions are not in the
    prefill (OpenVLA, pi0) has no action queries there: the last row of the prefill stands for them
    in layer K-1; the deep saliency is always that of the actions.
    """

    name: ClassVar[str] = "safe-pruner"
    summary: ClassVar[str] = "deep action attention, forecast from a key step"
    paper: ClassVar[str | None] = "https://arxiv.org/abs/2605.29662"
    licence: ClassVar[str] = "Apache-2.0 (no public code)"
    adaptive: ClassVar[bool] = True

    mix: float = 0.5
    gamma: float = 0.5
    refresh: int | None = None
    deep: Literal["latter-half"] | tuple[int, ...] = "latter-half"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_int("layer", self.layer, 1)
        if not 0.0 <= self.mix <= 1.0:
            raise ValueError(f"`mix={self.mix}` must lie in [0, 1].")
        if not -float("inf") < self.gamma < float("inf"):
            raise ValueError(f"`gamma={self.gamma}` must be a finite number, compared to a cosine.")
        if self.refresh is not None:
            require_int("refresh", self.refresh, 1)
        if not isinstance(self.deep, str):
            object.__setattr__(self, "deep", tuple(self.deep))
        _ = self.history

    @property
    def warmup(self) -> int:
        """The first step of an episode is a key step."""
        return 1

    @property
    def history(self) -> HistorySpec | None:
        """Which layers' action attention is watched; the forecast made of it is not used."""
        return HistorySpec(window=1, layers=self.deep)

    def scores(self, cut: int) -> Mapping[str, ScoreSpec]:
        """Attention of the action queries, or the last row, in the layer before the cut."""
        return {"shallow": ScoreSpec(layer=cut - 1, rows="action")}

    def starts_full(self, memory: Memory | None) -> bool:
        """Without a key step, or with one that is too old."""
        return memory is None or (self.refresh is not None and int(memory["age"]) >= self.refresh)

    def expect(self, now: Now) -> Mapping[str, Tensor]:
        """R_c, D_c, and where kappa is too small: all `[B, M]`."""
        shallow = now.scores["shallow"]
        if not now.memory:
            return {"forecast": shallow, "refresh": torch.zeros_like(shallow)}
        like = correspondence(now.features, now.memory["features"], now.views)
        forecast = now.memory["deep"].gather(1, like)
        expected = now.memory["shallow"].gather(1, like)
        if now.valid is not None:
            shallow, expected = shallow * now.valid, expected * now.valid
        kappa = torch.cosine_similarity(shallow, expected, dim=1)
        other = (kappa < self.gamma) & now.known
        return {"forecast": forecast, "refresh": other[:, None].expand_as(shallow).float()}

    def select(self, evidence: Evidence) -> Tensor:
        """k tokens, or all of them in a new scene: `[B, k]`, ascending."""
        evidence.check(self.name)
        batch, size = evidence.features.shape[:2]
        if size and bool(evidence.scores["refresh"].any()):
            return torch.arange(size, device=evidence.features.device).expand(batch, -1)
        return self.by_view(evidence, self.choose)

    def choose(self, evidence: Evidence, k: int) -> Tensor:
        """The k best by the mixed saliency."""
        valid = evidence.valid
        now = shares(evidence.scores["shallow"], valid)
        forecast = shares(evidence.scores["forecast"], valid)
        return top_k((1 - self.mix) * now + self.mix * forecast, k, valid=valid)

    def remember(self, seen: Seen) -> Memory:
        """A key step replaces the memory, another one makes it older."""
        key = not seen.expected or bool(seen.expected["refresh"].any())
        if not key and seen.memory is not None:
            return {**seen.memory, "age": seen.memory["age"] + 1}
        assert seen.action is not None
        return {
            "features": seen.features.clone(),
            "shallow": seen.scores["shallow"].float().clone(),
            "deep": seen.action.float().clone(),
            "age": torch.ones((), dtype=torch.int64),
        }
