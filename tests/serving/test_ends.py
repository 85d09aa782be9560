"""A process ends although a pass hangs in its thread, and waits for one that does not."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import threading
import time
from typing import Any

import numpy as np
import pytest

from vla_pruner.doors import run
from vla_pruner.doors.run import open_doors
from vla_pruner.serving.engine import Engine
from vla_pruner.serving.listen import leave
from vla_pruner.serving.policy import ServedPolicy, Step

FORK = multiprocessing.get_context("fork")


class Slow(ServedPolicy):
    """A policy without a model; a pass takes `seconds`."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.name_ = seconds, "slow"

    def start(self, label: str) -> Any:
        return object()

    def step(self, episodes: Any, observations: Any) -> list[Step]:
        time.sleep(self.seconds)
        return [Step(np.zeros((2, 7), np.float32), 1.0, None, False, False, 0.0, "slow")]

    def warm_up(self, episode: Any) -> bool:
        return False

    def blank(self) -> None:
        return None

    def end(self, episode: Any) -> None:
        """Nothing is remembered."""


def serve(seconds: float) -> None:
    """Ask once, and be told to end meanwhile."""
    run.DRAIN_S = 0.2
    engine = Engine(Slow(seconds))

    async def both() -> None:
        async def ask() -> None:
            await engine.start()
            seen = {"images": [np.zeros((4, 4, 3), np.uint8)], "instruction": "x"}
            await engine.act(engine.open(), seen)

        asking = asyncio.create_task(ask())
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        await open_doors(engine, [], lambda *_: None)
        asking.cancel()

    asyncio.run(both())
    leave(engine, 1.0)


@pytest.mark.parametrize(("seconds", "code"), [(0.8, 0), (3600.0, 1)])
def test_a_pass_that_hangs_does_not_keep_the_process(seconds: float, code: int) -> None:
    process = FORK.Process(target=serve, args=(seconds,))
    process.start()
    process.join(60)
    alive = process.is_alive()
    process.kill()
    process.join()
    assert not alive and process.exitcode == code
