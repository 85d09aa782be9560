"""EfficientVLA: key, task-relevant and diverse tokens; idle layers and flow steps left out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vla_pruner.methods.base import Evidence, OneCut, ScoreSpec
from vla_pruner.methods.recipe import CalibratedMethod, Recipe
from vla_pruner.pruning.options import require_choice, require_int
from vla_pruner.pruning.selection import top_k


@dataclass(frozen=True, kw_only=True)
class EfficientVLA(OneCut, CalibratedMethod):
    """The token module and the layer reduction of EfficientVLA, and its cache of the action head.

    Tokens: with A [H, S, S] the attention of layer K-1, the relevance of visual token i is what the
    text rows give it, scaled to [0, 1] over the n candidates; k tokens are kept in three parts:

        r_i = sum over text rows j of mean over h of A[h, j, i]
        s_i = (r_i - min r) / (max r - min r)
        key:     the K_key largest s
        task:    the floor(alpha (k - K_key)) next largest s
        diverse: of the rest, the largest 1 - max over key tokens j of cos(v_i, v_j)

    with v [n, D] the projected embeddings, compared in fp32. If k < K_key, all k are key tokens.

    Layers: a layer's importance is `1 - mean cos(x^l, x^(l+1))` over observations and positions
    (`vla-pruner calibrate efficientvla`); the least important ones do not run at all.

    Cache: layers of an expert that denoises actions run in flow steps t with `t mod N == 0`; in the
    others they add what they added last.

    Args:
        parts: "tokens", "layers" or "both".
        layer: K.
        key: key tokens K_key, at least 1 (the paper uses 4 to 8).
        alpha: share of the remaining budget that goes to relevance, in [0, 1].
        skip: layers to leave out, as a share of T below 1 (rounded) or a number.
        flow_interval: N, at least 1; above 1 for policies with an action expert alone (pi0).
        recipe: see `CalibratedMethod`; its values are `{"importance": [I_0, ..., I_(T-1)]}`. Not
            needed for "tokens".

    Reference: Yang et al., "EfficientVLA: Training-Free Acceleration and Compression for
    Vision-Language-Action Models", NeurIPS 2025.

    Differences: the paper lets visual tokens attend to the context, which a causal mask makes zero;
    text rows vote on visual columns here. Layer 0, by which caches tell their length, and the layer
    whose attention is read always run. No code was released to compare with.
    """

    name: ClassVar[str] = "efficientvla"
    summary: ClassVar[str] = "text-relevant and diverse tokens; idle layers left out"
    paper: ClassVar[str | None] = "https://arxiv.org/abs/2506.10100"
    licence: ClassVar[str] = "Apache-2.0 (public code: none released)"

    parts: Literal["tokens", "layers", "both"] = "tokens"
    layer: int = 2
    key: int = 4
    alpha: float = 0.5
    skip: float | int = 0.25
    flow_interval: int = 1

    def __post_init__(self) -> None:
        require_choice("parts", self.parts, ("tokens", "layers", "both"))
        super().__post_init__()
        require_int("layer", self.layer, 1)
        require_int("key", self.key, 1)
        require_int("flow_interval", self.flow_interval, 1)
        if isinstance(self.alpha, bool) or not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"`alpha={self.alpha}` must lie in [0, 1].")
        if isinstance(self.skip, float):
            if not 0.0 <= self.skip < 1.0:
                raise ValueError(
                    f"`skip={self.skip}` must lie in [0, 1), the share of layers that do not run; "
                    "an int is their number."
                )
        else:
            require_int("skip", self.skip, 0)

    @property
    def wants_recipe(self) -> bool:
        """Only if layers are left out."""
        return self.parts != "tokens" and self.recipe is None

    @property
    def needs(self) -> tuple[str, ...]:
        """The rows of the instruction, if tokens are cut."""
        return () if self.parts == "layers" else ("text",)

    def read(self, recipe: Recipe) -> tuple[float, ...]:
        """Importance of each layer, from `{"importance": [...]}`."""
        found = recipe.values.get("importance")
        if (
            not isinstance(found, list | tuple)
            or not all(isinstance(value, (int, float)) and math.isfinite(value) for value in found)
            or len(found) != recipe.model.layers
        ):
            raise ValueError(
                f"the recipe's `importance` must hold one number for each of "
                f"{recipe.model.layers} layers; got {found!r}."
            )
        return tuple(float(value) for value in found)

    def skipped(self, num_layers: int) -> tuple[int, ...]:
        """The least important layers, ascending; ties go to the lowest index.

        Raises:
            ValueError: more layers to skip than may be.
        """
        if self.parts == "tokens":
            return ()
        importance = self.read(self.given())
        count = round(self.skip * num_layers) if isinstance(self.skip, float) else self.skip
        always = {0} if self.parts == "layers" else {0, self.layer - 1}
        candidates = [layer for layer in range(num_layers) if layer not in always]
        if len(importance) != num_layers or count > len(candidates):
            raise ValueError(
                f"`skip={self.skip}` leaves out {count} of {num_layers} layers, of which "
                f"{len(always)} must run; the recipe ranks {len(importance)}."
            )
        ranked = sorted(candidates, key=lambda layer: (importance[layer], layer))
        return tuple(sorted(ranked[:count]))

    def scores(self, cut: int) -> Mapping[str, ScoreSpec]:
        """Attention of the instruction in the layer before the cut."""
        return {"semantic": ScoreSpec(layer=cut - 1, rows="text")}

    def cuts(self, num_layers: int) -> tuple[int, ...]:
        """`(K,)`, or none if only layers are left out."""
        return () if self.parts == "layers" else super().cuts(num_layers)

    def kept(self, views: tuple[int, ...]) -> int:
        """Visual tokens that stay; all of them if only layers are left out."""
        return sum(views) if self.parts == "layers" else super().kept(views)

    def schedule(self, views: tuple[int, ...], num_layers: int) -> tuple[int, ...]:
        """`(k,)`, or `()` if only layers are left out."""
        return () if self.parts == "layers" else super().schedule(views, num_layers)

    def choose(self, evidence: Evidence, k: int) -> Tensor:
        """Key, task and diverse tokens: `[B, k]`, ascending.

        Raises:
            ValueError: no score, or NaN in scores or features.
        """
        if evidence.semantic is None:
            raise ValueError("method 'efficientvla' needs the semantic score; got None.")
        return key_task_diverse(
            evidence.features,
            evidence.semantic,
            k,
            key=self.key,
            alpha=self.alpha,
            valid=evidence.valid,
        )


def key_task_diverse(
    features: Tensor,
    relevance: Tensor,
    k: int,
    *,
    key: int = 4,
    alpha: float = 0.5,
    valid: Tensor | None = None,
) -> Tensor:
    """Choose k of n tokens: by relevance, then by distance from the most relevant ones.

    Scaling the relevance to [0, 1] would not change its order and is left out.

    Args:
        features: `[B, n, D]`.
        relevance: `[B, n]`.
        k: tokens to keep, 1 <= k <= n.
        key: the most relevant tokens, from which diverse ones must differ.
        alpha: share of what remains that goes to the next most relevant.
        valid: `[B, n]` bool, False for tokens that come after everything else.

    Returns:
        `[B, k]` int64, ascending; ties go to the lowest index.

    Raises:
        ValueError: k out of range, or NaN among the scores or the distances.
    """
    first = min(key, k)
    relevant = first + math.floor(alpha * (k - first))
    best = top_k(relevance, relevant, valid=valid)
    if relevant == k:
        return best
    with torch.autocast(features.device.type, enabled=False):
        unit = F.normalize(features.float(), dim=-1)
        keys = top_k(relevance, first, valid=valid)
        anchors = unit.gather(1, keys[..., None].expand(-1, -1, unit.shape[2]))
        distance = 1.0 - (unit @ anchors.transpose(1, 2)).amax(dim=-1)  # [B, n]
    if valid is not None:
        distance = distance.masked_fill(~valid, -1.0)
    distance = distance.scatter(1, best, float("-inf"))
    rest = top_k(distance, k - relevant)
    return torch.cat([best, rest], dim=1).sort(dim=1).values
