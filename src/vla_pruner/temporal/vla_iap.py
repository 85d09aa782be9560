"""VLA-IAP: few tokens once what moves is what the words are about, many before."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vla_pruner.baselines.determinant import stretched, text_likeness
from vla_pruner.baselines.grid import close_gaps, count_around
from vla_pruner.methods.base import Evidence, OneCut
from vla_pruner.pruning.frames import edges, grey, mean_over_patches, patch_size
from vla_pruner.pruning.options import require_int
from vla_pruner.pruning.selection import top_k
from vla_pruner.temporal.method import Memory, Now, Remembering, Seen


@dataclass(frozen=True, kw_only=True)
class VLAIAP(Remembering, OneCut):
    """Three priors of each visual token, and a gate that says how many stay.

    Per patch, x^ meaning min-max scaling within a camera:

        s = max over words j of cos(v_i, t_j), as both enter layer 0
        m = decay m_before + (1 - decay) mean |brightness now - brightness before|, 0 at first
        g = mean length of the Sobel gradient of the brightness
        score = s^ + m^ + w g^                                      w is `edge_weight`

        S, G = the `share` of each camera's tokens with the largest s, g
        M    = tokens with m > `motion`, without lone ones, small gaps closed (3 x 3 cells)
        iou  = |S and M| / |S or M|, over all cameras

    Once iou > `gamma` in `steady` steps in a row, what moves is what the words are about: the
    k = round(keep M) tokens with the largest score stay. Until then, and again once iou <= gamma in
    as many steps, only background leaves: S, M and G stay, their number rounded up to the next of
    `levels` by the next best scores. Rows of a batch share the largest number.

    Args:
        keep: fraction or number of visual tokens of a step behind the gate.
        budget: "global" alone.
        layer: K; 0 cuts before the decoder, as the source does.
        share: of S and G, in (0, 1).
        decay: of the motion's average, in [0, 1).
        motion: brightness in 0..255, at least 0.
        edge_weight: w, at least 0.
        gamma: in [0, 1).
        steady: steps in a row, at least 1.
        levels: numbers of tokens before the gate opens, as fractions of all in (0, 1), rounded up;
            all tokens are the last. None is below k.

    Reference: "VLA-IAP", arXiv 2603.22991. No code was found; notes on two versions of the paper
    name the three priors, the overlap of two masks and the switch at 0.05.

    Differences: everything else is our specification; see the page of the method.
    """

    name: ClassVar[str] = "vla-iap"
    summary: ClassVar[str] = "words, motion and edges; few once they agree"
    paper: ClassVar[str | None] = "https://arxiv.org/abs/2603.22991"
    licence: ClassVar[str] = "Apache-2.0 (no public code)"
    adaptive: ClassVar[bool] = True

    layer: int = 0

    share: float = 0.25
    decay: float = 0.7
    motion: float = 2.0
    edge_weight: float = 0.5
    gamma: float = 0.05
    steady: int = 2
    levels: tuple[float, ...] = (0.25, 0.375, 0.5, 0.75)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget != "global":
            raise ValueError(
                f'`budget="{self.budget}"`: one gate decides for all cameras together; use '
                'budget="global".'
            )
        if not 0.0 < self.share < 1.0:
            raise ValueError(f"`share={self.share}` must lie in (0, 1).")
        for name in ("decay", "gamma"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"`{name}={getattr(self, name)}` must lie in [0, 1).")
        for name in ("motion", "edge_weight"):
            if not 0.0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"`{name}={getattr(self, name)}` must be finite and at least 0.")
        require_int("steady", self.steady, 1)
        object.__setattr__(self, "levels", tuple(self.levels))
        if any(not 0.0 < level < 1.0 for level in self.levels) or sorted(set(self.levels)) != list(
            self.levels
        ):
            raise ValueError(f"`levels={self.levels}` must ascend within (0, 1).")

    @property
    def needs(self) -> tuple[str, ...]:
        """Camera images, and the rows of the instruction."""
        return ("text", "frame")

    def starts_full(self, memory: Memory | None) -> bool:
        """Never: before anything has moved, the gate is closed."""
        return False

    def expect(self, now: Now) -> Mapping[str, Tensor]:
        """`score`, what is `protected` before the gate opens, `motion`, and the gate: `[B, M]`."""
        if now.frames is None or now.text is None:
            raise ValueError("method 'vla-iap' needs camera images and the instruction; got None.")
        tokens = now.features.shape[1]
        size = patch_size(now.frames, tokens)
        brightness = grey(now.frames)
        cameras, height, width = brightness.shape[1:]
        cells = ((height // size, width // size),) * cameras
        edge = mean_over_patches(edges(brightness), tokens, size)
        motion = opened = streak = torch.zeros_like(edge)
        if now.memory:
            changed = (brightness - now.memory["brightness"]).abs()
            moved = self.decay * now.memory["motion"] + (1 - self.decay) * mean_over_patches(
                changed, tokens, size
            )
            motion = torch.where(now.known[:, None], moved, motion)
            opened = now.memory["open"][:, None].expand_as(edge)
            streak = now.memory["streak"][:, None].expand_as(edge)
        said = text_likeness(now.features, now.text, now.text_valid, pool="max")
        words = self._largest(said, now.views, now.valid)
        moving = closed_up(motion > self.motion, cells)
        opened, streak = self.gate(opened[:, 0] > 0.5, streak[:, 0], words, moving)
        protected = words | moving | self._largest(edge, now.views, now.valid)
        score = (
            by_camera(said, now.views, now.valid)
            + by_camera(motion, now.views, now.valid)
            + self.edge_weight * by_camera(edge, now.views, now.valid)
        )
        return {
            "score": score,
            "protected": protected.float(),
            "motion": motion,
            "open": opened.float()[:, None].expand_as(edge),
            "streak": streak[:, None].expand_as(edge),
        }

    def select(self, evidence: Evidence) -> Tensor:
        """k tokens where the gate is open in every row, more where it is not: `[B, n]`."""
        evidence.check(self.name)
        m, found = evidence.features.shape[1], evidence.scores
        least = self.kept(evidence.views) if evidence.keep_count is None else evidence.keep_count
        shut = found["open"][:, 0] < 0.5
        protected = (found["protected"] > 0.5) & shut[:, None]
        counts = {*(max(math.ceil(level * m - 1e-9), least) for level in self.levels), m}
        wanted = int(protected.sum(dim=1).max())
        count = min(n for n in counts if n >= wanted) if bool(shut.any()) else least
        return top_k(found["score"] + 10.0 * protected, count, valid=evidence.valid)

    def gate(
        self, opened: Tensor, streak: Tensor, words: Tensor, moving: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Whether the gate is open now, and for how many steps iou has said otherwise: `[B]` each.

        Args:
            opened: `[B]` bool, whether it was open.
            streak: `[B]` fp32, steps just before in which iou said otherwise.
            words, moving: bool `[B, M]`, S and M.
        """
        both, either = (words & moving).sum(dim=1), (words | moving).sum(dim=1)
        agree = both / either.clamp_min(1) > self.gamma
        streak = torch.where(agree == opened, 0.0, streak + 1)
        turns = streak >= self.steady
        return opened ^ turns, torch.where(turns, 0.0, streak)

    def remember(self, seen: Seen) -> Memory:
        """Brightness, motion and the gate."""
        assert seen.frames is not None
        if seen.expected:
            gate = {name: seen.expected[name][0].clone() for name in ("open", "streak")}
            motion = seen.expected["motion"].clone()
        else:  # Nobody was asked to choose: the average begins anew.
            motion = torch.zeros_like(seen.features[:, 0], dtype=torch.float32)
            gate = {name: motion.new_zeros(()) for name in ("open", "streak")}
        return {"brightness": grey(seen.frames), "motion": motion, **gate}

    def _largest(self, score: Tensor, views: tuple[int, ...], valid: Tensor | None) -> Tensor:
        """The `share` of each camera's tokens with the largest score, bool `[B, M]`."""
        found = []
        masks = [None] * len(views) if valid is None else valid.split(list(views), dim=1)
        for part, mask in zip(score.split(list(views), dim=1), masks, strict=True):
            best = top_k(part, max(1, round(self.share * part.shape[1])), valid=mask)
            chosen = torch.zeros_like(part, dtype=torch.bool).scatter(1, best, True)
            found.append(chosen if mask is None else chosen & mask)
        return torch.cat(found, dim=1)


def by_camera(score: Tensor, views: tuple[int, ...], valid: Tensor | None) -> Tensor:
    """Scores `[B, M]` min-max scaled to [0, 1] within each camera; 0 where all are alike."""
    sizes = list(views)
    masks = [None] * len(views) if valid is None else valid.split(sizes, dim=1)
    parts = zip(score.split(sizes, dim=1), masks, strict=True)
    return torch.cat([stretched(part, mask, alike=0.0) for part, mask in parts], dim=1)


def closed_up(mask: Tensor, cells: tuple[tuple[int, int], ...]) -> Tensor:
    """Without tokens that have no neighbour in the mask, and with small gaps closed; `[B, M]`."""
    mask = mask & (count_around(mask, cells) > 1)
    return close_gaps(mask, cells)
