"""TEAM-VLA: tokens around what the words resemble, some context, and a merge half-way."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vla_pruner.baselines.determinant import text_likeness
from vla_pruner.baselines.grid import count_around, dilate, grids
from vla_pruner.baselines.merging import merge_into
from vla_pruner.methods.base import Choice, Evidence, Method
from vla_pruner.pruning.hashed_uniform import hashed_uniform, no_seeds
from vla_pruner.pruning.options import require_int
from vla_pruner.pruning.selection import top_k


@dataclass(frozen=True, kw_only=True)
class TEAMVLA(Method):
    """Two stages. Before layer K, tokens are sampled and their neighbourhoods expanded:

        B = for each word j the token it resembles most: argmax_i cos(v_i, t_j), v and t as they
            enter layer 0
        F = how many of the 3 x 3 cells around a token are in B, each camera by itself
        E = B, the 3 x 3 cells around every token with F > tau, and of the cells around those with
            0 < F <= tau a random half (`chance`)
        C = of the n tokens outside of E, max(1, floor(context n)) at random, without replacement,
            each with a probability in proportion to exp(10 max_j cos(v_i, t_j))

    E and C stay. Before the layer in the middle the k = round(keep M) tokens stay that resemble the
    task most, by the hidden states h that reach it, and take in the others. With j the words and,
    where the prefill holds them, the action queries, and R(x) = x / rms(x):

        g_i     = max_j cos(h_i, h_j)                                    the k largest stay
        W[t, s] = softmax over the kept s of R(h_t) . R(h_s) / sqrt(d)
        h_s     becomes (h_s + sum_t W[t, s] h_t) / (1 + sum_t W[t, s])

    How many tokens E and C are depends on what is seen; their number is rounded up to the next of
    `levels` by further draws of C. Rows of a batch share the largest.

    Args:
        keep: fraction or number of visual tokens behind the merge.
        budget: "global" alone.
        layer: K; 0 samples before the decoder, as the source does.
        merge_layer: the layer in the middle; None: half of the decoder's depth.
        tau: density above which a neighbourhood is added whole, at least 0.
        chance: that a cell around a sparse one is added, in [0, 1].
        context: share of the other tokens, in [0, 1].
        levels: numbers of tokens behind the first cut, as fractions of M in (0, 1), rounded up;
            all tokens are the last. None is below k.
        columns: visual tokens in a row of a camera's grid; None: the grids are square.
        seed: of the random numbers, beside episode and step.

    Reference: "TEAM-VLA", arXiv 2512.09927, RA-L 2026. Its code was not to be had; this follows the
    abstract, a review and a third party's port, whose constants are the defaults.

    Differences: `keep` behind the merge is ours (the port keeps 80 tokens), and so are `levels`,
    random numbers that depend on episode and step alone, and that one word has one anchor among all
    cameras (the port takes three). A merged token keeps the position of the kept one.
    """

    name: ClassVar[str] = "team-vla"
    summary: ClassVar[str] = "around what words resemble; merged half-way"
    paper: ClassVar[str | None] = "https://arxiv.org/abs/2512.09927"
    licence: ClassVar[str] = "Apache-2.0 (no public code)"
    adaptive: ClassVar[bool] = True
    sees_hidden: ClassVar[bool] = True

    layer: int = 0
    merge_layer: int | None = None

    tau: float = 1.0
    chance: float = 0.5
    context: float = 0.1
    levels: tuple[float, ...] = (0.25, 0.375, 0.5, 0.75)
    columns: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget != "global":
            raise ValueError(
                f'`budget="{self.budget}"`: tokens of all cameras are sampled together; use '
                'budget="global".'
            )
        require_int("layer", self.layer, 0)
        if self.merge_layer is not None:
            require_int("merge_layer", self.merge_layer, self.layer + 1)
        if not self.tau >= 0:
            raise ValueError(f"`tau={self.tau}` must be at least 0.")
        for name in ("chance", "context"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"`{name}={getattr(self, name)}` must lie in [0, 1].")
        object.__setattr__(self, "levels", tuple(self.levels))
        if any(not 0.0 < level < 1.0 for level in self.levels) or sorted(set(self.levels)) != list(
            self.levels
        ):
            raise ValueError(f"`levels={self.levels}` must ascend within (0, 1).")
        if self.columns is not None:
            require_int("columns", self.columns, 1)
        require_int("seed", self.seed, 0)

    @property
    def needs(self) -> tuple[str, ...]:
        """The rows of the instruction."""
        return ("text",)

    def cuts(self, num_layers: int) -> tuple[int, ...]:
        """`layer`, and the layer of the merge.

        Raises:
            ValueError: a layer that the decoder does not have, or no layer between the two.
        """
        middle = num_layers // 2 if self.merge_layer is None else self.merge_layer
        if not self.layer < middle < num_layers:
            raise ValueError(
                f"tokens are sampled before layer {self.layer} and merged before layer {middle}, "
                f"but the decoder has layers 0..{num_layers - 1}; use `layer` < `merge_layer` "
                "within these."
            )
        return (self.layer, middle)

    def schedule(self, views: tuple[int, ...], num_layers: int) -> tuple[int, ...]:
        """At most all tokens, then k."""
        return (sum(views), self.kept(views))

    def select(self, evidence: Evidence) -> Tensor | Choice:
        """E and C, `[B, n]`; or the tokens that stay, which take in the others."""
        evidence.check(self.name)
        return self._sampled(evidence) if evidence.number == 0 else self._merged(evidence)

    def _sampled(self, evidence: Evidence) -> Tensor:
        text, features, valid = evidence.text, evidence.features, evidence.valid
        if text is None:
            raise ValueError("method 'team-vla' compares with the instruction; got no text.")
        batch, m = features.shape[:2]
        shapes = grids(evidence.views, self.columns)
        seeds = evidence.seeds
        seeds = no_seeds(batch, features.device) if seeds is None else seeds
        places = torch.arange(m, device=features.device)
        expanded = self._expanded(evidence, shapes, hashed_uniform(seeds, places, 2 * self.seed))
        there = torch.ones_like(expanded) if valid is None else valid
        outside = (there & ~expanded).sum(dim=1)
        drawn = (self.context * outside + 1e-6).long().clamp_min(1).minimum(outside)
        wanted = int((expanded.sum(dim=1) + drawn).max())
        counts = [math.ceil(level * m - 1e-9) for level in self.levels]
        least = self.kept(evidence.views)
        count = min(n for n in {*(max(n, least) for n in counts), m} if n >= wanted)
        uniform = hashed_uniform(seeds, places, 2 * self.seed + 1).clamp(2.0**-25, 1 - 2.0**-24)
        # The largest of logit + Gumbel noise are a draw without replacement by softmax(logit).
        likeness = text_likeness(features, text, evidence.text_valid, pool="max")
        order = 10 * likeness - (-uniform.log()).log()
        return top_k(torch.where(expanded, 1e6, order), count, valid=valid)

    def _expanded(
        self, evidence: Evidence, shapes: tuple[tuple[int, int], ...], uniform: Tensor
    ) -> Tensor:
        """E, bool `[B, M]`."""
        assert evidence.text is not None
        anchors = closest(evidence.features, evidence.text, evidence.text_valid, evidence.valid)
        density = count_around(anchors, shapes)
        dense, sparse = density > self.tau, (density > 0) & (density <= self.tau)
        found = anchors | dilate(dense, shapes)
        found = found | (dilate(sparse, shapes) & (uniform < self.chance))
        return found if evidence.valid is None else found & evidence.valid

    def _merged(self, evidence: Evidence) -> Tensor | Choice:
        hidden, guides, k = evidence.hidden, evidence.guides, evidence.keep_count
        if hidden is None or guides is None or k is None:
            raise ValueError("method 'team-vla' merges hidden states by guides; got None.")
        batch, m = hidden.shape[:2]
        if k >= m:
            return torch.arange(m, device=hidden.device).expand(batch, -1)
        likeness = text_likeness(hidden, guides, evidence.guides_valid, pool="max")
        kept = top_k(likeness, k, valid=evidence.valid)
        return Choice(kept, merge_into(hidden, kept, evidence.valid))


def closest(
    features: Tensor, text: Tensor, text_valid: Tensor | None, valid: Tensor | None
) -> Tensor:
    """The tokens that some word resembles most, bool `[B, M]`.

    Args:
        features: `[B, M, D]`.
        text: `[B, T, D]`.
        text_valid: `[B, T]` bool, False for padding.
        valid: `[B, M]` bool, False for tokens that no word may choose.
    """
    with torch.autocast(features.device.type, enabled=False):
        visual = torch.nn.functional.normalize(features.float(), dim=-1)
        words = torch.nn.functional.normalize(text.float(), dim=-1)
        cosine = words @ visual.transpose(1, 2)  # [B, T, M]
    if valid is not None:
        cosine = cosine.masked_fill(~valid[:, None], -2.0)
    chosen = torch.zeros_like(cosine, dtype=torch.bool)
    chosen = chosen.scatter(2, cosine.argmax(dim=2, keepdim=True), True)
    if text_valid is not None:
        chosen = chosen & text_valid[..., None]
    return chosen.any(dim=1) if valid is None else chosen.any(dim=1) & valid
