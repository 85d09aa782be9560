"""openpi's door over an engine that counts: an action is episode, step, place, 9, 9, 9, 0.5."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import numpy as np

from vla_pruner.doors.door import Listen
from vla_pruner.doors.keys import KEYS, Robot
from vla_pruner.doors.openpi import OpenpiDoor
from vla_pruner.serving.engine import Reply

CHUNK = 8


class Counting:
    """As an engine, without a policy."""

    def __init__(self, sleep: float) -> None:
        self.sleep, self.steps, self.numbers = sleep, {}, itertools.count()  # type: ignore[var-annotated]

    def open(self, label: str = "") -> int:
        number = next(self.numbers)
        self.steps[number] = 0
        return number

    async def act(
        self, episode: int, observation: Any, *, deadline_s: float | None = None
    ) -> Reply:
        await asyncio.sleep(self.sleep)
        actions = np.full((CHUNK, 7), 9, np.float32)
        actions[:, 0], actions[:, 1] = episode, self.steps[episode]
        actions[:, 2], actions[:, 6] = np.arange(CHUNK), 0.5
        self.steps[episode] += 1
        return Reply(actions, False, self.sleep, CHUNK, 1.0, None, False, 1.0, "counting")

    async def end(self, episode: int) -> None:
        self.steps.pop(episode, None)


def run(port: int, sleep: float, token: str | None, told: Any) -> None:
    """Serve until killed; the address goes to `told.send`."""
    engine: Any = Counting(sleep)
    listen = Listen(port=port, token=token)
    door = OpenpiDoor(engine, listen, Robot(1, 8, gripper="robosuite"), KEYS["libero"])
    asyncio.run(door.serve(told.send))
