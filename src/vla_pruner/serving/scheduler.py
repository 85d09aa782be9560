"""Which waiting observations go into the next pass (one kind, oldest first), and what is told."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np

from vla_pruner.serving.policy import Step
from vla_pruner.serving.worker import Worker

SHORT_TEXT = 8
"""Instructions below 2 ** SHORT_TEXT bytes count as one length."""


@dataclass(frozen=True, eq=False)
class Reply:
    """An answer to one observation.

    Args:
        actions: float32 `[H, dim]`, robot units, finite; `[0, dim]` if nothing is left.
        late: the deadline passed; `actions` are the rest of the last chunk.
        age_s: seconds since the observation came that the actions answer.
        valid: steps of `actions` that may still be carried out.
        keep, tokens: share and number of the visual tokens that were used; None: not known.
        warm_up: all tokens were used, because the history was short.
        infer_ms: milliseconds of the pass.
        method: name of the method.
    """

    actions: np.ndarray
    late: bool
    age_s: float
    valid: int
    keep: float
    tokens: int | None
    warm_up: bool
    infer_ms: float
    method: str


@dataclass(eq=False)
class Chunk:
    """The newest actions of an episode: what they are, and from which of its steps on."""

    step: Step
    arrived: float
    position: int

    def reply(self, position: int, *, late: bool = False) -> Reply:
        """What is left of it for an episode that has come so far."""
        step = self.step
        rest = step.actions[position - self.position :]
        return Reply(
            actions=rest,
            late=late,
            age_s=time.monotonic() - self.arrived,
            valid=len(rest),
            keep=step.keep,
            tokens=step.tokens,
            warm_up=step.warm_up,
            infer_ms=1000 * step.seconds,
            method=step.method,
        )


@dataclass(eq=False)
class Episode:
    """One episode, as the event loop sees it."""

    number: int
    label: str
    lane: Lane
    warm_up: bool
    position: int = 0
    """Steps that the client has carried out, as far as is known."""
    handed: int = 0
    """Steps of the last reply that it will carry out."""
    chunk: Chunk | None = None
    row: Row | None = None
    """The observation that waits or runs."""
    waited_for: bool = False
    """Whether somebody waits for it."""
    lost: Exception | None = None
    """That its worker was replaced, where nobody waited to hear of it."""
    asked: int = 0
    """Observations that were answered."""
    replied: float = 0.0
    think: float = float("inf")
    """Seconds that the client took from the last reply to its next observation."""


@dataclass(eq=False)
class Row:
    """An observation on its way through the policy."""

    episode: Episode
    seen: Mapping[str, Any]
    arrived: float
    position: int
    text: int
    done: asyncio.Future[Step]

    @property
    def warm_up(self) -> bool:
        return self.episode.warm_up

    def over(self, done: asyncio.Future[Step]) -> None:
        """Let go of the observation: an episode may stay open for days."""
        if not done.cancelled():
            done.exception()  # An answer that came too late for anybody is no error.
        if self.episode.row is self:
            self.episode.row = None


@dataclass(eq=False)
class Lane:
    """A worker, the thread that calls it, and what waits for it."""

    worker: Worker
    thread: Executor
    waiting: list[Row] = field(default_factory=list)
    episodes: dict[int, Episode] = field(default_factory=dict)
    ended: list[int] = field(default_factory=list)
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    warm_up: bool = True
    running: list[Row] = field(default_factory=list)
    """Rows of the pass that runs."""
    alive: bool = True
    """Whether its worker runs, and is not being replaced."""

    @property
    def busy(self) -> bool:
        """Whether somebody may still be answered."""
        return bool(self.waiting) or any(not row.done.done() for row in self.running)

    def leave_to(self, others: Sequence[Lane]) -> None:
        """Give episodes, which have no history any more, and what they ask to lanes that run."""
        for number, episode in list(self.episodes.items()):
            lane = min(others, key=lambda lane: len(lane.episodes))
            del self.episodes[number]
            lane.episodes[number] = episode
            episode.lane, episode.warm_up = lane, lane.warm_up
            if episode.row is not None and episode.row in self.waiting:
                self.waiting.remove(episode.row)
                lane.waiting.append(episode.row)
                lane.wake.set()


class Waits(Protocol):
    """What the choice looks at."""

    @property
    def warm_up(self) -> bool:
        """Whether the step runs on all tokens."""

    @property
    def text(self) -> int:
        """Bytes of the instruction."""


R = TypeVar("R", bound=Waits)


def next_pass(waiting: Sequence[R], most: int) -> list[R]:
    """Rows of the next pass: at most `most`, all of the oldest one's kind, in order of arrival.

    A pass with warm-up rows among pruned ones would run on all tokens and hide those that are
    pruned; a long prompt would pad all others to its length. Either costs everybody, so such rows
    run by themselves. The oldest row is always in it: nobody starves.
    """
    if not waiting:
        return []
    wanted = kind(waiting[0])
    return [row for row in waiting if kind(row) == wanted][:most]


def kind(row: Waits) -> tuple[bool, int]:
    """Rows of one kind share a pass: warm-up or not, and prompts of about one length."""
    return row.warm_up, max(row.text.bit_length(), SHORT_TEXT)


async def linger(lane: Lane, most: int, wait_s: float) -> None:
    """Wait a moment for clients that are known to come back at once, if that fills the pass."""
    until = time.monotonic() + wait_s
    while wait_s and lane.waiting and len(lane.waiting) < most:
        now = time.monotonic()
        soon = any(
            episode.think < wait_s and now - episode.replied < wait_s and not episode.waited_for
            for episode in lane.episodes.values()
        )
        if not soon or now >= until:
            return
        lane.wake.clear()
        try:
            async with asyncio.timeout(until - now):
                await lane.wake.wait()
        except TimeoutError:
            return
