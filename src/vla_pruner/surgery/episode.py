"""What a session remembers of each episode, and what it makes of it when a step starts."""

from __future__ import annotations

import math
import zlib
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from vla_pruner.methods.base import Method, StepContext
from vla_pruner.surgery.plan import Plan
from vla_pruner.surgery.prompt import Prompt


@dataclass(eq=False)
class Step:
    """One policy step of a batch: a prefill and all decoder passes that follow it."""

    ids: tuple[Hashable, ...]
    numbers: tuple[int, ...]
    full: tuple[bool, ...]
    """Rows that run on all tokens."""
    prompt: Prompt
    action_layers: int
    total: Tensor | None = None
    """[B, M] sum over watched layers and action rows."""
    rows: int = 0

    def add(self, observed: Tensor, rows: int) -> None:
        """Count a pass in: `observed` [B, M] is a mean over `rows` action rows."""
        part = observed * rows
        self.total = part if self.total is None else self.total + part
        self.rows += rows

    def action(self) -> Tensor | None:
        """Action score [B, M] of the passes so far (Eq. 3-4); None if no action row ran."""
        if self.total is None:
            return None
        return self.total / (self.rows * self.action_layers)

    def kept(self, row: int, stage: int) -> Tensor | None:
        """[M] bool, tokens of a row left after `stage` cuts; None: it never came so far."""
        prompt = self.prompt
        everything = torch.ones_like(prompt.layout.visual[0], dtype=torch.bool)
        if stage == 0 or prompt.mode == "full" or self.full[row]:
            return everything
        tokens = prompt.stages[stage].tokens
        return None if tokens is None else ~everything.scatter(0, tokens[row], False)


@dataclass(eq=False)
class Episode:
    """What is remembered of one episode."""

    memory: Tensor | None = None
    """[slots, M] action scores, newest first."""
    observations: int = 0
    steps: int = 0
    """Steps that have started."""
    since_full: int = 0
    """Pruned steps since the last full one."""
    step: Step | None = None
    """The step in progress, whose action score is not complete yet."""
    motion: list[float] = field(default_factory=list)
    """What the caller reported."""
    forecast: Tensor | None = None
    observed: Tensor | None = None
    kept: Tensor | None = None
    """[M] of the last step, see `StepContext`."""
    features: Tensor | None = None
    """[M, D] projected visual tokens of the last step, if the method wants to see change."""
    change: Tensor | None = None
    """[M] of the step that starts, see `StepContext`."""


class Episodes:
    """All episodes of one session, by name."""

    def __init__(self, method: Method, plan: Plan) -> None:
        self.method = method
        self.plan = plan
        self._known: dict[Hashable, Episode] = {}

    def reset(self, names: Iterable[Hashable] | None = None) -> None:
        """Forget these episodes, or all."""
        if names is None:
            self._known.clear()
        else:
            for name in names:
                self._known.pop(name, None)

    def motion(self, value: float, name: Hashable) -> None:
        """Note how far the robot of an episode moved."""
        if not math.isfinite(value):
            raise ValueError(f"`motion={value}` must be a finite number.")
        self._known.setdefault(name, Episode()).motion.append(float(value))

    def begin(self, ids: Sequence[Hashable], features: Tensor | None) -> tuple[bool, ...]:
        """The last step of these episodes is over: remember it. Which rows run on all tokens now?

        Args:
            ids: episode of each row.
            features: `[B, M, D]` this step's visual embeddings, if the method wants to see change.

        Raises:
            ValueError: a method that needs motion gets none; or the cameras changed.
        """
        self._refuse_still(ids)
        answers: dict[Hashable, bool] = {}
        for row, name in enumerate(ids):
            if name in answers:
                continue
            episode = self._known.setdefault(name, Episode())
            self._finish(episode, name)
            if features is not None:
                episode.change, episode.features = _change(episode.features, features[row])
            context = StepContext(
                step=episode.steps,
                since_full=episode.since_full,
                motion=tuple(episode.motion),
                forecast=episode.forecast,
                observed=episode.observed,
                kept=episode.kept,
                change=episode.change,
            )
            answers[name] = bool(self.method.full_step(context))
        return tuple(answers[name] for name in ids)

    def numbers(self, ids: Sequence[Hashable]) -> tuple[int, ...]:
        """Steps that each row's episode has started."""
        return tuple(self._known[name].steps for name in ids)

    def note(self, step: Step) -> None:
        """A step begins in its episodes."""
        for name, full in dict(zip(step.ids, step.full, strict=True)).items():
            episode = self._known[name]
            episode.step = step
            episode.steps += 1
            episode.since_full = 0 if full else episode.since_full + 1

    def forecast(self, ids: Sequence[Hashable], visual: int, device: torch.device) -> Tensor | None:
        """[B, M] action score that each row's episode predicts."""
        spec = self.method.history
        if spec is None:
            return None
        blank = torch.zeros(spec.slots, visual, dtype=torch.float32, device=device)
        memory, counts, changes = [], [], []
        for name in ids:
            episode = self._known[name]
            known = blank if episode.memory is None else episode.memory
            if known.shape[1] != visual:
                raise _cameras_changed(name, known.shape[1], visual)
            memory.append(known)
            counts.append(episode.observations)
            change = episode.change
            changes.append(blank.new_zeros(()) if change is None else change.mean().to(device))
        count = torch.tensor(counts, dtype=torch.int64, device=device)
        if not spec.adapt:
            return spec.forecast(torch.stack(memory), count)
        return spec.forecast(torch.stack(memory), count, torch.stack(changes))

    def seeds(self, ids: Sequence[Hashable], device: torch.device) -> Tensor:
        """[B] a number for each row's step, the same in every process."""
        made = [
            zlib.crc32(f"{name!r}/{number}".encode())
            for name, number in zip(ids, self.numbers(ids), strict=True)
        ]
        return torch.tensor(made, dtype=torch.int64, device=device)

    def _refuse_still(self, ids: Sequence[Hashable]) -> None:
        if "motion" not in self.method.needs:
            return
        for name in ids:
            episode = self._known.get(name)
            if episode is not None and episode.steps and not episode.motion:
                raise ValueError(
                    f"method {self.method.name!r} decides by the robot's motion, and none was "
                    f"reported for episode {name!r}; call `session.motion(distance)` after each "
                    "step, or use another method."
                )

    def _finish(self, episode: Episode, name: Hashable) -> None:
        """Remember what the episode's step in progress showed, which is over now."""
        step, spec = episode.step, self.method.history
        episode.step = None
        if step is None:
            return
        rows = [row for row, other in enumerate(step.ids) if other == name]
        prompt, first = step.prompt, slice(rows[0], rows[0] + 1)
        episode.forecast = None if prompt.forecast is None else prompt.forecast[rows[0]]
        episode.kept = step.kept(rows[0], len(self.plan.cuts))
        episode.observed = None
        action = step.action()
        if action is None or spec is None:
            return
        observed = action[first] if len(rows) == 1 else action[rows].mean(dim=0, keepdim=True)
        episode.observed = observed[0]
        if episode.memory is None:
            episode.memory = observed.new_zeros(spec.slots, observed.shape[1])
        if episode.memory.shape[1] != observed.shape[1]:
            raise _cameras_changed(name, episode.memory.shape[1], observed.shape[1])
        number = self.plan.asked[0].get("semantic") if self.plan.asked else None
        semantic = None if number is None else prompt.scores.get(number)
        seen = step.kept(rows[0], self.plan.action_stage)
        memory, _ = spec.update(
            episode.memory[None],
            torch.tensor([episode.observations], dtype=torch.int64, device=observed.device),
            observed,
            kept=None if seen is None else seen[None],
            semantic=None if semantic is None else semantic[first],
        )
        episode.memory = memory[0]
        episode.observations += 1


def _change(before: Tensor | None, now: Tensor) -> tuple[Tensor | None, Tensor]:
    """[M] 1 - cosine of two steps' features [M, D], and what to keep for the next step."""
    now = now.detach().float()
    if before is None or before.shape != now.shape:
        return None, now
    return 1 - F.cosine_similarity(before, now, dim=-1), now


def _cameras_changed(name: Hashable, before: int, now: int) -> ValueError:
    return ValueError(
        f"episode {name!r} had {before} visual tokens and now has {now}; "
        "call `session.reset()` when the cameras change."
    )
