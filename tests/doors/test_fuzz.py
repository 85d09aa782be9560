"""Thousands of damaged and invented messages at each door: no crash, flat memory, an exact canary.

`FUZZ=100000 pytest tests/doors/test_fuzz.py` for more than the few of every run.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import zmq
import zmq.asyncio
from talking import ROBOT, STEPS, ask, libero, near, seen
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from vla_pruner.doors.act import ActDoor
from vla_pruner.doors.door import Listen
from vla_pruner.doors.gr00t import Gr00tDoor
from vla_pruner.doors.keys import KEYS, with_gripper
from vla_pruner.doors.openpi import OMNI, OpenpiDoor
from vla_pruner.doors.unpickle import unpickle
from vla_pruner.doors.wire import from_json, pack, to_json, unpack
from vla_pruner.serving.engine import Refused

COUNT = int(os.environ.get("FUZZ", "300"))


def damaged(good: list[bytes], random: np.random.Generator) -> bytes:
    """A message with a few bytes changed, cut, repeated, or all invented."""
    kind, raw = random.integers(0, 5), bytearray(good[random.integers(0, len(good))])
    if kind == 0:
        return random.bytes(int(random.integers(0, 400)))
    at = int(random.integers(0, len(raw)))
    if kind == 1:
        return bytes(raw[:at])
    if kind == 2:
        return bytes(raw[:at] + raw[max(0, at - 50) :])
    for _ in range(int(random.integers(1, 6))):
        raw[int(random.integers(0, min(len(raw), 300)))] = int(random.integers(0, 256))
    return bytes(raw)


def resident() -> int:
    """Bytes of this process in memory."""
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def sample() -> list[bytes]:
    row = seen(1)
    small = {"observation/state": row["proprio"], "prompt": "x", "reset": True, "n": np.float32(1)}
    return [pack(libero(1)), pack(small), pack({"endpoint": "reset"})]


READERS: dict[str, tuple[Callable[[bytes], Any], list[bytes]]] = {
    "msgpack": (unpack, [pack({"a": np.arange(9), "b": [1, {"c": "x"}], "d": 1.5})]),
    "npy": (unpack, [pack({"a": np.arange(9, dtype=np.float32)}, as_npy=True)]),
    "json": (from_json, [to_json({"a": np.arange(9), "b": [1, {"c": "x"}], "d": 1.5})]),
    "pickle": (unpickle, [pickle.dumps({"a": np.arange(9), "b": [1, "x"], "c": np.float32(2)})]),
}


@pytest.mark.parametrize("name", READERS)
def test_readers_refuse_or_read(name: str) -> None:
    read, good = READERS[name]
    random, before = np.random.default_rng(1), resident()
    for _ in range(10 * COUNT):
        try:
            read(damaged(good, random))
        except Refused as error:
            assert len(str(error)) < 1000
    assert resident() - before < 64 << 20


@pytest.mark.parametrize("path", ["", OMNI])
def test_openpi(served: Any, direct: Callable, path: str) -> None:
    random = np.random.default_rng(2)

    async def talk(url: str) -> Any:
        async with connect(url, compression=None) as canary:
            await canary.recv()
            answers, before = [], 0
            for step, seed in enumerate(STEPS):
                await canary.send(pack(libero(seed)))
                answers.append(unpack(await canary.recv())["actions"])
                for _ in range(COUNT // len(STEPS)):
                    async with connect(url + path, compression=None) as socket:
                        await socket.recv()
                        await socket.send(damaged(sample(), random))
                        with contextlib.suppress(ConnectionClosed):
                            await asyncio.wait_for(socket.recv(), 20)
                if step == 0:
                    before = len(os.listdir("/proc/self/fd"))
            return answers, len(os.listdir("/proc/self/fd")) - before

    def make(engine: Any) -> OpenpiDoor:
        return OpenpiDoor(engine, Listen(), ROBOT, KEYS["libero"])

    answers, grown = ask(served, make, talk)
    assert near(answers, [with_gripper(chunk, "rlds", "robosuite") for chunk in direct(STEPS)])
    assert grown < 10


def test_act(served: Any, direct: Callable) -> None:
    random, good = np.random.default_rng(3), [to_json({"image": np.zeros((4, 4, 3), np.uint8)})]
    head = b"POST /act HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    whole = head + b"content-length: %d\r\n\r\n" % len(good[0]) + good[0]

    async def talk(url: str) -> None:
        host, port = url.split("/")[2].split(":")
        for number in range(COUNT):
            reader, writer = await asyncio.open_connection(host, int(port))
            if number % 2:
                body = damaged(good, random)
                writer.write(head + b"content-length: %d\r\nconnection: close\r\n\r\n" % len(body))
                writer.write(body)
            else:
                writer.write(damaged([whole], random))
            writer.write_eof()
            answer = await asyncio.wait_for(reader.read(), 20)
            assert not answer or answer.startswith(b"HTTP/1.1 4"), answer[:200]
            writer.close()

    ask(served, lambda engine: ActDoor(engine, Listen(), ROBOT), talk)


def test_gr00t(served: Any) -> None:
    random = np.random.default_rng(4)
    data = {"observation": {"video": {"image": np.zeros((1, 1, 4, 4, 3), np.uint8)}}}
    good = [pack({"endpoint": "get_action", "data": data}, as_npy=True)]

    async def talk(url: str) -> None:
        socket = zmq.asyncio.Context.instance().socket(zmq.REQ)
        socket.connect(url)
        for _ in range(COUNT):
            await socket.send(damaged(good, random))
            assert "error" in unpack(await asyncio.wait_for(socket.recv(), 20))
        await socket.send(pack({"endpoint": "ping"}))
        assert unpack(await socket.recv())["status"] == "ok"
        socket.close(linger=0)

    ask(served, lambda engine: Gr00tDoor(engine, Listen(), ROBOT), talk)
