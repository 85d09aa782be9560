"""What one step of a policy did: which tokens stayed, where, why, and at what length."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from vla_pruner.pruning.selection import top_k
from vla_pruner.surgery.episode import Step
from vla_pruner.surgery.plan import Plan
from vla_pruner.surgery.prompt import Prompt


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


def report(step: Step, plan: Plan, *, per_view: bool) -> StepReport:
    """The report of a step, as far as it has come."""
    prompt, views = step.prompt, step.prompt.layout.views
    batch, visual = len(step.ids), sum(views)
    device = prompt.layout.visual.device
    warm_up = torch.tensor(step.full, dtype=torch.bool, device=device)
    mask = torch.ones(batch, visual, dtype=torch.bool, device=device)
    stages = []
    for layer, stage in zip(plan.cuts, prompt.stages[1:], strict=False):
        if prompt.mode != "full" and stage.tokens is not None:
            mask = torch.zeros_like(mask).scatter(1, stage.tokens, True) | warm_up[:, None]
            mask = mask if stage.reused is None else ~stage.reused
            stages.append(StageReport(layer, mask))
    kept = tuple(tuple(view.nonzero()[:, 0] for view in row.split(list(views))) for row in mask)
    lengths = [prompt.length_at(number) for number in range(len(prompt.stages))]
    semantic = plan.asked[0].get("semantic") if plan.asked else None
    computed = tuple(
        0 if layer in plan.skipped else lengths[plan.stage(layer)] for layer in range(plan.depth)
    )
    return StepReport(
        episodes=step.ids,
        steps=step.numbers,
        views=views,
        warm_up=warm_up,
        kept_mask=mask,
        kept=kept,
        semantic=None if semantic is None else prompt.scores.get(semantic),
        forecast=prompt.forecast,
        action=step.action(),
        tokens_full=prompt.length,
        tokens_kept=lengths[-1],
        visual_full=visual,
        visual_kept=visual - (prompt.length - lengths[-1]),
        per_view=per_view,
        visual_valid=prompt.layout.visual_valid,
        tokens_per_layer=computed,
        stages=tuple(stages),
        keys_per_layer=(prompt.length,) * plan.depth if plan.recalls else computed,
        reused=_reused(prompt, plan, batch) if plan.recalls else None,
    )


def _reused(prompt: Prompt, plan: Plan, batch: int) -> Tensor:
    """`[B, T]` tokens of each row that are recalled in each layer."""
    nothing = torch.zeros(batch, dtype=torch.int64, device=prompt.layout.visual.device)
    counts = [nothing if s.reused is None else s.reused.sum(dim=1) for s in prompt.stages]
    return torch.stack([counts[plan.stage(layer)] for layer in range(plan.depth)], dim=1)
