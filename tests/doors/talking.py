"""Observations, doors that are open inside a block, and what clients of them say."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
from tiny_openvla import picture

from vla_pruner.doors.door import Door
from vla_pruner.doors.keys import Robot
from vla_pruner.serving.engine import Engine
from vla_pruner.serving.policy import ServedPolicy

ROBOT = Robot(cameras=2, state_dim=8, action_dim=7, gripper="rlds")
"""The policy of these tests."""
STEPS = [1, 2, 3, 4, 5]
"""More than the three steps that `vla-pruner` takes on all tokens."""


def seen(seed: int) -> dict[str, Any]:
    """What the policy reads, with random pixels."""
    return {
        "images": [picture(2 * seed), picture(2 * seed + 1)],
        "instruction": "pick up the can",
        "proprio": np.random.default_rng(seed).uniform(-0.4, 0.4, 8),
    }


def libero(seed: int) -> dict[str, Any]:
    """The same as openpi's LIBERO client says it."""
    row = seen(seed)
    return {
        "observation/image": row["images"][0],
        "observation/wrist_image": row["images"][1],
        "observation/state": row["proprio"],
        "prompt": row["instruction"],
    }


def near(got: Any, wanted: Any) -> bool:
    """Whether two lists of arrays are the same up to rounding."""
    got, wanted = np.stack(got), np.stack(wanted)
    scale = np.abs(wanted).max()
    return got.shape == wanted.shape and bool(np.abs(got - wanted).max() <= 1e-5 * scale)


@asynccontextmanager
async def opened(door: Door) -> AsyncIterator[str]:
    """The address of a door that is open inside the block."""
    address: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(door.serve(address.set_result))
    await asyncio.wait([task, address], return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        await task
    try:
        yield await address
    finally:
        task.cancel()
        await asyncio.wait([task])


def ask(
    served: ServedPolicy,
    make: Callable[[Engine], Door],
    talk: Callable[[str], Awaitable[Any]],
    limit_s: float | None = 120,
) -> Any:
    """What `talk(address)` returns while the door of an engine is open."""

    async def both() -> Any:
        engine = Engine(served)
        await engine.start()
        async with opened(make(engine)) as address:
            return await asyncio.wait_for(talk(address), limit_s)

    return asyncio.run(both())
