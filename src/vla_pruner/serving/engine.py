"""What a door may ask: one policy under one method, for many episodes, one pass at a time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vla_pruner.serving.policy import EpisodeKey, ServedPolicy


class Refused(ValueError):
    """The client's own fault: one sentence, for that client alone."""


class Busy(RuntimeError):
    """The server takes no more: it is draining, or has too many episodes."""


class Hung(RuntimeError):
    """The call did not come back and its worker was replaced; start the episode anew."""


@dataclass(frozen=True)
class Reply:
    """One answer.

    Args:
        actions: float32 `[H, D]`, in robot units, finite.
        late: the rest of the last chunk, because the deadline passed.
        age_s: age of the observation that the actions answer.
        valid: steps of `actions` that are still valid.
        keep: share of the visual tokens used in this call.
        tokens: their number; None: not known.
        warm_up: all tokens, because the history was short.
        infer_ms: time in the policy.
        method: name of the pruning method.
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


class Engine:
    """Asks the policy in a thread, one observation at a time."""

    def __init__(self, served: ServedPolicy, *, deadline_s: float | None = None) -> None:
        self.served, self.deadline_s = served, deadline_s
        self._turn = asyncio.Lock()
        self._draining = False

    async def start(self) -> None:
        """Nothing to prepare."""

    def open(self, label: str = "") -> EpisodeKey:
        """A new episode. Raises Busy: the server is draining."""
        if self._draining:
            raise Busy("the server is ending and takes no new episode")
        return self.served.start(label)

    async def act(
        self,
        episode: EpisodeKey,
        observation: Mapping[str, Any],
        *,
        deadline_s: float | None = None,
    ) -> Reply:
        """Actions for an observation. Raises Refused, Busy."""
        begun = time.monotonic()
        async with self._turn:
            if self._draining:
                raise Busy("the server is ending")
            started = time.monotonic()
            try:
                made = await asyncio.to_thread(self.served.act, [episode], [observation])
            except (ValueError, TypeError) as error:
                raise Refused(str(error)) from error
            took = time.monotonic() - started
        actions = np.atleast_2d(made[0])
        report = self.served.session.last
        kept = None if report is None else int(report.visual_kept)
        share = 1.0 if report is None else report.visual_kept / max(report.visual_full, 1)
        warm = report is not None and bool(report.warm_up.any())
        name = type(self.served.session.method).name
        age = time.monotonic() - begun
        return Reply(actions, False, age, len(actions), share, kept, warm, took * 1000, name)

    async def end(self, episode: EpisodeKey) -> None:
        """Forget an episode."""
        self.served.end(episode)

    async def drain(self, timeout_s: float) -> None:
        """Finish what runs, refuse what comes."""
        self._draining = True
        async with asyncio.timeout(timeout_s), self._turn:
            pass
