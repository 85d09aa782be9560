"""FitPrune: a calibrated number of visual tokens leaves before each layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from vla_pruner.methods.base import Evidence, ScoreSpec
from vla_pruner.methods.recipe import CalibratedMethod, Recipe
from vla_pruner.pruning.selection import top_k


@dataclass(frozen=True, kw_only=True)
class FitPrune(CalibratedMethod):
    """Drop, layer by layer, the tokens that neither the text nor the image looks at.

    A recipe says how many visual tokens each of the T layers sees. Behind layer l those stay whose
    product of two received attentions in layer l is largest. With A [H, S, S] that layer's
    attention and the maximum over heads taken first:

        cross_m = mean over text rows i   of max over h of A[h, i, m]      [m tokens that are left]
        self_m  = mean over visual rows i of max over h of A[h, i, m]
        score_m = cross_m * self_m

    `vla-pruner calibrate fitprune` makes the recipe: the smallest alpha such that leaving out, in
    each layer, the tokens with the smallest cross and the smallest self attention that together
    hold no more than a share alpha of that attention brings the visual tokens' cost under the
    budget (`vla_pruner.calibration.fitprune`).

    Args:
        keep: budget that the recipe was made for. Over all layers the visual tokens cost what one
            cut to this share of them before layer 3 would cost, unless the recipe was made with
            `--layer`.
        recipe: see `CalibratedMethod`; its values are `{"left": [n_0, ..., n_(T-1)]}`, the visual
            tokens of each layer.

    Reference: Ye et al., "Fit and Prune: Fast and Training-free Visual Token Pruning for
    Multi-modal Large Language Models", AAAI 2025.

    Differences: the source takes tokens out inside a layer, between its attention and its
    feed-forward network; here they leave before the next layer, so that the scoring layer runs in
    full and the last layer cannot drop any. A recipe counts its cost that way. The source's budget
    is the share of the visual tokens' cost itself (`--layer 0`).
    """

    name: ClassVar[str] = "fitprune"
    summary: ClassVar[str] = "a calibrated number of tokens leaves at each layer"
    paper: ClassVar[str | None] = "https://arxiv.org/abs/2409.10197"
    licence: ClassVar[str] = "Apache-2.0 (public code: no licence, not used)"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget != "global":
            raise ValueError(
                f'`budget="{self.budget}"`: a recipe counts the tokens of all cameras together; '
                'use budget="global".'
            )

    @property
    def needs(self) -> tuple[str, ...]:
        """The rows of the instruction."""
        return ("text",)

    def read(self, recipe: Recipe) -> tuple[int, ...]:
        """Visual tokens of each layer, from `{"left": [...]}`."""
        left = recipe.values.get("left")
        if (
            not isinstance(left, list | tuple)
            or not all(isinstance(n, int) and not isinstance(n, bool) for n in left)
            or len(left) != recipe.model.layers
        ):
            raise ValueError(
                f"the recipe's `left` must hold one integer for each of {recipe.model.layers} "
                f"layers; got {left!r}."
            )
        if left[0] < 1 or left[-1] < 0 or any(a < b for a, b in pairwise(left)):
            raise ValueError(f"the recipe's `left` must not grow from layer to layer; got {left}.")
        return tuple(left)

    def scores(self, cut: int) -> Mapping[str, ScoreSpec]:
        """Cross and self attention in the layer before the cut."""
        return {
            "cross": ScoreSpec(layer=cut - 1, rows="text", heads="max"),
            "self": ScoreSpec(layer=cut - 1, rows="visual", heads="max"),
        }

    def cuts(self, num_layers: int) -> tuple[int, ...]:
        """Layers that see fewer visual tokens than the one before."""
        left = self.read(self.given())
        if len(left) != num_layers:
            raise ValueError(
                f"the recipe is for {len(left)} layers, but the decoder has {num_layers}."
            )
        return tuple(layer for layer in range(1, num_layers) if left[layer] < left[layer - 1])

    def kept(self, views: tuple[int, ...]) -> int:
        """Visual tokens of the last layer."""
        left = self.read(self.given())
        if sum(views) != left[0]:
            raise ValueError(
                f"the recipe is for {left[0]} visual tokens, but the input has {sum(views)}; "
                "calibrate with these cameras."
            )
        return left[-1]

    def schedule(self, views: tuple[int, ...], num_layers: int) -> tuple[int, ...]:
        """Visual tokens left after each cut."""
        self.kept(views)
        left = self.read(self.given())
        return tuple(left[layer] for layer in self.cuts(num_layers))

    def select(self, evidence: Evidence) -> Tensor:
        """The tokens with the largest product of cross and self attention: `[B, k]`, ascending."""
        evidence.check(self.name)
        if evidence.keep_count is None:
            raise ValueError("method 'fitprune' needs `keep_count`, the tokens to leave.")
        missing = [name for name in ("cross", "self") if name not in evidence.scores]
        if missing:
            raise ValueError(f"method 'fitprune' needs the {missing[0]} score; got none.")
        score = evidence.scores["cross"] * evidence.scores["self"]
        batch, k = score.shape[0], evidence.keep_count
        if k == 0:
            return torch.empty(batch, 0, dtype=torch.int64, device=score.device)
        return top_k(score, k, valid=evidence.valid)
