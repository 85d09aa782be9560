"""HiPrune: what a vision tower looks at half-way, the cells around it, and what it ends with."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from vla_pruner.baselines.grid import grids
from vla_pruner.core.cut import Cut
from vla_pruner.core.episodes import Step
from vla_pruner.core.layout import Adapter
from vla_pruner.core.tokens import Mode, Prefill
from vla_pruner.methods.base import Evidence, OneCut, Positions
from vla_pruner.pruning.options import require_choice, require_int
from vla_pruner.pruning.selection import top_k
from vla_pruner.towers.reading import Tower, TowerScores


@dataclass(frozen=True, kw_only=True)
class HiPrune(OneCut):
    """Anchors of a middle layer, their neighbours, and the most attended tokens of the last one.

    With a^l the attention that each patch receives in layer l of the vision tower, mean over heads
    and all rows, class and register tokens among them, and k tokens to keep of a view:

        anchors   = the n = max(1, round(alpha k / 5)) largest a^middle
        buffers   = the cells left, right, above and below of an anchor, in its camera
        registers = the largest a^last of the others, until there are k

    Args:
        alpha: share of k that anchors and buffers are for, in (0, 1].
        middle: layer of the anchors, counted from 1; None: 3/8 of those that the tower runs,
            rounded (the 9th of 24).
        tower: which of the model's towers, from 0; -1: the last (SigLIP in OpenVLA).
        columns: visual tokens in a row of a camera's grid; None: the grids are square.
        positions: "compact", the source's; "keep".
        layer: K; 0 cuts before the decoder, as the source does.
        budget: "view", every image for itself as in the source, or "global".

    Reference: Liu et al., "HiPrune", arXiv 2508.00553, ACL 2026.

    Differences: the public code takes neighbours by index, which wraps around at the rim and makes
    corner tokens of what lies outside; here a cell at the rim has fewer. Without an anchor (small
    k) it keeps registers alone. Where anchors and buffers are more than k, those with the largest
    a^middle stay, anchors first.
    """

    name: ClassVar[str] = "hiprune"
    summary: ClassVar[str] = "what the vision tower looks at half-way, and at its end"
    paper: ClassVar[str | None] = "https://arxiv.org/abs/2508.00553"
    licence: ClassVar[str] = "Apache-2.0 (public code: MIT, not used)"

    layer: int = 0
    budget: Literal["global", "view"] = "view"

    alpha: float = 0.1
    middle: int | None = None
    tower: int = -1
    columns: int | None = None
    positions: Positions = "compact"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.alpha <= 1.0:
            raise ValueError(f"`alpha={self.alpha}` must lie in (0, 1].")
        if self.middle is not None:
            require_int("middle", self.middle, 1)
        require_int("tower", self.tower, -1)
        if self.columns is not None:
            require_int("columns", self.columns, 1)
        require_choice("positions", self.positions, ("keep", "compact"))

    def hooks(self, adapter: Any) -> Any:
        """Hooks that also listen to the tower.

        Raises:
            ValueError: a model whose tower cannot be listened to.
        """
        return TowerCut(adapter, self)

    def layers_of(self, tower: Tower) -> tuple[int, int]:
        """Middle and last layer of a tower, from 0.

        Raises:
            ValueError: a middle layer that it does not have.
        """
        depth = len(tower.attentions)
        middle = max(1, round(3 * depth / 8)) if self.middle is None else self.middle
        if middle > depth:
            raise ValueError(
                f"`middle={middle}`: the vision tower {tower.name!r} runs {depth} layers; use at "
                f"most {depth}."
            )
        return middle - 1, depth - 1

    def choose(self, evidence: Evidence, k: int) -> Tensor:
        """Anchors, buffers and registers: `[B, k]`, ascending."""
        found, valid = evidence.scores, evidence.valid
        if missing := {"middle", "last", "line", "column"} - found.keys():
            raise ValueError(
                f"method 'hiprune' needs the tower's attention ({', '.join(sorted(missing))} in "
                "`Evidence.scores`); got none."
            )
        middle, size = found["middle"], found["middle"].shape[1]
        anchors = top_k(middle, min(k, max(1, round(self.alpha * k / 5))), valid=valid)
        is_anchor = torch.zeros_like(middle, dtype=torch.bool).scatter(1, anchors, True)
        line, column = found["line"], found["column"]
        apart = (line[:, None] - line.gather(1, anchors)[..., None]).abs()
        apart = apart + (column[:, None] - column.gather(1, anchors)[..., None]).abs()
        beside = (apart == 1).any(dim=1)  # [B, m]
        tier = torch.where(is_anchor, 2 * size, torch.where(beside, size, 0))
        rank = torch.where(is_anchor | beside, _rank(middle), _rank(found["last"]))
        return top_k((tier - rank).float(), k, valid=valid)


class TowerCut(Cut):
    """The hooks of `HiPrune`."""

    def __init__(self, adapter: Adapter, method: HiPrune) -> None:
        super().__init__(adapter, method)
        self.hiprune = method
        found: Any = getattr(adapter, "towers", None)
        towers: tuple[Tower, ...] = found() if found is not None else ()
        if not towers:
            raise ValueError(
                f"method {method.name!r} reads the attention of the vision tower, and "
                f"{type(adapter).__name__} cannot show it for this model: its patches do not "
                "become visual tokens one for one, or the tower is not known. Use another method."
            )
        if method.tower >= len(towers):
            raise ValueError(
                f"`tower={method.tower}`: this model has {len(towers)} vision towers "
                f"({', '.join(tower.name for tower in towers)}); use at most {len(towers) - 1}."
            )
        tower = towers[method.tower]
        self.middle, self.last = method.layers_of(tower)
        self.tower_scores = TowerScores(tower, sorted({self.middle, self.last}))

    def attach(self, undo: ExitStack) -> None:
        """Install the hooks; `undo` takes them away."""
        super().attach(undo)
        self.tower_scores.attach(undo)

    def begin(
        self, step: Step, mode: Mode, frames: Tensor | None, kwargs: Mapping[str, Any]
    ) -> Mode | None:
        """The tower has run: its scores belong to this step."""
        tokens = step.prefill.layout.visual.shape[1]
        step.prefill.note = self.tower_scores.take(len(step.ids), tokens)
        return None

    def again(self, prefill: Prefill, first: Prefill) -> None:
        """Another prefill of the step: the first one decided."""
        prefill.note = first.note

    def _evidence(self, number: int, prefill: Prefill, tokens: Tensor, hidden: Tensor) -> Evidence:
        """With the tower's scores, and each token's place on its camera's grid."""
        evidence = super()._evidence(number, prefill, tokens, hidden)
        line, column = places(prefill.layout.views, self.hiprune.columns, hidden.device)
        note: dict[int, Tensor] = prefill.note
        found = {
            "middle": note[self.middle],
            "last": note[self.last],
            "line": line.expand(len(tokens), -1),
            "column": column.expand(len(tokens), -1),
        }
        found = {name: score.gather(1, tokens) for name, score in found.items()}
        return replace(evidence, scores={**evidence.scores, **found})


def places(
    views: tuple[int, ...], columns: int | None, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Line and column of each token, `[1, M]` int64 each; an empty line lies between two cameras.

    Args:
        views: visual tokens of each camera.
        columns: see `grid.grids`.

    Raises:
        ValueError: a camera whose tokens are no grid.
    """
    lines, cells, above = [], [], 0
    for height, width in grids(views, columns):
        index = torch.arange(height * width, device=device)
        lines.append(above + index // width)
        cells.append(index % width)
        above += height + 1
    return torch.cat(lines)[None], torch.cat(cells)[None]


def _rank(score: Tensor) -> Tensor:
    """Place of each token by falling score, from 1: `[B, m]` int64."""
    order = score.sort(dim=1, descending=True, stable=True).indices
    places = torch.arange(1, score.shape[1] + 1, device=score.device).expand_as(order)
    return torch.zeros_like(order).scatter(1, order, places)
