"""Which episode a client is in: a protocol without resets needs a rule, and this is the rule."""

from __future__ import annotations

import contextlib
import logging
import secrets
import time
from collections import OrderedDict, deque
from collections.abc import Mapping
from typing import Any

from vla_pruner._short import printable, short
from vla_pruner.serving.engine import Busy, Engine, Hung, Refused, Reply
from vla_pruner.serving.limits import indented

logger = logging.getLogger(__name__)

A_MINUTE = 20
"""At most so many entries about bad requests are written to the log in a minute."""
_written: deque[float] = deque(maxlen=A_MINUTE)

RULE = (
    "a new episode begins on a new connection, a changed instruction, a changed session_id, "
    "after a reset, and where an observation says `reset: true`"
)


class Visit:
    """One client: at most one episode at a time, and at most one question."""

    def __init__(self, engine: Engine, client: str) -> None:
        self.engine, self.client = engine, client
        self.seen = time.monotonic()
        self._episode: Any = None
        self._told: tuple[str, Any] | None = None
        self._asking = False
        self.closed = False

    @property
    def asking(self) -> bool:
        """Whether a question of this client is being answered."""
        return self._asking

    async def act(
        self,
        observation: Mapping[str, Any],
        *,
        session: Any = None,
        reset: bool = False,
        deadline_s: float | None = None,
    ) -> Reply:
        """The engine's answer, in the episode that this client is in.

        Raises:
            Refused, Busy, Hung: as the engine; Refused also where the last question of the client
                is not answered yet.
        """
        if self._asking:
            raise Refused(
                "the last observation of this client is not answered yet; ask one at a time, and "
                "give each robot its own connection or session_id"
            )
        if session is not None and not isinstance(session, str | int):
            raise Refused(f"session_id is {short(session)}; expected a text or a number")
        self._asking, self.seen = True, time.monotonic()
        try:
            told = (str(observation.get("instruction")), session)
            if reset or self._told != told:
                await self._end()
            if self._episode is None:
                self._episode, self._told = self.engine.open(f"{told[0]}/{session or 0}"), told
            try:
                return await self.engine.act(self._episode, observation, deadline_s=deadline_s)
            except Hung:
                await self._end()
                raise
        finally:
            self._asking, self.seen = False, time.monotonic()

    async def reset(self) -> None:
        """The next observation begins an episode. Raises Refused: while one is being answered."""
        if self._asking:
            raise Refused("reset came while an observation was being answered; wait for its reply")
        self.seen = time.monotonic()
        await self._end()

    async def close(self) -> None:
        """The client is gone."""
        self.closed = True
        with contextlib.suppress(Exception):  # an engine that is ending has forgotten it already
            await self._end()

    async def _end(self) -> None:
        episode, self._episode, self._told = self._episode, None, None
        if episode is not None:
            await self.engine.end(episode)


class Visits:
    """Clients of a protocol that does not say when one goes away.

    One who has been silent for `idle_s` is gone; above `most` clients, new ones are refused.
    """

    def __init__(self, engine: Engine, idle_s: float = 300.0, most: int = 1024) -> None:
        self.engine, self.idle_s, self.most = engine, idle_s, most
        self._visits: OrderedDict[Any, Visit] = OrderedDict()

    def __len__(self) -> int:
        return len(self._visits)

    async def of(self, client: Any) -> Visit:
        """The visit of a client, a new one where there is none. Raises Busy: too many."""
        await self._forget()
        found = self._visits.get(client)
        if found is None:
            if len(self._visits) >= self.most:
                raise Busy(f"{len(self._visits)} clients are being served; no more are taken")
            found = self._visits[client] = Visit(self.engine, short(client))
        self._visits.move_to_end(client)
        return found

    async def reset(self, client: Any) -> None:
        """The client's next observation begins an episode. Raises Refused: as `Visit.reset`."""
        if (found := self._visits.get(client)) is not None:
            await found.reset()

    async def _forget(self) -> None:
        before = time.monotonic() - self.idle_s
        while self._visits:
            client, oldest = next(iter(self._visits.items()))
            if oldest.seen > before or oldest.asking:
                return
            del self._visits[client]
            await oldest.close()

    async def close(self) -> None:
        """All clients are gone."""
        while self._visits:
            await self._visits.popitem()[1].close()


def sentence(error: BaseException, door: str, client: str) -> str:
    """What a client is told of an error: its own fault in full, ours as a number that is logged."""
    if isinstance(error, Refused | Busy | Hung):
        return printable(str(error))
    number = secrets.token_hex(4)
    if may_log():
        logger.error("%s: error %s for %s\n%s", door, number, short(client), indented(error))
    return f"the server failed at this request (error {number} in its log)"


def may_log() -> bool:
    """Whether the log may have another entry that a client can cause."""
    now = time.monotonic()
    if len(_written) == A_MINUTE and now - _written[0] < 60:
        return False
    _written.append(now)
    return True
