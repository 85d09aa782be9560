"""Which of the waiting observations go into the next pass: rows of one kind, the oldest first."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from vla_pruner.serving.policy import Step
from vla_pruner.serving.worker import Worker

SHORT_TEXT = 8
"""Instructions below 2 ** SHORT_TEXT bytes count as one length."""


@dataclass(eq=False)
class Chunk:
    """The newest actions of an episode: what they are, and from which of its steps on."""

    step: Step
    arrived: float
    position: int


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
    running: int = 0


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
