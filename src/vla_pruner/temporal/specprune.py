"""SpecPrune-VLA: what mattered in the last call, what moves, and what early layers look at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vla_pruner.methods.base import Evidence, OneCut, ScoreSpec
from vla_pruner.pruning.frames import patch_similarity, patches
from vla_pruner.pruning.options import require_int
from vla_pruner.pruning.selection import top_k
from vla_pruner.temporal.method import Memory, Now, Remembering, Seen

_FINE = 40 / 24
"""Tokens of a fine step for each of a coarse one, by the paper's two sizes of its local set."""


@dataclass(frozen=True, kw_only=True)
class SpecPrune(Remembering, OneCut):
    """The union of three sets stays before layer K, k tokens in all.

    With s_l the mean attention of the instruction's words in layer l, over heads and words:

        global  = the G = round(global_share k) tokens with the largest s_L in the last call, L the
                  last layer
        dynamic = the round(dynamic_share k) tokens whose patches differ most from those `lag` calls
                  ago, of those with a cosine of raw colours below `similarity`
        local   = the best of s_0 and of s_1 in turns, as many as are left of the k

    k = round(keep M), or, in steps before which the robot moved less than `slow`, 40/24 of it. The
    first call of an episode runs on all tokens.

    Args:
        keep: fraction or number of visual tokens of a coarse step.
        layer: K, at least 2: layers 0 and 1 are read.
        budget: "view", each camera by itself as in the source, or "global".
        global_share, dynamic_share: of k, at least 0 and at most 1 together.
        similarity: in [-1, 1].
        lag: calls back, at least 1; as far back as there are calls at an episode's start.
        slow: motion (`session.motion`) below which a step is fine; None: every step is coarse, and
            no motion is asked for.

    Reference: "SpecPrune-VLA", arXiv 2509.05614v1, its static pruning and controller; the layerwise
    pruning behind it, whose constants it does not print, is left out.

    Differences: k is ours to say, and the shares of the three sets; the paper gives sizes for 512
    tokens, and a parameter alpha whose meaning contradicts itself. The paper cuts twice, before
    layers 1 and 2, here once, so that both early layers see every token. Its lag follows the speed,
    and its controller looks at translation, rotation and descent apart. The public code passes no
    last call's set on, compares the first frame with itself, and prunes the first call hardest:
    here it is dense.
    """

    name: ClassVar[str] = "specprune-vla"
    summary: ClassVar[str] = "last call's, moving, and early-attended tokens"
    paper: ClassVar[str | None] = "https://arxiv.org/abs/2509.05614"
    licence: ClassVar[str] = "Apache-2.0 (public code: no licence, not used)"
    adaptive: ClassVar[bool] = True

    layer: int = 2
    budget: Literal["global", "view"] = "view"

    global_share: float = 0.25
    dynamic_share: float = 0.25
    similarity: float = 0.986
    lag: int = 4
    slow: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_int("layer", self.layer, 2)
        require_int("lag", self.lag, 1)
        shares = (self.global_share, self.dynamic_share)
        if not (min(shares) >= 0 and sum(shares) <= 1):
            raise ValueError(
                f"`global_share={shares[0]}` and `dynamic_share={shares[1]}` must be at least 0, "
                "and at most 1 together."
            )
        if not -1.0 <= self.similarity <= 1.0:
            raise ValueError(f"`similarity={self.similarity}` must be a cosine, in [-1, 1].")
        if self.slow is not None and not 0.0 < self.slow < float("inf"):
            raise ValueError(f"`slow={self.slow}` must be positive and finite, or None.")

    @property
    def warmup(self) -> int:
        """The first call of an episode has none before it."""
        return 1

    @property
    def needs(self) -> tuple[str, ...]:
        """The instruction; images, unless nothing is dynamic; motion, for the controller."""
        frame = ("frame",) if self.dynamic_share > 0 else ()
        return ("text", *frame, *(() if self.slow is None else ("motion",)))

    def scores(self, cut: int) -> Mapping[str, ScoreSpec]:
        """Attention of the words in layers 0 and 1."""
        return {f"local{layer}": ScoreSpec(layer=layer, rows="text") for layer in (0, 1)}

    def late_layer(self, num_layers: int) -> int | None:
        """The last one."""
        return num_layers - 1

    def expect(self, now: Now) -> Mapping[str, Tensor]:
        """Last call's score, the likeness of patches, and whether the step is fine: `[B, M]`."""
        blank = torch.zeros_like(now.features[..., 0], dtype=torch.float32)
        slow = [self.slow is not None and bool(m) and m[-1] < self.slow for m in now.motion]
        fine = torch.tensor(slow, dtype=torch.bool, device=blank.device)
        alike = torch.ones_like(blank)
        if now.memory and now.frames is not None:
            count = now.memory["count"].to(blank.device)
            back = (count.clamp_max(self.lag) - 1).clamp_min(0)
            row = torch.arange(len(back), device=blank.device)
            before = patches(now.memory["frames"][row, back], blank.shape[1])
            found = patch_similarity(before, patches(now.frames, blank.shape[1])).float()
            alike = torch.where(now.known[:, None], found, alike)
        return {
            "global": now.memory.get("late", blank),
            "alike": alike,
            "fine": fine[:, None].expand_as(blank).float(),
        }

    def select(self, evidence: Evidence) -> Tensor:
        """k tokens, or more of them if the step of a row is fine: `[B, n]`, ascending."""
        evidence.check(self.name)
        count, size = evidence.keep_count, evidence.features.shape[1]
        count = self.kept(evidence.views) if count is None else count
        if bool(evidence.scores["fine"].any()):
            count = min(size, round(_FINE * count))
        return self.by_view(replace(evidence, keep_count=count), self.choose)

    def choose(self, evidence: Evidence, k: int) -> Tensor:
        """The union of the three sets."""
        found, valid = evidence.scores, evidence.valid
        chosen = torch.zeros_like(found["local0"], dtype=torch.bool)
        best = round(self.global_share * k)
        if best:
            chosen = chosen.scatter(1, top_k(found["global"], best, valid=valid), True)
        moved = min(round(self.dynamic_share * k), k - best)
        if moved:
            other = found["alike"] < self.similarity
            score = torch.where(other, -found["alike"], -2.0)
            chosen = chosen | (_mask(top_k(score, moved, valid=valid), chosen) & other)
        # 0, 2, 4, ... are the best of layer 0, 1, 3, 5, ... those of layer 1.
        turns = torch.minimum(2 * _rank(found["local0"]), 2 * _rank(found["local1"]) + 1)
        return top_k(torch.where(chosen, 1.0, -turns.float()), k, valid=valid)

    def remember(self, seen: Seen) -> Memory:
        """The late score, and the last images, newest first."""
        assert seen.late is not None
        memory = {"late": seen.late.float().clone()}
        if seen.frames is None:
            return memory
        if seen.memory is None:
            held, count = seen.frames.new_zeros(self.lag, *seen.frames.shape), 0
        else:
            held, count = seen.memory["frames"], int(seen.memory["count"])
        frames = torch.cat([seen.frames[None], held[:-1]])
        return {**memory, "frames": frames, "count": torch.tensor(count + 1, dtype=torch.int64)}


def _rank(score: Tensor) -> Tensor:
    """Place of each token by falling score, from 0: `[B, n]` int64."""
    order = score.sort(dim=1, descending=True, stable=True).indices
    places = torch.arange(score.shape[1], device=score.device).expand_as(order)
    return torch.zeros_like(order).scatter(1, order, places)


def _mask(chosen: Tensor, like: Tensor) -> Tensor:
    """Indices `[B, k]` as bool `[B, n]`."""
    return torch.zeros_like(like).scatter(1, chosen, True)
