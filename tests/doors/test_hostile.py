"""What a client can do to the other clients of a door without a single valid message."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import test_act as at_act
import test_gr00t as at_gr00t
import test_openpi as at_openpi
from talking import ROBOT, STEPS, ask, libero, near
from websockets.asyncio.client import connect

from vla_pruner._short import printable
from vla_pruner.doors.act import ActDoor
from vla_pruner.doors.door import Listen, deadline_of, flag_of
from vla_pruner.doors.gr00t import Gr00tDoor, Modalities
from vla_pruner.doors.keys import Keys
from vla_pruner.doors.openpi import OpenpiDoor
from vla_pruner.doors.run import open_doors
from vla_pruner.doors.wire import array, pack
from vla_pruner.serving.engine import Engine, Refused

UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
)
EMPTY = b"\x00\x80\x00\x00\x00\x00"
"""A piece of a message, masked, that is not the last and holds nothing."""


async def opened(url: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = url.split("/")[2].split(":")
    return await asyncio.open_connection(host, int(port))


def test_a_message_in_endless_empty_pieces_ends_its_connection(
    served: Any, direct: Callable
) -> None:
    async def talk(url: str) -> Any:
        async with connect(url, compression=None) as canary:
            await canary.recv()
            before = await at_openpi.steps(canary, STEPS[:2])
            reader, writer = await opened(url)
            writer.write(UPGRADE + b"\r\n")
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"\x02" + EMPTY[1:] + EMPTY * 2000)
            told = await asyncio.wait_for(reader.read(), 20)
            writer.close()
            return told, before + await at_openpi.steps(canary, STEPS[2:])

    told, answers = ask(served, at_openpi.door(), talk)
    assert (1009).to_bytes(2, "big") in told and b"in more than 1024 frames" in told
    assert near(answers, at_openpi.robosuite(direct(STEPS)))


def test_of_two_tokens_none_counts(served: Any) -> None:
    async def talk(url: str) -> Any:
        found = []
        for tokens in (["t" * 20], ["t" * 20, "t" * 20], ["u" * 20, "t" * 20]):
            reader, writer = await opened(url)
            head = b"".join(b"Authorization: Bearer %s\r\n" % t.encode() for t in tokens)
            writer.write(UPGRADE + head + b"\r\n")
            found.append(await asyncio.wait_for(reader.readline(), 20))
            writer.close()
        return [int(line.split()[1]) for line in found]

    assert ask(served, at_openpi.door(token="t" * 20), talk) == [101, 401, 401]


def test_broken_handshakes_fill_no_log(served: Any, caplog: pytest.LogCaptureFixture) -> None:
    async def talk(url: str) -> None:
        for number in range(300):
            reader, writer = await opened(url)
            writer.write(
                b"GET /\x1b[2J HTTP/1.1\r\n\r\n" if number % 2 else b"\x16\x03\x01\r\n\r\n"
            )
            await asyncio.wait_for(reader.read(), 20)
            writer.close()

    with caplog.at_level(logging.INFO):
        ask(served, at_openpi.door(), talk)
    assert len(caplog.records) < 100
    assert sum(len(record.getMessage()) for record in caplog.records) < 20_000


def test_a_body_in_crumbs_is_refused(served: Any) -> None:
    async def talk(url: str) -> Any:
        reader, writer = await opened(url)
        head = b"POST /act HTTP/1.1\r\nhost: x\r\ncontent-type: Application/JSON\r\n"
        writer.write(head + b"transfer-encoding: chunked\r\n\r\n" + b"1\r\n \r\n" * 3000)
        told = await asyncio.wait_for(reader.read(), 20)
        writer.close()
        row = at_act.oft(1)
        whole = at_act.to_json(row)
        reader, writer = await opened(url)
        writer.write(head + b"connection: close\r\ntransfer-encoding: chunked\r\n\r\n")
        for start in range(0, len(whole), 300):
            piece = whole[start : start + 300]
            writer.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        writer.write(b"0\r\n\r\n")
        fine = await asyncio.wait_for(reader.read(), 60)
        writer.close()
        return told, fine

    told, fine = ask(served, at_act.door(), talk)
    assert told.startswith(b"HTTP/1.1 422") and b"pieces of less than 256 bytes" in told
    assert fine.startswith(b"HTTP/1.1 200")


def test_bad_requests_take_nobody_s_place(served: Any, direct: Callable) -> None:
    """Places are for clients that asked something that can be answered."""

    async def at_the_act_door(url: str) -> Any:
        for number in range(10):
            bad = at_act.oft(1, session_id=f"bad {number}", state=[1e999] * 8)
            bad["state"] = np.full(8, np.inf)
            status, said, _ = await at_act.request(url, bad)
            assert status == 422 and "not finite" in said["error"]
            assert (await at_act.request(url, {"session_id": number}, "/reset"))[0] == 200
        return [np.stack((await at_act.request(url, at_act.oft(seed)))[1]) for seed in STEPS[:2]]

    async def at_the_gr00t_door(url: str) -> Any:
        for _ in range(5):
            with at_gr00t.Client(url) as client:
                assert "error" in await client.ask("get_action", {"observation": {}})
                assert "error" not in await client.ask("reset")
        with at_gr00t.Client(url) as client:
            return await client.act(*STEPS[:2])

    wanted = direct(STEPS[:2])
    assert near(ask(served, at_act.door(clients=2), at_the_act_door), wanted)
    assert near(ask(served, at_gr00t.door(clients=2), at_the_gr00t_door), wanted)


def test_one_connection_too_many_is_told_so(served: Any) -> None:
    async def talk(url: str) -> Any:
        held = [await opened(url) for _ in range(3)]
        reader, writer = await opened(url)
        told = await asyncio.wait_for(reader.read(), 20)
        for _, each in [*held, (reader, writer)]:
            each.close()
        return told

    told = ask(served, at_act.door(clients=3), talk)
    assert told.startswith(b"HTTP/1.1 503") and b"too many connections" in told


def test_numbers_of_numpy_are_numbers() -> None:
    assert deadline_of({"deadline_ms": np.float32(50)}) == 0.05
    assert flag_of({"reset": np.bool_(True)}, "reset") and not flag_of({}, "reset")
    for wrong in (0, -1, np.nan, np.inf, True, "50", np.float32(np.nan), [50], None.__class__):
        with pytest.raises(Refused, match="1 to 600000"):
            deadline_of({"deadline_ms": wrong})
    for wrong in (1, "true", np.float32(1), None, np.zeros(2)):
        with pytest.raises(Refused, match="true or false"):
            flag_of({"reset": wrong}, "reset")


def test_an_array_of_nothing_has_sides_too() -> None:
    assert array("<f4", [0, 5], b"").shape == (0, 5)
    with pytest.raises(Refused, match="larger than any memory"):
        array("<f4", [0, *[1 << 24] * 5], b"")


def test_a_log_line_is_one_line() -> None:
    said = printable("a\nb\r\x1b[2J\x00\u2028\u202e\ud800 è 中")
    assert said == "a\\nb\\r\\x1b[2J\\x00\\u2028\\u202e\\ud800 è 中"
    assert said.encode()


def test_a_state_that_is_read_has_a_name() -> None:
    keys, nowhere = Keys(("a", "b"), ()), Modalities(state=())
    with pytest.raises(ValueError, match="reads 8 numbers of state, and --keys names none"):
        OpenpiDoor(None, Listen(), ROBOT, keys)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="reads 8 numbers of state"):
        Gr00tDoor(None, Listen(), ROBOT, nowhere)  # type: ignore[arg-type]


class Slow:
    """An engine whose warm-up takes long, and which counts."""

    limits = metrics = None

    def __init__(self) -> None:
        self.cancelled = self.drained = False

    async def start(self) -> None:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            self.cancelled = True
            raise

    async def drain(self, timeout_s: float) -> None:
        self.drained = True


def test_sigterm_in_the_warm_up_and_twice() -> None:
    async def both(engine: Any) -> float:
        door = ActDoor(engine, Listen(), ROBOT)
        task = asyncio.create_task(open_doors(engine, [door], lambda *_: pytest.fail("opened")))
        await asyncio.sleep(0.1)
        began = time.monotonic()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(task, 20)
        return time.monotonic() - began

    engine = Slow()
    assert asyncio.run(both(engine)) < 10
    assert engine.cancelled and engine.drained


def test_a_deadline_that_is_none_is_refused(served: Any) -> None:
    async def both() -> None:
        engine = Engine(served)
        await engine.start()
        episode = engine.open("x")
        for wrong in (0.0, -1.0, float("nan"), float("inf")):
            with pytest.raises(Refused, match="the deadline is"):
                await engine.act(episode, at_act.seen(1), deadline_s=wrong)
        await engine.drain(5)

    asyncio.run(both())
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="above 0"):
            Engine(served, deadline_s=wrong)
    with pytest.raises(ValueError, match="finite"):
        Engine(served, wait_s=float("nan"))
    assert pack(libero(1))
