"""Which episode a row belongs to, and what a session remembers of each when a step starts."""

from __future__ import annotations

import math
import threading
import zlib
from collections import OrderedDict, deque
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from vla_pruner._numbers import on_device
from vla_pruner.core import refusals
from vla_pruner.core.layout import Layout
from vla_pruner.core.plan import Plan
from vla_pruner.core.tokens import Prefill, TokenIndex, TokenSet
from vla_pruner.methods.base import Method, StepContext
from vla_pruner.pruning.history import HistorySpec

MOST_EPISODES = 1024
"""Episodes that are remembered at once; the one that acted longest ago is forgotten first."""

_MOST_MOTION = 256
_NOTHING = torch.zeros(0, 0, dtype=torch.float32, device="cpu")


@dataclass(eq=False)
class Step:
    """One policy step of a batch: a prefill and all decoder passes that follow it.

    It counts once it is over, unless a pass of it was interrupted: then it never was.
    """

    ids: tuple[Hashable, ...]
    numbers: tuple[int, ...]
    full: tuple[bool, ...]
    """Rows that run on all tokens."""
    prefill: Prefill
    action_layers: int
    total: Tensor | None = None
    """[B, M] sum over watched layers and action rows."""
    rows: int = 0
    whole: bool = False
    """Whether no pass was interrupted."""
    failed: bool = False
    """Whether the call that it belongs to raised an exception."""
    left_alone: str | None = None
    """Why nothing was pruned although there may have been an image."""
    ms: float | None = None
    """Wall-clock time of the call."""

    @staticmethod
    def of_nothing(reason: str, length: int) -> Step:
        """What a prefill of `length` tokens is to callers that was left alone, and why."""
        blank = torch.zeros(1, 0, dtype=torch.int64)
        layout = Layout(blank, ())
        index = TokenIndex.of(layout, 1, length)
        prefill = Prefill(layout, "full", index, (TokenSet((), blank, blank),))
        return Step((), (), (), prefill, 0, left_alone=reason)

    def add(self, observed: Tensor, rows: int) -> None:
        """Count a pass in: `observed` [B, M] is a mean over `rows` action rows."""
        part = observed * rows
        self.total = part if self.total is None else self.total + part
        self.rows += rows

    def action(self) -> Tensor | None:
        """Action score [B, M] of the passes so far (Eq. 3-4); None if no action row ran."""
        return None if self.total is None else self.total / (self.rows * self.action_layers)

    def kept(self, row: int, cuts: int) -> Tensor | None:
        """[1, M] bool, tokens of a row left after `cuts` cuts; None: it never came so far."""
        prefill = self.prefill
        everything = torch.ones_like(prefill.layout.visual[:1], dtype=torch.bool)
        if cuts == 0 or prefill.mode == "full" or self.full[row]:
            return everything
        tokens = prefill.sets[cuts].tokens
        return None if tokens is None else ~everything.scatter(1, tokens[row : row + 1], False)


@dataclass(eq=False)
class Episode:
    """What is remembered of one episode."""

    memory: Tensor = _NOTHING
    """[slots, M] action scores, newest first."""
    observations: int = 0
    steps: int = 0
    """Steps that are over."""
    since_full: int = 0
    """Pruned steps since the last full one."""
    step: Step | None = None
    """The step in progress, whose action score is not complete yet."""
    motion: deque[float] = field(default_factory=lambda: deque(maxlen=_MOST_MOTION))
    """What the caller reported."""

    def context(self) -> StepContext:
        """What a method is told of the next step."""
        return StepContext(step=self.steps, since_full=self.since_full, motion=tuple(self.motion))


@dataclass(eq=False)
class _Block:
    """A `with session.episode(...)` that is open."""

    ids: tuple[Hashable, ...] | None
    outer: _Block | None


_innermost: ContextVar[dict[int, _Block]] = ContextVar("blocks of this thread or task")


class Names:
    """Which episode each row of the next call belongs to: said for everybody, or within a block.

    Threads and tasks may have blocks open at once; each of them is in its own.
    """

    def __init__(self) -> None:
        self.said: tuple[Hashable, ...] | None = None
        """What holds where no block is open."""
        self.blocks: list[_Block] = []

    def _mine(self) -> _Block | None:
        blocks = list(self.blocks)  # Other threads enter and leave meanwhile.
        mine = _innermost.get({}).get(id(self))
        while mine is not None and mine not in blocks:  # Left, in another order.
            mine = mine.outer
        if mine is None and blocks:
            around = [one.outer for one in blocks]
            mine, *others = [one for one in blocks if one not in around]
            if others:
                raise refusals.outside_the_blocks([one.ids for one in (mine, *others)])
        return mine

    @property
    def ids(self) -> tuple[Hashable, ...] | None:
        """None: row i is episode i. Errors: RuntimeError, called outside of several blocks."""
        mine = self._mine()
        return self.said if mine is None else mine.ids

    @ids.setter
    def ids(self, ids: tuple[Hashable, ...] | None) -> None:
        mine = self._mine()
        if mine is None:
            self.said = ids
        else:
            mine.ids = ids

    @contextmanager
    def block(self, ids: tuple[Hashable, ...]) -> Iterator[None]:
        """Rows of calls inside belong to these."""
        around = _innermost.get({})
        mine = _Block(ids, around.get(id(self)))
        self.blocks.append(mine)
        _innermost.set({**around, id(self): mine})
        try:
            yield
        finally:
            self.blocks.remove(mine)
            rest = {key: one for key, one in _innermost.get({}).items() if key != id(self)}
            _innermost.set(rest if mine.outer is None else {**rest, id(self): mine.outer})


class Episodes:
    """All episodes of one session, by name. Any thread may call `reset` and `motion`."""

    def __init__(self, method: Method, plan: Plan) -> None:
        self.method = method
        self.plan = plan
        self._known: OrderedDict[Hashable, Episode] = OrderedDict()
        self._lock = threading.RLock()
        self._spec = method.history
        self._slots = 0 if self._spec is None else self._spec.slots
        self._needs_motion = "motion" in method.needs

    def reset(self, names: Iterable[Hashable] | None = None) -> None:
        """Forget these episodes, or all."""
        with self._lock:
            for name in list(self._known) if names is None else list(names):
                self._known.pop(name, None)

    def motion(self, value: float, name: Hashable) -> None:
        """Note how far the robot of an episode moved."""
        if not math.isfinite(value):
            raise ValueError(f"`motion={value}` must be a finite number.")
        with self._lock:
            self._episode(name).motion.append(float(value))

    def start(self, ids: tuple[Hashable, ...], prefill: Prefill) -> Step:
        """The last step of these episodes is over, and the next begins with `prefill`, which is
        told forecast, motion and seeds. Errors: ValueError, no motion or other cameras.
        """
        with self._lock:
            if self._needs_motion:
                self._refuse_still(ids)
            visual = prefill.layout.visual
            known = {name: self._next(name, visual) for name in dict.fromkeys(ids)}
            full = {name: self.method.full_step(one.context()) for name, one in known.items()}
            episodes = [known[name] for name in ids]
            if self._spec is not None:
                prefill.forecast = self._forecast(episodes, self._spec)
            prefill.motion = tuple(tuple(episode.motion) for episode in episodes)
            numbers = tuple(episode.steps for episode in episodes)
            prefill.seeds = _seeds(ids, numbers, visual.device)
            rows = tuple(bool(full[name]) for name in ids)
            step = Step(ids, numbers, rows, prefill, len(self.plan.action_layers))
            for episode in episodes:
                episode.step = step
        return step

    def full_next(self, name: Hashable) -> bool:
        """Whether the next step of an episode, known or not, runs on all tokens."""
        with self._lock:
            episode = self._known.get(name) or Episode()
            step, steps, since_full = episode.step, episode.steps, episode.since_full
            if step is not None and step.whole and not step.failed:
                steps += 1
                since_full = 0 if step.full[step.ids.index(name)] else since_full + 1
            context = replace(episode.context(), step=steps, since_full=since_full)
            return bool(self.method.full_step(context))

    def inherit(self, other: Episodes) -> None:
        """Go on with the episodes of another session, whose method differs in its budget alone."""
        with other._lock, self._lock:
            for episode in other._known.values():
                other._finish(episode)
            self._known.update(other._known)

    def _episode(self, name: Hashable) -> Episode:
        """The episode of that name, now the one that acted last."""
        episode = self._known.setdefault(name, Episode())
        self._known.move_to_end(name)
        while len(self._known) > MOST_EPISODES:
            self._known.popitem(last=False)
        return episode

    def _next(self, name: Hashable, visual: Tensor) -> Episode:
        """An episode whose last step is over, and remembered for the tokens `visual` [1|B, M]."""
        episode = self._episode(name)
        self._finish(episode)
        had, size, device = episode.memory.shape[1], visual.shape[1], visual.device
        if episode.observations and had != size:
            raise refusals.other_cameras(name, had, size)
        blank = torch.zeros(self._slots, size, dtype=torch.float32, device=device)
        episode.memory = episode.memory.to(device) if episode.observations else blank
        return episode

    def _forecast(self, episodes: Sequence[Episode], spec: HistorySpec) -> Tensor:
        """[B, M] action score that each row's episode predicts."""
        history = torch.stack([episode.memory for episode in episodes])
        counts = [episode.observations for episode in episodes]
        if len(set(counts)) == 1:
            return spec.forecast(history, counts[0])
        return spec.forecast(history, on_device(counts, history.device))

    def _refuse_still(self, ids: Sequence[Hashable]) -> None:
        for name in ids:
            episode = self._known.get(name)
            step = None if episode is None else episode.step
            begun = episode is not None and (
                episode.steps or (step is not None and step.whole and not step.failed)
            )
            if episode is not None and begun and not episode.motion:
                raise refusals.no_motion(self.method.name, name)

    def _finish(self, episode: Episode) -> None:
        """Remember what the episode's step in progress showed, which is over now."""
        step, episode.step = episode.step, None
        if step is None or not step.whole or step.failed:
            return
        rows = [row for row, name in enumerate(step.ids) if self._known.get(name) is episode]
        episode.since_full = 0 if step.full[rows[0]] else episode.since_full + 1
        episode.steps += 1
        if self._spec is not None and (action := step.action()) is not None:
            self._remember(episode, step, action, rows)

    def _remember(self, episode: Episode, step: Step, action: Tensor, rows: list[int]) -> None:
        """The action score `[B, M]` of a step becomes part of an episode's memory."""
        spec, first = self._spec, slice(rows[0], rows[0] + 1)
        assert spec is not None
        observed = action[first] if len(rows) == 1 else action[rows].mean(dim=0, keepdim=True)
        # A broken frame (NaN, infinity) is remembered as the last good one was.
        observed = torch.where(observed.isfinite().all(), observed, episode.memory[:1])
        kept = step.kept(rows[0], self.plan.action_cuts) if spec.censored != "zero" else None
        memory, _ = spec.update(episode.memory[None], episode.observations, observed, kept)
        episode.memory = memory[0]
        episode.observations += 1


def _seeds(ids: Sequence[Hashable], numbers: Sequence[int], device: torch.device) -> Tensor:
    """[B] a number for each row's step, the same in every process."""
    steps = zip(ids, numbers, strict=True)
    made = [zlib.crc32(f"{name!r}/{number}".encode()) for name, number in steps]
    return on_device(made, device)
