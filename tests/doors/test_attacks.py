"""Clients that do not read, do not finish, or never go: nobody else waits for them, nor the end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import numpy as np
import pytest
import test_act as at_act
import test_openpi as at_openpi
from counting_server import Counting
from talking import ROBOT, STEPS, ask, libero, near, opened
from websockets.asyncio.client import connect

from vla_pruner.doors import http, lerobot_async, run
from vla_pruner.doors.act import ActDoor
from vla_pruner.doors.door import Listen
from vla_pruner.doors.http import Response, serve_http
from vla_pruner.doors.keys import KEYS, Robot
from vla_pruner.doors.lerobot_async import SERVICE, LerobotDoor
from vla_pruner.doors.openpi import OpenpiDoor
from vla_pruner.doors.run import open_doors
from vla_pruner.doors.visit import sentence
from vla_pruner.doors.wire import pack
from vla_pruner.serving import listen
from vla_pruner.serving.engine import Engine
from vla_pruner.serving.policy import ServedPolicy, Step

UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)
PING = b"\x89\xfd" + bytes(4) + b"x" * 125
"""Masked, as large as one may be."""

SMALL = libero(1) | {"observation/image": np.zeros((2, 2, 3), np.uint8)}
del SMALL["observation/wrist_image"]


def frame(data: bytes) -> bytes:
    """A binary message of less than 64 KiB, masked by zeros."""
    return b"\x82\xfe" + len(data).to_bytes(2, "big") + bytes(4) + data


def counting(**options: Any) -> OpenpiDoor:
    engine: Any = Counting(0.0)
    return OpenpiDoor(engine, Listen(**options), Robot(1, 8, gripper="robosuite"), KEYS["libero"])


@contextlib.asynccontextmanager
async def deaf(url: str) -> AsyncIterator[Callable]:
    """`flood(data)`: a client sends this again and again, and reads nothing; how it ended."""
    host, port = url.split("/")[2].split(":")
    loop = asyncio.get_running_loop()
    with socket.socket() as made:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        made.setblocking(False)
        await loop.sock_connect(made, (host, int(port)))

        async def flood(data: bytes, seconds: float = 2.0, first: bytes = b"") -> str:
            try:
                async with asyncio.timeout(seconds):
                    await loop.sock_sendall(made, first)
                    while True:
                        await loop.sock_sendall(made, data)
            except TimeoutError:
                return "blocked"
            except ConnectionError:
                return "cut"

        yield flood


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not holds():
            await asyncio.sleep(0.02)


# -- slow readers --------------------------------------------------------------------------------
def test_who_does_not_read_its_answers_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listen, "SEND_S", 0.5)
    door = counting()

    async def talk() -> Any:
        async with (
            opened(door) as url,
            connect(url, compression=None) as canary,
            deaf(url) as flood,
        ):
            await canary.recv()
            assert await flood(frame(pack(SMALL)) * 50, 60, UPGRADE) == "cut"
            await until(lambda: door._here == 1)
            return await at_openpi.steps(canary, [1, 2])

    answers = asyncio.run(asyncio.wait_for(talk(), 120))
    assert [chunk[0, 1] for chunk in answers] == [0, 1]


def test_pongs_that_nobody_reads_are_not_kept() -> None:
    door = counting()

    async def talk() -> str:
        async with opened(door) as url, deaf(url) as flood:
            ended = await flood(PING * 1000, 60, UPGRADE)
            await until(lambda: door._here == 0)
            return ended

    assert asyncio.run(asyncio.wait_for(talk(), 120)) == "cut"


def test_a_door_closes_although_a_client_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listen, "CLOSE_S", 0.5)
    door = counting()

    async def talk() -> None:
        async with opened(door) as url, deaf(url) as flood:
            assert await flood(frame(pack(SMALL)) * 50, 3.0, UPGRADE) == "blocked"
            assert door._here == 1

    asyncio.run(asyncio.wait_for(talk(), 20))


def test_responses_that_nobody_reads_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "BODY_S", 0.3)
    monkeypatch.setattr(http, "CLOSE_S", 0.3)
    descriptors = []

    async def answer(_: Any) -> Response:
        return Response(200, bytes(1 << 20))

    async def talk() -> None:
        port: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(serve_http(answer, Listen(), port.set_result))
        url = f"http://127.0.0.1:{await port}"
        descriptors.append(len(os.listdir("/proc/self/fd")))
        async with deaf(url) as flood:
            assert await flood(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n" * 500, 60) == "cut"
        await until(lambda: len(os.listdir("/proc/self/fd")) <= descriptors[0])
        task.cancel()
        await asyncio.wait([task])

    asyncio.run(asyncio.wait_for(talk(), 120))


# -- what is never finished ----------------------------------------------------------------------
def test_handshakes_that_are_never_finished_are_counted() -> None:
    door = counting(clients=4)

    async def talk() -> None:
        async with opened(door) as url, connect(url, compression=None) as canary:
            await canary.recv()
            host, port = url.split("/")[2].split(":")
            before = len(os.listdir("/proc/self/fd"))
            held = [await asyncio.open_connection(host, int(port)) for _ in range(200)]
            await until(lambda: sum(reader.at_eof() for reader, _ in held) > 100)
            at_most = 200 + 4 + listen.SPARE
            assert len(os.listdir("/proc/self/fd")) - before <= at_most
            assert len(await at_openpi.steps(canary, [1])) == 1
            for _, writer in held:
                writer.close()

    asyncio.run(asyncio.wait_for(talk(), 120))


def literal(name: str, value: str) -> bytes:
    """A header of HTTP/2, not compressed."""
    return b"\0" + b"".join(bytes([len(text)]) + text.encode() for text in (name, value))


def http2(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    head = bytes([kind, flags]) + stream.to_bytes(4, "big")
    return len(payload).to_bytes(3, "big") + head + payload


def test_calls_without_a_message_starve_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """The heads of calls alone, as many as the door takes; gRPC itself would wait for ever."""
    monkeypatch.setattr(lerobot_async, "STREAM_S", 0.5)
    engine: Any = Counting(0.0)
    door = LerobotDoor(engine, Listen(clients=1), Robot(1, 8))
    said = (":method", "POST"), (":scheme", "http"), (":path", f"/{SERVICE}/Ready")
    said += (":authority", "x"), ("content-type", "application/grpc"), ("te", "trailers")
    head = b"".join(literal(*pair) for pair in said)

    async def talk() -> None:
        async with opened(door) as address:
            where = address.split()[0]
            host, port = where.split(":")
            held = []
            for _ in range(2):
                held.append(await asyncio.open_connection(host, int(port)))
                writer = held[-1][1]
                writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + http2(4, 0, 0))
                for call in range(lerobot_async.CALLS):
                    writer.write(http2(1, 4, 2 * call + 1, head))
                await writer.drain()
            async with asyncio.timeout(60):
                while True:
                    async with grpc.aio.insecure_channel(where) as channel:
                        with contextlib.suppress(grpc.RpcError):
                            await channel.unary_unary(f"/{SERVICE}/Ready")(b"")
                            break
                    await asyncio.sleep(0.1)
            for _, writer in held:
                writer.close()

    asyncio.run(asyncio.wait_for(talk(), 120))


# -- two readings --------------------------------------------------------------------------------
TOKEN = b"Authorization: Bearer " + b"t" * 20 + b"\r\n"
JSON = b"content-type: application/json\r\n"


@pytest.mark.parametrize(
    ("heads", "status"),
    [
        (JSON + TOKEN + b"content-length: 2\r\ntransfer-encoding: chunked\r\n", 400),
        (JSON + TOKEN + b"content-length: 2\r\ncontent-length: 3\r\n", 400),
        (JSON + TOKEN + b"content-length: +2\r\n", 400),
        (JSON + TOKEN + TOKEN + b"content-length: 2\r\n", 401),
        (JSON + TOKEN + TOKEN.replace(b"t" * 20, b"u" * 20) + b"content-length: 2\r\n", 401),
        (b"content-type: text/plain\r\n" + JSON + TOKEN + b"content-length: 2\r\n", 415),
        (JSON + TOKEN + b"content-length: 2\r\n", 422),
    ],
)
def test_a_request_that_can_be_read_in_two_ways_is_refused(
    served: Any, heads: bytes, status: int
) -> None:
    """Of two lengths, tokens or types, a proxy before the door may believe the other one."""

    async def talk(url: str) -> bytes:
        host, port = url.split("/")[2].split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"POST /act HTTP/1.1\r\nhost: x\r\n" + heads + b"\r\n{}")
        writer.write_eof()
        told = await asyncio.wait_for(reader.read(), 20)
        writer.close()
        return told

    told = ask(served, at_act.door(token="t" * 20), talk)
    assert int(told.split()[1]) == status and told.count(b"HTTP/1.1 ") == 1, told


# -- what is written about it --------------------------------------------------------------------
def test_no_line_of_a_traceback_passes_for_one_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    try:
        raise RuntimeError("the text was: \n2026-01-01 00:00:00 INFO all is well\r\x1b[2J\u2028x")
    except RuntimeError as error:
        sentence(error, "openpi", "a\nb")
    lines = caplog.text.splitlines()
    assert len(lines) > 3 and any("all is well" in line for line in lines)
    assert all(line.startswith("  | ") for line in lines[1:]) and "\x1b" not in caplog.text


# -- the end -------------------------------------------------------------------------------------
class Hangs(ServedPolicy):
    """A policy without a model, whose passes hang."""

    def __init__(self) -> None:
        self.entered, self.over = threading.Event(), threading.Event()

    def start(self, label: str) -> Any:
        return object()

    def step(self, episodes: Any, observations: Any) -> list[Step]:
        self.entered.set()
        self.over.wait(120)
        return [Step(np.zeros((2, 7), np.float32), 1.0, None, False, False, 0.0, "hangs")]

    def warm_up(self, episode: Any) -> bool:
        return False

    def blank(self) -> None:
        return None

    def end(self, episode: Any) -> None:
        """Nothing is remembered."""


def test_doors_close_although_a_pass_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM in the middle of calls at three doors: each is told so, and the doors close."""
    monkeypatch.setattr(run, "DRAIN_S", 0.3)
    served = Hangs()
    engine = Engine(served)
    doors = [
        OpenpiDoor(engine, Listen(), ROBOT, KEYS["libero"]),
        ActDoor(engine, Listen(), ROBOT),
        LerobotDoor(engine, Listen(), ROBOT),
    ]

    async def at_openpi_s(url: str) -> Any:
        async with connect(url, compression=None) as client:
            await client.recv()
            return await at_openpi.say(client, libero(1))

    async def at_act_s(url: str) -> Any:
        return (await at_act.request(url, at_act.oft(2)))[:2]

    async def both() -> tuple[Any, float]:
        open_now: dict[str, str] = {}
        task = asyncio.create_task(open_doors(engine, doors, open_now.__setitem__))  # type: ignore[arg-type]
        await until(lambda: len(open_now) == 3)
        asked = [
            asyncio.create_task(at_openpi_s(open_now["openpi"])),
            asyncio.create_task(at_act_s(open_now["act"])),
        ]
        await until(served.entered.is_set)
        await asyncio.sleep(0.2)
        began = time.monotonic()
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(task, 60)
        took = time.monotonic() - began
        return await asyncio.gather(*asked, return_exceptions=True), took

    try:
        (openpi, act), took = asyncio.run(asyncio.wait_for(both(), 120))
    finally:
        served.over.set()
    assert openpi == "the server is closing"
    assert act[0] == 503 and "closing" in act[1]["error"]
    assert took < 30 and engine.ended(60)


# -- what stays open -----------------------------------------------------------------------------
def test_an_episode_that_stays_open_keeps_no_images(served: Any) -> None:
    async def both() -> None:
        engine = Engine(served)
        await engine.start()
        keys = [engine.open(str(number)) for number in range(3)]
        for key in keys:
            await engine.act(key, at_act.seen(1))
        late = engine.open("late")
        await engine.act(late, at_act.seen(2), deadline_s=1e-6)
        await until(lambda: not engine._lanes[0].busy)
        await asyncio.sleep(0.05)
        assert [engine._episodes[key].row for key in (*keys, late)] == [None] * 4
        await engine.drain(10)

    asyncio.run(asyncio.wait_for(both(), 300))


def test_odd_instructions_leave_the_log_and_a_canary_as_they_are(
    served: Any, direct: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    """Instructions with line ends, escapes and half characters, in the middle of a canary's."""
    texts = ["pick\n2026 INFO up", "a\r\x1b[31m", "\u202e can", "x" * 1024, "\x00\x00", "é" * 512]

    async def talk(url: str) -> Any:
        async with connect(url, compression=None) as canary:
            await canary.recv()
            answers = []
            for seed, text in zip(STEPS, texts, strict=False):
                async with connect(url, compression=None) as other:
                    await other.recv()
                    told = await at_openpi.say(other, libero(9) | {"prompt": text})
                    assert isinstance(told, str) or np.isfinite(told["actions"]).all()
                answers += await at_openpi.steps(canary, [seed])
            return answers

    with caplog.at_level(logging.INFO):
        answers = ask(served, at_openpi.door(), talk)
    assert near(answers, at_openpi.robosuite(direct(STEPS)))
    assert not any("\n" in r.getMessage() or "\x1b" in r.getMessage() for r in caplog.records)
