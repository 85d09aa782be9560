"""What one step of a policy did: which tokens stayed, where, why, and at what length."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from vla_pruner.core.cut import Cut
from vla_pruner.core.episodes import Step
from vla_pruner.pruning.selection import top_k


@dataclass(frozen=True, eq=False)
class StageReport:
    """What one cut left.

    Args:
        layer: the cut was before this layer.
        kept_mask: `[B, M]` bool, visual tokens that this layer and those up to the next cut saw.
    """

    layer: int
    kept_mask: Tensor


@dataclass(frozen=True, eq=False)
class StepReport:
    """What the last step did. B rows, M visual tokens, S tokens in the prefill.

    Args:
        episodes: episode of each row.
        steps: how many steps of its episode each row had run before.
        views: visual tokens of each camera.
        warm_up: `[B]` bool, rows that ran on all tokens, as `Method.full_step` asked: their episode
            has just started, or the method wanted a look at everything.
        kept_mask: `[B, M]` bool, visual tokens that the layers behind the last cut saw.
        kept: for each row, for each camera: indices of the kept tokens within that camera's.
        semantic: `[B, M]` fp32, the score of that name at the first cut, None if the method asks
            for none.
        forecast: `[B, M]` fp32 action score that was predicted, None if the method predicts none.
        action: `[B, M]` fp32 action score observed so far in this step (0 at tokens that were
            dropped), None if the method watches none.
        tokens_full, tokens_kept: S, and the tokens that the layers behind the last cut computed.
        visual_full, visual_kept: M, and the visual tokens among `tokens_kept`.
        per_view: whether every camera had its own budget.
        visual_valid: `[B, M]` bool, False for the tokens of missing cameras; None: none is missing.
        tokens_per_layer: tokens of the sequence that each decoder layer computed; 0: skipped.
        stages: what each cut left; empty where nothing was cut.
        keys_per_layer: keys that each layer's attention saw; more than it computed where keys of
            the last step are used again.
        reused: `[B, T]` int64, visual tokens whose keys and values of the last step were used in
            each layer; None where the method reuses none.
        ms: wall-clock milliseconds of the call, from its beginning until it returned (on a GPU work
            may still be queued then); None while it runs.
        left_alone: why nothing was pruned although there may have been an image; None: it was not
            left alone. All other fields then say nothing.

    Where keys are used again, a token that is "kept" is one that was computed in this step.
    """

    episodes: tuple[Hashable, ...]
    steps: tuple[int, ...]
    views: tuple[int, ...]
    warm_up: Tensor
    kept_mask: Tensor
    kept: tuple[tuple[Tensor, ...], ...]
    semantic: Tensor | None
    forecast: Tensor | None
    action: Tensor | None
    tokens_full: int
    tokens_kept: int
    visual_full: int
    visual_kept: int
    per_view: bool
    visual_valid: Tensor | None = None
    tokens_per_layer: tuple[int, ...] = ()
    stages: tuple[StageReport, ...] = ()
    keys_per_layer: tuple[int, ...] = ()
    reused: Tensor | None = None
    ms: float | None = None
    left_alone: str | None = None

    def __str__(self) -> str:
        """One line for people."""
        if self.left_alone is not None:
            return f"left alone: {self.left_alone}"
        rows = "" if len(self.episodes) == 1 else f"{len(self.episodes)} rows, "
        full = int(self.warm_up.sum())
        state = "" if not full else ("all tokens, " if full == len(self.warm_up) else "some rows ")
        cut = "".join(f" before layer {stage.layer}" for stage in self.stages[-1:])
        took = "" if self.ms is None else f", {self.ms:.1f} ms"
        return (
            f"{rows}{state}{self.visual_kept} of {self.visual_full} visual tokens kept{cut}, "
            f"{self.tokens_kept} of {self.tokens_full} in all{took}"
        )

    @property
    def kept_indices(self) -> Tensor:
        """`[B, k]` int64 kept visual tokens in 0..M-1, ascending.

        Raises:
            ValueError: rows keep different numbers of tokens (some of them are warming up).
        """
        counts = self.kept_mask.sum(dim=1)
        if not bool((counts == counts[0]).all()):
            raise ValueError(
                f"rows keep {counts.tolist()} tokens, as some episodes are warming up; "
                "use `kept` or `kept_mask`."
            )
        return self.kept_mask.nonzero()[:, 1].view(len(self.kept_mask), -1)

    def reasons(self) -> list[list[str]]:
        """Why each kept token stayed, row by row, in the order of the kept indices.

        "semantic" or "action": among the k best of that score; "both"; "warm-up": everything
        stayed; "other": neither score says so (random choice, no pruning).
        """
        semantic = self._best(self.semantic)
        action = self._best(self.forecast)
        names = (("other", "action"), ("semantic", "both"))
        result = []
        for row, kept in enumerate(self.kept_mask):
            indices = kept.nonzero()[:, 0].tolist()
            if bool(self.warm_up[row]):
                result.append(["warm-up"] * len(indices))
            else:
                result.append([names[semantic[row][i]][action[row][i]] for i in indices])
        return result

    def _best(self, score: Tensor | None) -> list[list[bool]]:
        """Whether each token is among the k best, k being what its row (or camera) kept."""
        best = torch.zeros_like(self.kept_mask)
        if score is not None:
            if self.visual_valid is not None:
                score = score.masked_fill(~self.visual_valid, float("-inf"))
            for row, kept in enumerate(self.kept_mask):
                start = 0
                for size in self.views if self.per_view else (self.visual_full,):
                    span = slice(start, start + size)
                    best[row, start + top_k(score[row, span], int(kept[span].sum()))] = True
                    start += size
        return best.tolist()


def report(step: Step, cut: Cut) -> StepReport:
    """The report of a step, as far as it has come."""
    prefill, views, plan = step.prefill, step.prefill.layout.views, cut.plan
    batch, visual = len(step.ids), sum(views)
    device = prefill.layout.visual.device
    warm_up = torch.tensor(step.full, dtype=torch.bool, device=device)
    mask = torch.ones(batch, visual, dtype=torch.bool, device=device)
    stages = []
    for layer, left in zip(plan.cuts, prefill.sets[1:], strict=False):
        if prefill.mode != "full" and left.tokens is not None:
            mask = torch.zeros_like(mask).scatter(1, left.tokens, True) | warm_up[:, None]
            mask = mask if left.reused is None else ~left.reused
            stages.append(StageReport(layer, mask))
    kept = tuple(tuple(view.nonzero()[:, 0] for view in row.split(list(views))) for row in mask)
    lengths = [prefill.length_at(number) for number in range(len(prefill.sets))]
    semantic = plan.asked[0].get("semantic") if plan.asked else None
    computed: tuple[int, ...] = ()
    if step.left_alone is None:
        computed = tuple(
            0 if layer in plan.skipped else lengths[number]
            for layer, number in enumerate(plan.number)
        )
    return StepReport(
        episodes=step.ids,
        steps=step.numbers,
        views=views,
        warm_up=warm_up,
        kept_mask=mask,
        kept=kept,
        semantic=None if semantic is None else prefill.scores.get(semantic),
        forecast=prefill.forecast,
        action=step.action(),
        tokens_full=prefill.length,
        tokens_kept=lengths[-1],
        visual_full=visual,
        visual_kept=visual - (prefill.length - lengths[-1]),
        per_view=cut.method.budget == "view",
        visual_valid=prefill.layout.visual_valid,
        tokens_per_layer=computed,
        stages=tuple(stages),
        keys_per_layer=cut.keys_per_layer(prefill, computed),
        reused=cut.reused(prefill, batch),
        ms=step.ms,
        left_alone=step.left_alone,
    )
