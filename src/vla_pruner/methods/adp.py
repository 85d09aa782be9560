"""VLA-ADP: prune by what the first layer would look at, and not while the robot slows down."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from vla_pruner.methods.base import Evidence, OneCut, Positions, ScoreSpec, StepContext
from vla_pruner.pruning.budget import Budget, split_by_shares
from vla_pruner.pruning.options import require_choice, require_int
from vla_pruner.pruning.selection import top_k

_TWO_CAMERAS = (0.4, 0.6)


@dataclass(frozen=True, kw_only=True)
class VLAADP(OneCut):
    """Before layer K, keep the tokens with the largest products of queries and keys; gated.

    With q, k the queries and keys that layer K makes of its normed input, before rotary positions,
    D wide, and R the rows that vote:

        s_m = mean over heads h and rows i in R of q[h, i] . k[h, m] / sqrt(D)

    `k = max(1, round(keep M))` tokens stay, shared among cameras. Whether a step prunes at all is
    decided when it starts, by how far the robot moved (`session.motion`), d_t being the newest of
    these values:

        extrema: prune if d_t >= max(d_{t-w+1} .. d_{t-1}), all tokens if d_t < min of them,
                 `between` says what happens otherwise; all tokens until w values are known
        average: prune if d_t >= e_{t-1}, with e_t = (e_{t-1} + d_t) / 2 and e_1 = d_1

    After `most_in_a_row` pruned steps one runs on all tokens. A robot that stands still moves as
    far as before, d_t = 0 = max, and is pruned for: the source's rule.

    Args:
        keep: fraction or number of visual tokens of a pruned step, over all cameras.
        gate: "extrema", "average", or "none": every step prunes, and no motion is asked for.
        budget: "view", shared among cameras by `shares`, or "global".
        shares: share of each camera, for `budget="view"`; None: 0.4 and 0.6 of two cameras (scene,
            wrist), in proportion to their tokens if there is another number.
        window: w, at least 2.
        between: "prune", or "hold" what the last step did.
        most_in_a_row: at least 1.
        rows: R: "all" rows of the prefill, as the public code, or the instruction's ("text"). Where
            an adapter's action slots are not zero (`Decoder(action_rows=...)`), "all" counts them.
        layer: K; 0 cuts before the decoder, as the source does.
        positions: "compact", the source's; "keep".

    Reference: Pei et al., "Action-aware Dynamic Pruning for Efficient Vision-Language-Action
    Manipulation", ICLR 2026.

    Differences: the paper's importance is that of the text's queries (`rows="text"`), the code's
    that of all tokens but action slots; a slot of OpenVLA-OFT is zero before layer 0, where it adds
    nothing to s but a common factor. For K > 0 the source runs an extra pass up to layer K and
    prunes before the decoder; here layers below K see all tokens and none runs twice. What rounding
    leaves over when the budget is shared goes to the largest remainders. How "average" treats its
    first values is our reading.
    """

    name: ClassVar[str] = "vla-adp"
    summary: ClassVar[str] = "first-layer products, not while the robot slows down"
    paper: ClassVar[str | None] = "https://arxiv.org/abs/2509.22093"
    licence: ClassVar[str] = "Apache-2.0 (public code: Apache-2.0 and MIT)"

    layer: int = 0
    budget: Literal["global", "view"] = "view"

    gate: Literal["extrema", "average", "none"] = "extrema"
    shares: tuple[float, ...] | None = None
    window: int = 3
    between: Literal["prune", "hold"] = "prune"
    most_in_a_row: int = 3
    rows: Literal["all", "text"] = "all"
    positions: Positions = "compact"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("gate", self.gate, ("extrema", "average", "none"))
        require_choice("between", self.between, ("prune", "hold"))
        require_choice("rows", self.rows, ("all", "text"))
        require_choice("positions", self.positions, ("keep", "compact"))
        require_int("window", self.window, 2)
        require_int("most_in_a_row", self.most_in_a_row, 1)
        if self.shares is None:
            return
        object.__setattr__(self, "shares", tuple(self.shares))
        good = all(math.isfinite(share) and share > 0 for share in self.shares)
        if not self.shares or not good or abs(sum(self.shares) - 1) > 1e-6:
            raise ValueError(f"`shares={self.shares}` must be positive and sum to 1.")
        if self.budget == "global":
            raise ValueError('`shares` are for `budget="view"`; leave one of them out.')

    @property
    def needs(self) -> tuple[str, ...]:
        """Motion, unless every step prunes; the instruction, if it votes alone."""
        motion = () if self.gate == "none" else ("motion",)
        return (*motion, "text") if self.rows == "text" else motion

    def scores(self, cut: int) -> Mapping[str, ScoreSpec]:
        """Products of queries and keys in the layer about to run."""
        return {"semantic": ScoreSpec(layer=cut, rows=self.rows, kind="logits")}

    def full_step(self, context: StepContext) -> bool:
        """Whether the robot moves too little for pruning, or too many steps were pruned."""
        if self.gate == "none":
            return False
        if context.since_full >= self.most_in_a_row:
            return True
        motion = context.motion
        if self.gate == "average":
            return len(motion) < 2 or motion[-1] < _average(motion[:-1])
        if len(motion) < self.window:
            return True
        newest, before = motion[-1], motion[-self.window : -1]
        if newest >= max(before):
            return False
        if newest < min(before):
            return True
        return self.between == "hold" and context.since_full == 0

    def choose(self, evidence: Evidence, k: int) -> Tensor:
        """The k tokens with the largest products: `[B, k]`, ascending."""
        if evidence.semantic is None:
            raise ValueError("method 'vla-adp' needs the semantic score; got None.")
        return top_k(evidence.semantic, k, valid=evidence.valid)

    def _resolve(self, views: tuple[int, ...]) -> tuple[int, ...]:
        (total,) = Budget(self.keep).resolve(views)
        if self.budget == "global":
            return (total,)
        shares = self.shares
        if shares is None:
            shares = _TWO_CAMERAS if len(views) == 2 else tuple(v / sum(views) for v in views)
        if len(shares) != len(views):
            raise ValueError(
                f"`shares={self.shares}` are for {len(shares)} cameras, but the input has "
                f"{len(views)}; give one share for each."
            )
        return split_by_shares(total, shares, views)


def _average(motion: tuple[float, ...]) -> float:
    """Moving average of all values, each new one weighing as much as all before."""
    average = motion[0]
    for value in motion[1:]:
        average = (average + value) / 2
    return average
