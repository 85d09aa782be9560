"""Messages as vla-eval's benchmarks send them, and clients that speak its protocol."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import numpy as np
from tiny_openvla import picture
from vla_eval.connection import Connection
from vla_eval.model_servers.serve import serve_async

from vla_pruner.serving.server import PolicyServer


def message(seed: int, instruction: str = "pick up the can") -> dict[str, Any]:
    """What LIBERO's class sends, with random pixels."""
    return {
        "images": {"agentview": picture(2 * seed), "wrist": picture(2 * seed + 1)},
        "task_description": instruction,
        "states": np.random.default_rng(seed).uniform(-0.4, 0.4, 8),
    }


@asynccontextmanager
async def serving(server: PolicyServer) -> AsyncIterator[str]:
    """The address of a server that runs inside the block."""
    async with anyio.create_task_group() as group:
        port = await group.start(serve_async, server, "127.0.0.1", 0)
        yield f"ws://127.0.0.1:{port}"
        group.cancel_scope.cancel()


@asynccontextmanager
async def client(url: str, task: str | None = "a task", episode: int = 0) -> AsyncIterator[Any]:
    """vla-eval's client, connected and, unless `task` is None, in an episode."""
    connection = Connection(url, timeout=60, max_retries=1)
    await connection.connect()
    try:
        if task is not None:
            await start(connection, task, episode)
        yield connection
    finally:
        await connection.close()


async def start(connection: Connection, task: str = "a task", episode: int = 0) -> None:
    """Begin an episode."""
    await connection.start_episode({"task": {"name": task, "episode_idx": episode}})


async def act(connection: Connection, seeds: list[int]) -> list[np.ndarray]:
    """The server's actions on the messages of these seeds, in turn."""
    return [(await connection.act(message(seed)))["actions"] for seed in seeds]


def ask(server: PolicyServer, talk: Callable[[str], Awaitable[Any]]) -> Any:
    """What `talk(url)` returns while the server runs."""

    async def both() -> Any:
        with anyio.fail_after(300):
            async with serving(server) as url:
                return await talk(url)

    return anyio.run(both)


def lone_run(server: PolicyServer, seeds: list[int]) -> list[np.ndarray]:
    """The same steps without a server: a new history, then `predict_action` for each message."""
    session, policy = server.served.session, server.served.policy
    session.reset()
    session.episodes(None)
    answers = []
    for seed in seeds:
        seen = message(seed)
        actions = policy.predict_action(
            list(seen["images"].values()),
            seen["task_description"],
            seen["states"],
            unnorm_key="pick_place",
        )
        answers.append(server.translator.actions(np.atleast_2d(actions)[0]))
    return answers
