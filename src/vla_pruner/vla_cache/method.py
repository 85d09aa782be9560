"""VLA-Cache: what stands still in the image and does not matter now is not computed again."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from vla_pruner.baselines.entropy import layer_shares
from vla_pruner.baselines.reuse import reusable, reuse_counts, reuse_order
from vla_pruner.methods.base import Method
from vla_pruner.pruning.options import require_choice, require_int
from vla_pruner.pruning.schedule import cuts_in
from vla_pruner.vla_cache.hooks import ReuseHooks
from vla_pruner.vla_cache.recall import Recall, Reuse

_SOURCE_LAYERS, _SOURCE_CUTS = 32, (2, 6, 9, 11)
# Most static and most task-relevant tokens that the public code takes, of 256 in each camera.
_ONE_CAMERA, _SEVERAL_CAMERAS = (130 / 256, 120 / 256), (150 / 256, 100 / 256)


@dataclass(frozen=True, kw_only=True)
class VLACache(Method):
    """Reuse the keys and values of the last step for static tokens the task is not about.

    Nothing is pruned: a reused token leaves the hidden states before one of the cut layers, and
    from there on everybody attends to its keys and values of the episode's last step. All other
    tokens, text and action slots are computed. At each step, per camera of M tokens:

        k = M - kept,  kept = round(keep M)
        P = the `1.5 k` tokens (or all) with the most similar patches, of those with a cosine of raw
            colours with the same patch of the last frame >= `threshold`
        T = the `0.5 k` tokens with the most attention from the text rows in layer `text_layer` of
            the last step
        R = P without T; if these are more than k, the k most similar of them

    With e_l the entropy of the last step's attention in layer l (mean over heads, then mean over
    queries of the entropy), and n tokens in R over all cameras:

        r_l = 1 - (e_l - min e) / (max e - min e), and from left to right, where it rises,
        r_l <- r_{l-1} + growth (r_l - r_{l-1})
        c_l = max(1, floor(r_l n)) at cut layer l, but never fewer than at the cut before

    The first c_l tokens of R, in `order`, are reused from layer l on. How many that are depends on
    what the cameras see; `session.last.reused` says it. The first step of an episode is full, and
    so is one whose prompt has another length or whose visual tokens are elsewhere.

    Args:
        keep: share (or number) of the visual tokens of a camera that is computed in every layer,
            at least; how close a step comes depends on the scene.
        limits: "paper", the protocol of VLA-Pruner's experiments, as above; "code": |P| and |T| as
            in the public code (130 and 120 of 256 tokens with one camera, 150 and 100 per camera
            with several), whatever `keep` says. `keep` still bounds R.
        order: "position", the public code's: top left first; or "similarity", most static first.
        threshold: in [-1, 1].
        growth: in [0, 1].
        layers: layers before which tokens leave, ascending; None: 2, 6, 9 and 11 of 32, and the
            same relative depths elsewhere.
        text_layer: layer of the text's attention; None: the last of the first half, 15 of 32.
        budget: "view", each camera for itself, or "global", all M tokens together.

    Reference: Xu et al., "VLA-Cache: Efficient Vision-Language-Action Manipulation via Adaptive
    Token Caching", NeurIPS 2025.

    Differences: T comes from the rows of the instruction as the layout knows them, the code counts
    34 or 35 rows behind the image. Only queries that were computed vote on the entropy. A patch
    that has not changed at all is static even if it is black. Rows of a batch are independent: the
    number of computed tokens is padded to the largest of them.
    """

    name: ClassVar[str] = "vla-cache"
    summary: ClassVar[str] = "static patches keep the last step's keys and values"
    paper: ClassVar[str | None] = "https://arxiv.org/abs/2502.02175"
    licence: ClassVar[str] = "Apache-2.0 (public code: Apache-2.0)"
    adaptive: ClassVar[bool] = True

    budget: Literal["global", "view"] = "view"

    limits: Literal["paper", "code"] = "paper"
    order: Literal["position", "similarity"] = "position"
    threshold: float = 0.996
    growth: float = 0.55
    layers: tuple[int, ...] | None = None
    text_layer: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("limits", self.limits, ("paper", "code"))
        require_choice("order", self.order, ("position", "similarity"))
        if not -1.0 <= self.threshold <= 1.0:
            raise ValueError(f"`threshold={self.threshold}` must be a cosine, in [-1, 1].")
        if not 0.0 <= self.growth <= 1.0:
            raise ValueError(f"`growth={self.growth}` must lie in [0, 1].")
        if self.text_layer is not None:
            require_int("text_layer", self.text_layer, 0)
        if self.layers is None:
            return
        object.__setattr__(self, "layers", tuple(self.layers))
        for layer in self.layers:
            require_int("layers", layer, 0)
        if not self.layers or any(a >= b for a, b in pairwise(self.layers)):
            raise ValueError(f"`layers={self.layers}` must name layers, ascending.")

    @property
    def needs(self) -> tuple[str, ...]:
        """Camera images, and the rows of the instruction."""
        return ("frame", "text")

    @property
    def warmup(self) -> int:
        """The first step has nothing to recall."""
        return 1

    def cuts(self, num_layers: int) -> tuple[int, ...]:
        """`layers`, or the source's at the same relative depth.

        Raises:
            ValueError: a decoder that is too shallow.
        """
        return cuts_in(self.layers, _SOURCE_CUTS, _SOURCE_LAYERS, num_layers)

    def hooks(self, adapter: Any) -> Any:
        """Hooks that exchange keys and values instead of cutting."""
        return ReuseHooks(adapter, self)

    def recalled_layer(self, num_layers: int) -> int:
        """Whose text attention the next step recalls: `text_layer`, or the last of the first half.

        Raises:
            ValueError: a layer that the decoder does not have.
        """
        layer = max(num_layers // 2 - 1, 0) if self.text_layer is None else self.text_layer
        if layer >= num_layers:
            raise ValueError(
                f"`text_layer={layer}` does not exist: the decoder has {num_layers} layers; use at "
                f"most {num_layers - 1}."
            )
        return layer

    def schedule(self, views: tuple[int, ...], num_layers: int) -> tuple[int, ...]:
        """M at every cut: how many leave is known only when images have been compared."""
        _ = self.kept(views)  # Raises if it does not fit.
        return (sum(views),) * len(self.cuts(num_layers))

    def reuse(self, recall: Recall) -> Reuse:
        """R in its order, and how much of it each cut layer does without."""
        views = recall.views
        spans = (sum(views),) if self.budget == "global" else views
        named, start = [], 0
        for size, kept in zip(spans, self._resolve(views), strict=True):
            view = slice(start, start + size)
            static, relevant = self._limits(size, size - kept, len(views))
            named.append(
                reusable(
                    recall.similarity[:, view],
                    recall.relevance[:, view],
                    threshold=self.threshold,
                    static=static,
                    relevant=relevant,
                    most=size - kept,
                    valid=None if recall.valid is None else recall.valid[:, view],
                )
            )
            start += size
        chosen = torch.cat(named, dim=1)
        shares = layer_shares(recall.entropy, self.growth)[:, list(recall.cuts)]
        by: Tensor | None = recall.similarity if self.order == "similarity" else None
        return Reuse(reuse_order(chosen, by), reuse_counts(shares, chosen.sum(dim=1)))

    def _limits(self, size: int, k: int, cameras: int) -> tuple[int, int]:
        """|P| and |T| at most, of `size` tokens of which k shall be reused."""
        if self.limits == "paper":
            return round(1.5 * k), round(0.5 * k)
        static, relevant = _ONE_CAMERA if cameras == 1 else _SEVERAL_CAMERAS
        return round(static * size), round(relevant * size)
