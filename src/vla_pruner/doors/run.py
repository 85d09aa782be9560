"""Several doors at once before one engine, until the process is told to end."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vla_pruner.doors.door import Door, Listen
from vla_pruner.serving.engine import Engine

PORTS = {"vla-eval": 8000, "openpi": 8000, "act": 8000, "gr00t": 5555, "lerobot": 8080}
"""Doors and the ports on which their clients knock."""
DRAIN_S = 20.0
"""Seconds that answers which are being worked out may still take."""


@dataclass
class VlaEvalDoor:
    """vla-eval's protocol, see `serving.server`."""

    server: Any
    listen: Listen
    name: str = "vla-eval"

    async def serve(self, ready: Callable[[str], None]) -> None:
        """Listen until cancelled, see `door.Door`."""
        from vla_pruner.serving.listen import listening

        tls = self.listen.tls()
        async with listening(self.server, self.listen.host, self.listen.port, tls=tls) as sockets:
            port = sockets.sockets[0].getsockname()[1]
            ready(f"{'ws' if tls is None else 'wss'}://{self.listen.host}:{port}")
            await asyncio.Future()


def wanted(protocols: Sequence[str], port: int | None) -> list[tuple[str, int]]:
    """Doors and their ports, from `NAME` or `NAME:PORT`.

    Args:
        protocols: as given.
        port: of the one door whose port is not said; None: its usual one.

    Raises:
        ValueError: an unknown name, a port that is none, or two doors at one port.
    """
    found: list[tuple[str, int]] = []
    for protocol in protocols:
        name, _, said = protocol.partition(":")
        if name not in PORTS:
            raise ValueError(f"--protocol {protocol}: choose {', '.join(PORTS)}, or NAME:PORT")
        if said and not (said.isdecimal() and int(said) <= 65535):
            raise ValueError(f"--protocol {protocol}: the port is 0 to 65535 (0: any that is free)")
        if not said and port is not None and len(protocols) > 1:
            raise ValueError("--port is for one door; say --protocol NAME:PORT for several")
        found.append((name, int(said) if said else PORTS[name] if port is None else port))
    ports = [number for _, number in found if number]
    if len(ports) > len(set(ports)):
        raise ValueError(
            f"two doors at one port ({', '.join(f'{n}:{p}' for n, p in found)}); say "
            "--protocol NAME:PORT"
        )
    return found


async def open_doors(
    engine: Engine, doors: Sequence[Door], say: Callable[[str, str], None]
) -> None:
    """Answer at all doors until SIGTERM, then let answers finish and close.

    Args:
        engine: who answers; warmed up before a door opens.
        doors: in front of it.
        say: told a door's name and address when it is open.

    Raises:
        RuntimeError: an address is not free.
    """
    loop, over = asyncio.get_running_loop(), asyncio.Event()
    with contextlib.suppress(RuntimeError, ValueError):  # not the main thread: no signals
        loop.add_signal_handler(signal.SIGTERM, over.set)
    ending = loop.create_task(over.wait())
    tasks = [loop.create_task(engine.start())]
    try:
        await asyncio.wait([ending, *tasks], return_when=asyncio.FIRST_COMPLETED)
        if not over.is_set():
            await tasks.pop()
            tasks = [loop.create_task(_serve(door, say)) for door in doors]
            done, _ = await asyncio.wait([ending, *tasks], return_when=asyncio.FIRST_COMPLETED)
            for task in done - {ending}:
                task.result()
    finally:
        with contextlib.suppress(asyncio.CancelledError):
            await engine.drain(DRAIN_S if over.is_set() else 0.0)
            await asyncio.sleep(0.05)  # what was answered last is on its way
        for task in (ending, *tasks):
            task.cancel()
        await asyncio.wait([ending, *tasks])
        with contextlib.suppress(RuntimeError, ValueError):
            loop.remove_signal_handler(signal.SIGTERM)


async def _serve(door: Door, say: Callable[[str, str], None]) -> None:
    try:
        await door.serve(lambda address: say(door.name, address))
    except OSError as error:
        listen: Listen = getattr(door, "listen", Listen())
        raise RuntimeError(
            f"cannot listen on {listen.host}:{listen.port} ({error}); choose another --host or port"
        ) from error
