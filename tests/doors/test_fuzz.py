"""Thousands of damaged and invented messages at each door: no crash, flat memory, an exact canary.

`FUZZ=100000 pytest tests/doors/test_fuzz.py` for more than the few of every run.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import pickle
import sys
import types
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest
import test_act as test_act_door
import test_gr00t as test_gr00t_door
import test_lerobot_async as test_lerobot_door
import zmq
import zmq.asyncio
from talking import ROBOT, STEPS, ask, libero, near, seen
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from vla_pruner.doors.act import ActDoor
from vla_pruner.doors.door import Listen
from vla_pruner.doors.keys import KEYS, with_gripper
from vla_pruner.doors.openpi import OMNI, OpenpiDoor
from vla_pruner.doors.unpickle import unpickle
from vla_pruner.doors.wire import from_json, pack, to_json, unpack
from vla_pruner.serving.engine import Refused

COUNT = int(os.environ.get("FUZZ", "80"))
LISTEN = Listen(idle_s=1e6)
"""However slow the machine, a canary's silence ends no episode."""


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


class Watch:
    """Memory and descriptors of this process, server and clients, at every tenth."""

    def __init__(self, name: str) -> None:
        self.name, self.rows = name, []  # type: ignore[var-annotated]

    def at(self, sent: int) -> None:
        """So many messages were sent."""
        if sent % max(COUNT // 10, 1) == 0:
            row = (sent, resident() >> 20, len(os.listdir("/proc/self/fd")))
            self.rows.append(row)
            print(f"{self.name}: {row[0]} messages, {row[1]} MiB, {row[2]} descriptors", flush=True)

    def flat(self) -> bool:
        """Whether both are what they were after the first tenth, but for a little."""
        _, mib, descriptors = self.rows[1]
        return self.rows[-1][1] < mib + 64 and self.rows[-1][2] < descriptors + 10


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
    random, watch = np.random.default_rng(2), Watch(f"openpi{path}")

    async def talk(url: str) -> Any:
        async with connect(url, compression=None) as canary:
            await canary.recv()
            answers = []
            for sent in range(COUNT + 1):
                watch.at(sent)
                if sent % (COUNT // (len(STEPS) - 1)) == 0 and len(answers) < len(STEPS):
                    await canary.send(pack(libero(STEPS[len(answers)])))
                    answers.append(unpack(await canary.recv())["actions"])
                async with connect(url + path, compression=None) as socket:
                    await socket.recv()
                    await socket.send(damaged(sample(), random))
                    with contextlib.suppress(ConnectionClosed):
                        await asyncio.wait_for(socket.recv(), 20)
            return answers

    def make(engine: Any) -> OpenpiDoor:
        return OpenpiDoor(engine, LISTEN, ROBOT, KEYS["libero"])

    answers = ask(served, make, talk, limit_s=None)
    assert near(answers, [with_gripper(chunk, "rlds", "robosuite") for chunk in direct(STEPS)])
    assert watch.flat()


def test_act(served: Any, direct: Callable) -> None:
    random, good = np.random.default_rng(3), [to_json({"image": np.zeros((4, 4, 3), np.uint8)})]
    head = b"POST /act HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    whole = head + b"content-length: %d\r\n\r\n" % len(good[0]) + good[0]
    watch = Watch("act")

    async def talk(url: str) -> Any:
        host, port = url.split("/")[2].split(":")
        answers = []
        for sent in range(COUNT + 1):
            watch.at(sent)
            if sent % (COUNT // (len(STEPS) - 1)) == 0 and len(answers) < len(STEPS):
                row = test_act_door.oft(STEPS[len(answers)], session_id="canary")
                answers.append(np.stack((await test_act_door.request(url, row))[1]))
            reader, writer = await asyncio.open_connection(host, int(port))
            if sent % 2:
                body = damaged(good, random)
                writer.write(head + b"content-length: %d\r\nconnection: close\r\n\r\n" % len(body))
                writer.write(body)
            else:
                writer.write(damaged([whole], random))
            with contextlib.suppress(ConnectionError):
                writer.write_eof()
                answer = await asyncio.wait_for(reader.read(), 20)
                assert not answer or answer.startswith(b"HTTP/1.1 4"), answer[:200]
            writer.close()
        return answers

    found = ask(served, lambda engine: ActDoor(engine, LISTEN, ROBOT), talk, limit_s=None)
    assert near(found, direct(STEPS)) and watch.flat()


def test_gr00t(served: Any, direct: Callable) -> None:
    random, watch = np.random.default_rng(4), Watch("gr00t")
    data = {"observation": {"video": {"image": np.zeros((1, 1, 4, 4, 3), np.uint8)}}}
    good = [pack({"endpoint": "get_action", "data": data}, as_npy=True)]

    async def talk(url: str) -> Any:
        socket = zmq.asyncio.Context.instance().socket(zmq.REQ)
        socket.connect(url)
        answers = []
        with test_gr00t_door.Client(url) as canary:
            for sent in range(COUNT + 1):
                watch.at(sent)
                if sent % (COUNT // (len(STEPS) - 1)) == 0 and len(answers) < len(STEPS):
                    answers += await canary.act(STEPS[len(answers)])
                await socket.send(damaged(good, random))
                assert "error" in unpack(await asyncio.wait_for(socket.recv(), 20))
        await socket.send(pack({"endpoint": "ping"}))
        assert unpack(await socket.recv())["status"] == "ok"
        socket.close(linger=0)
        return answers

    found = ask(served, test_gr00t_door.door(idle_s=LISTEN.idle_s), talk, limit_s=None)
    assert near(found, direct(STEPS)) and watch.flat()


def test_lerobot(served: Any, direct: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Damaged pickles in good messages, and damaged messages; each call is answered or refused."""
    random, watch = np.random.default_rng(5), Watch("lerobot")
    robots = test_lerobot_door
    for name in ("lerobot", "lerobot.async_inference", robots.HELPERS):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for kind in (robots.RemotePolicyConfig, robots.TimedObservation, robots.TimedAction):
        monkeypatch.setattr(kind, "__module__", robots.HELPERS)
        setattr(sys.modules[robots.HELPERS], kind.__name__, kind)
    small = {"front": np.zeros((4, 4, 3), np.uint8), "task": "x", "j0.pos": 1.0}
    good = [pickle.dumps(robots.TimedObservation(1.0, 1, small, False))]
    setup = robots.message(1, pickle.dumps(robots.setup()))

    async def talk(url: str) -> Any:
        answers = []
        async with robots.Robot(url) as canary, robots.Robot(url) as robot:
            await canary.begin(robots.setup())
            for sent in range(COUNT + 1):
                watch.at(sent)
                if sent % (COUNT // (len(STEPS) - 1)) == 0 and len(answers) < len(STEPS):
                    await canary.show(robots.observation(STEPS[len(answers)], len(answers)))
                    chunk = await canary.actions()
                    answers.append(np.stack([each.action.numpy() for each in chunk]))
                with contextlib.suppress(grpc.RpcError):
                    if sent % 3 == 0:
                        await robot.call("SendPolicyInstructions", damaged([setup], random))
                    elif sent % 3 == 1:
                        await robot.show(damaged(good, random))
                    else:
                        bad = damaged([robots.message(2, good[0])], random)
                        path = f"/{robots.SERVICE}/SendObservations"
                        await robot.channel.stream_unary(path)(iter([bad]))
        return answers

    found = ask(served, robots.door(idle_s=LISTEN.idle_s), talk, limit_s=None)
    assert near(found, [chunk[:3] for chunk in direct(STEPS)]) and watch.flat()
