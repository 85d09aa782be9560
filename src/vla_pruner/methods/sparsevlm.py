"""SparseVLM: words that concern the image rank its tokens, which leave in several stages."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vla_pruner.baselines.clustering import keep_and_recycle
from vla_pruner.baselines.query_weights import query_weights
from vla_pruner.methods.base import Choice, Evidence, Method, Positions, ScoreSpec
from vla_pruner.pruning.hashed_uniform import hashed_uniform, no_seeds
from vla_pruner.pruning.options import require_choice, require_int
from vla_pruner.pruning.schedule import cuts_in, stages_by_last, stages_by_total
from vla_pruner.pruning.selection import top_k

_SOURCE_LAYERS, _SOURCE_CUTS = 32, (3, 7, 16)
# Tokens left of 576, by the published schedules; nothing and everything at both ends.
_PUBLISHED = ((0, 0, 0), (66, 30, 17), (238, 48, 26), (303, 110, 36), (300, 200, 110), (576,) * 3)
_TABLE = tuple(tuple(Fraction(count, 576) for count in row) for row in _PUBLISHED)
_NOISE = 1e-6


@dataclass(frozen=True, kw_only=True)
class SparseVLM(Method):
    """Three cuts; raters among the words score, and pruned tokens are recycled (version 1.5).

    Raters: with E_v `[M, D]` and E_t `[T, D]` the embeddings of image and text as they enter layer
    0, word j is a rater if it is more similar to the image than the average word:

        Z = softmax over text of E_v E_t^T,   r_j = mean over v of Z[v, j],   R = {j : r_j > mean r}

    Score, at the cut before layer c, of the tokens m that are left, with A `[H, S, S]` the
    attention of layer c-1: `s_m = mean over j in R and heads h of A[h, j, m]`.

    Budget: n_s tokens are left after cut s. A table of the fractions that the source publishes for
    576 tokens ([300, 200, 110], [303, 110, 36], [238, 48, 26], [66, 30, 17]), with none and all
    added at its ends, is interpolated linearly. With cuts before layers c_1 < c_2 < c_3 of T:

        "average": c_1 M + (c_2 - c_1) n_1 + (c_3 - c_2) n_2 + (T - c_3) n_3 <= keep M T
        "behind":          (c_2 - c_1) n_1 + (c_3 - c_2) n_2 + (T - c_3) n_3 <= keep M (T - c_1)
        "final":   n_3 = round(keep M)

    as close to equality as whole tokens allow: every layer counts with the tokens that it computes,
    recycled ones included. "behind" costs as much as a method that cuts once before layer c_1.

    Recycling: of the n_s places, v keep the best tokens as they are. Of the p others the best
    `t = int(0.3 p) + 1` are clustered into `c = t // 10 + 1`, `v + c = n_s`, by density peaks in
    their hidden states (`pruning.clustering`), and the mean of a cluster takes the place of its
    centre.

    Args:
        keep: the budget, a fraction of M or a number of tokens; see `count`.
        count: what `keep` means: "average" over all T layers, the average over the layers "behind"
            the first cut, or the "final" count.
        layers: three layers before which tokens are cut, ascending; None: 3, 7 and 16 of 32, and
            the same relative depths elsewhere.
        recycle: share of the pruned tokens that is clustered, in [0, 1]; 0: none is recycled.
        group: tokens per cluster, at least 1.
        positions: "compact", survivors are renumbered as in version 1.5, or "keep".
        seed: of the noise that tells equally dense tokens apart.

    Reference: Zhang et al., "SparseVLM: Visual Token Sparsification for Efficient Vision-Language
    Model Inference", ICML 2025.

    Differences: the paper finds how many tokens leave from the rank of the attention (version 1.0);
    version 1.5 fixes the schedule, for 576 tokens and 32 layers, and counts the three scoring
    layers as if they were shortened already: what it calls 192 tokens is 202.75 here. Its schedule
    leaves the recycled tokens out of the count. It puts them behind the kept ones; here they stand
    where their centre stood. The tie noise comes from a seed instead of the global generator. If no
    word is above the average, all words rate. The head selection and the correction for positions
    of version 2.0 are left out.
    """

    name: ClassVar[str] = "sparsevlm"
    summary: ClassVar[str] = "image-related words score; three cuts; recycling"
    paper: ClassVar[str | None] = "https://arxiv.org/abs/2410.04417"
    licence: ClassVar[str] = "Apache-2.0 (public code: Apache-2.0)"
    sees_hidden: ClassVar[bool] = True

    count: Literal["average", "behind", "final"] = "average"
    layers: tuple[int, ...] | None = None

    recycle: float = 0.3
    group: int = 10
    positions: Positions = "compact"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("count", self.count, ("average", "behind", "final"))
        require_choice("positions", self.positions, ("keep", "compact"))
        require_int("group", self.group, 1)
        require_int("seed", self.seed, 0)
        if not 0.0 <= self.recycle <= 1.0:
            raise ValueError(f"`recycle={self.recycle}` must lie in [0, 1].")
        if self.layers is None:
            return
        object.__setattr__(self, "layers", tuple(self.layers))
        for layer in self.layers:
            require_int("layers", layer, 1)
        if len(self.layers) != len(_SOURCE_CUTS) or any(a >= b for a, b in pairwise(self.layers)):
            raise ValueError(f"`layers={self.layers}` must be three layers, ascending.")

    @property
    def needs(self) -> tuple[str, ...]:
        """The rows of the instruction."""
        return ("text",)

    def scores(self, cut: int) -> Mapping[str, ScoreSpec]:
        """Attention of the raters in the layer before the cut."""
        return {"semantic": ScoreSpec(layer=cut - 1, rows="weighted")}

    def query_weights(self, visual: Tensor, text: Tensor, text_valid: Tensor) -> Tensor:
        """1 for raters, 0 for other words: `[B, T]`."""
        return query_weights(visual, text, text_valid)

    def cuts(self, num_layers: int) -> tuple[int, ...]:
        """`layers`, or the source's at the same relative depth.

        Raises:
            ValueError: a decoder that is too shallow.
        """
        return cuts_in(self.layers, _SOURCE_CUTS, _SOURCE_LAYERS, num_layers)

    def kept(self, views: tuple[int, ...]) -> int:
        """Visual tokens left in the end, if `keep` says so.

        Raises:
            ValueError: they depend on the decoder's depth; ask `schedule`.
        """
        if self.count != "final":
            raise ValueError(
                f'with `count="{self.count}"` the tokens left in the end depend on the number of '
                "layers; ask `schedule`."
            )
        return super().kept(views)

    def schedule(self, views: tuple[int, ...], num_layers: int) -> tuple[int, ...]:
        """`(n_1, n_2, n_3)`.

        Raises:
            ValueError: a budget that the layers before the first cut use up.
        """
        visual, whole = sum(views), sum(self._resolve(views))
        if self.count == "final":
            return stages_by_last(_TABLE, visual, whole)
        cuts = self.cuts(num_layers)
        weights = [b - a for a, b in pairwise((*cuts, num_layers))]
        mean = Fraction(self.keep) * visual if isinstance(self.keep, float) else Fraction(whole)
        if self.count == "behind":
            return stages_by_total(_TABLE, weights, visual, _whole(mean * sum(weights)))
        total = _whole(mean * num_layers) - cuts[0] * visual
        least = Fraction(cuts[0] * visual + sum(weights), num_layers * visual)
        if total < sum(weights):
            raise ValueError(
                f"`keep={self.keep}` on average over {num_layers} layers: the {cuts[0]} before the "
                f"first cut see all {visual} visual tokens, and at least {float(least):.3f} is "
                'needed. Use a larger `keep`, or `count="behind"`, which counts the layers behind '
                "the first cut."
            )
        return stages_by_total(_TABLE, weights, visual, total)

    def select(self, evidence: Evidence) -> Tensor | Choice:
        """The best tokens and the recycled ones."""
        evidence.check(self.name, "semantic")
        if evidence.keep_count is None or evidence.semantic is None:
            raise ValueError("method 'sparsevlm' needs `keep_count` and the semantic score.")
        if self.recycle == 0:
            return self.by_view(evidence, _best)
        if evidence.hidden is None:
            raise ValueError("method 'sparsevlm' recycles hidden states; got None.")
        batch, m = evidence.semantic.shape
        noise = self._noise(evidence)
        counts = self.split(evidence.views, evidence.keep_count, evidence.number)
        spans = (m,) if self.budget == "global" else evidence.views
        kept, merge, start = [], [], 0
        for size, k in zip(spans, counts, strict=True):
            view = slice(start, start + size)
            if k:
                chosen, weights = keep_and_recycle(
                    evidence.semantic[:, view],
                    evidence.hidden[:, view],
                    k,
                    share=self.recycle,
                    group=self.group,
                    noise=noise[:, view],
                    valid=None if evidence.valid is None else evidence.valid[:, view],
                )
                rows = torch.zeros(batch, k, m, dtype=torch.float32, device=noise.device)
                if weights is None:
                    rows.scatter_(2, start + chosen[..., None], 1.0)
                else:
                    rows[:, :, view] = weights
                kept.append(start + chosen)
                merge.append(rows)
            start += size
        if sum(counts) == m:
            return kept[0] if len(kept) == 1 else torch.cat(kept, dim=1)
        return Choice(torch.cat(kept, dim=1), torch.cat(merge, dim=1))

    def _noise(self, evidence: Evidence) -> Tensor:
        """`[B, m]`, the same for a token at every step."""
        batch, m = evidence.features.shape[:2]
        device = evidence.features.device
        tokens = evidence.tokens
        if tokens is None:
            tokens = torch.arange(m, device=device)
        return _NOISE * hashed_uniform(no_seeds(batch, device), tokens, self.seed)


def _best(evidence: Evidence, k: int) -> Tensor:
    """The k tokens with the highest score: `[B, k]`, ascending."""
    assert evidence.semantic is not None
    return top_k(evidence.semantic, k, valid=evidence.valid)


def _whole(budget: Fraction) -> Fraction:
    """Rounded down; what is a whole number but for the rounding of `keep` counts as one."""
    return Fraction(math.floor(budget + Fraction(1, 10**6)))
