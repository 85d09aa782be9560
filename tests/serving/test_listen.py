"""vla-eval's door holds: strangers get one sentence, everybody else their answers."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scripted import Scripted

pytest.importorskip("vla_eval", reason="vla-eval is missing: pip install 'vla-pruner[serve]'")

import msgpack
import websockets
from vla_eval.protocol.numpy_codec import encode_ndarray
from wire import message

from vla_pruner.serving.engine import Engine
from vla_pruner.serving.limits import Limits
from vla_pruner.serving.listen import admitted, listening, read_token, serve_async, unpack
from vla_pruner.serving.server import Talk

ROOT = Path(__file__).parents[2]
TOKEN = "a-token-of-some-length"


class Plain:
    """A translator for `Scripted`: what is sent is what it reads, what it writes is sent."""

    def observation(self, payload: dict[str, Any]) -> dict[str, Any]:
        images = payload.get("images")
        if not isinstance(images, dict):
            raise ValueError("`images` must map camera names to images")
        views = list(images.values())
        return {
            "images": views,
            "instruction": payload["task_description"],
            "proprio": payload.get("states"),
        }

    def actions(self, actions: np.ndarray) -> np.ndarray:
        return actions

    def hand(self) -> Callable[[np.ndarray], np.ndarray]:
        return lambda action: action


class Small:
    """A server of vla-eval's protocol around a policy without weights."""

    def __init__(self, token: str | None = None, chunk_size: int = 1, **options: Any) -> None:
        limits = Limits(**options.pop("limits", {}))
        self.engine = Engine(Scripted(**options.pop("policy", {})), limits, **options)
        self.token, self.chunk_size, self.translator = token, chunk_size, Plain()

    def talk(self) -> Talk:
        return Talk(self)  # type: ignore[arg-type]

    def get_action_spec(self) -> dict:
        return {}

    get_observation_spec = get_observation_params = get_action_spec


def served(server: Any, talk: Callable[[str], Any], seconds: float = 300) -> Any:
    """What `talk(address)` returns while the server listens; "127.0.0.1:port"."""

    async def both() -> Any:
        async with listening(server, "127.0.0.1", 0) as sockets:
            return await talk(f"127.0.0.1:{sockets.sockets[0].getsockname()[1]}")

    return asyncio.run(asyncio.wait_for(both(), seconds))


def connect(address: str, **options: Any) -> Any:
    return websockets.connect(f"ws://{address}", compression=None, max_size=None, **options)


def raw(kind: str, payload: Any, seq: int = 1) -> bytes:
    sent = {"type": kind, "payload": payload, "seq": seq, "timestamp": 0.0}
    return msgpack.packb(sent, use_bin_type=True, default=encode_ndarray)


def observation(marker: float, text: str = "go", **changes: Any) -> dict[str, Any]:
    image = np.zeros((8, 8, 3), np.uint8)
    seen = {"images": {"a": image}, "task_description": text, "states": np.array([marker])}
    return seen | changes


async def ask(socket: Any, data: bytes | str, seconds: float = 120) -> dict[str, Any]:
    await socket.send(data)
    found = msgpack.unpackb(await asyncio.wait_for(socket.recv(), seconds), raw=False)
    payload = found["payload"]
    if isinstance(payload.get("actions"), dict):
        entry = payload["actions"]
        payload["actions"] = np.frombuffer(entry["data"], entry["dtype"]).reshape(entry["shape"])
    return found


async def get(address: str, path: str, **headers: str) -> tuple[int, str]:
    def fetch() -> tuple[int, str]:
        request = urllib.request.Request(f"http://{address}{path}", headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    return await asyncio.to_thread(fetch)


# -- who may come in -----------------------------------------------------------------------------


def test_pages_for_watchers() -> None:
    async def talk(address: str) -> None:
        assert await get(address, "/health") == (200, '{"status": "ok"}\n')
        assert (await get(address, "/ready"))[0] == 200
        async with connect(address) as socket:
            await socket.send(raw("episode_start", {}))
            assert (await ask(socket, raw("observation", observation(1))))["type"] == "action"
            text = (await get(address, "/metrics"))[1]
        lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
        assert lines['vla_pruner_answers_total{kind="fresh"}'] == "1"
        assert lines["vla_pruner_episodes"] == "1"
        assert lines["vla_pruner_answer_seconds_count"] == "1"
        assert lines['vla_pruner_answer_seconds_bucket{le="+Inf"}'] == "1"

    served(Small(), talk)


@pytest.mark.parametrize(
    "query", ["", "?max_batch_size=4&max_wait_time=1000000000", "?max_wait_time=nan", "?x=1"]
)
def test_nothing_can_be_set_from_outside(query: str) -> None:
    server = Small()

    async def talk(address: str) -> None:
        before = vars(server.engine).copy()
        assert (await get(address, f"/config{query}"))[0] == 404
        same = {name: value for name, value in vars(server.engine).items() if name in before}
        assert same == before
        async with connect(address) as socket:
            await socket.send(raw("episode_start", {}))
            assert (await ask(socket, raw("observation", observation(1))))["type"] == "action"

    served(server, talk)


@pytest.mark.parametrize("origin", ["http://evil.example", "http://127.0.0.1", "null"])
def test_web_pages_are_turned_away(origin: str) -> None:
    async def talk(address: str) -> None:
        with pytest.raises(websockets.exceptions.InvalidStatus, match="403"):
            async with connect(address, additional_headers={"Origin": origin}):
                pass

    served(Small(), talk)


def test_a_token_is_asked_for_by_every_door_but_health() -> None:
    def basic(word: str) -> str:
        return "Basic " + b64encode(f"any:{word}".encode()).decode()

    async def talk(address: str) -> None:
        for wrong in ("", "Bearer", "Bearer x", f"Digest {TOKEN}", basic("x"), "Basic %%%", TOKEN):
            header = {"Authorization": wrong} if wrong else {}
            with pytest.raises(websockets.exceptions.InvalidStatus, match="401"):
                async with connect(address, additional_headers=header):
                    pass
            assert (await get(address, "/metrics", **header))[0] == 401
        for right in (f"Bearer {TOKEN}", f"Api-Key {TOKEN}", basic(TOKEN)):
            async with connect(address, additional_headers={"Authorization": right}) as socket:
                assert (await ask(socket, raw("hello", {})))["type"] == "hello"
            assert (await get(address, "/metrics", Authorization=right))[0] == 200
        async with connect(f"any:{TOKEN}@{address}") as socket:  # As vla-eval's `url:` may say.
            assert (await ask(socket, raw("hello", {})))["type"] == "hello"
        assert (await get(address, "/health"))[0] == 200

    served(Small(token=TOKEN), talk)
    assert admitted(None, None) and not admitted(TOKEN, None)


@pytest.mark.parametrize("text", ["", "short", "two words of some length", "é" * 20, "x" * 600])
def test_a_token_file_holds_one_word(tmp_path: Path, text: str) -> None:
    file = tmp_path / "token"
    file.write_text(text, "utf-8")
    with pytest.raises(ValueError, match="one word of 16 to 512"):
        read_token(file)
    file.write_text(f"{TOKEN}\n", "utf-8")
    assert read_token(file) == TOKEN
    with pytest.raises(ValueError, match="holds no token"):
        read_token(tmp_path / "nowhere")


def test_connections_are_counted_and_silent_ones_closed() -> None:
    async def talk(address: str) -> None:
        silent = [await connect(address) for _ in range(5)]
        with pytest.raises(websockets.exceptions.InvalidStatus, match="503"):
            async with connect(address):
                pass
        for socket in silent:
            with pytest.raises(websockets.exceptions.ConnectionClosed) as closed:
                await asyncio.wait_for(socket.recv(), 120)
            assert closed.value.rcvd is not None and "silent" in closed.value.rcvd.reason
        async with connect(address) as socket:
            await socket.send(raw("episode_start", {}))
            assert (await ask(socket, raw("observation", observation(1))))["type"] == "action"
            assert server.engine.metrics.get("episodes") == 1
            with pytest.raises(websockets.exceptions.ConnectionClosed):
                await asyncio.wait_for(socket.recv(), 120)
        async with asyncio.timeout(120):
            while server.engine.metrics.get("episodes"):
                await asyncio.sleep(0.01)

    server = Small(limits={"connections": 5, "first_s": 1.0, "idle_s": 1.0})
    served(server, talk)


# -- what is read --------------------------------------------------------------------------------


def test_a_frame_that_says_it_is_enormous_is_refused_at_its_head() -> None:
    async def talk(address: str) -> None:
        host, port = address.split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(
            b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"\x82\xff" + (2**40).to_bytes(8, "big") + bytes(4))
        told = await asyncio.wait_for(reader.read(100), 120)
        assert told[:1] == b"\x88" and int.from_bytes(told[2:4], "big") == 1009
        writer.close()
        async with connect(address) as socket:
            with pytest.raises(websockets.exceptions.ConnectionClosed) as closed:
                await ask(socket, bytes(1_100_000))
            assert closed.value.rcvd is not None and closed.value.rcvd.code == 1009

    served(Small(limits={"frame": 1 << 20}), talk)


HOSTILE: dict[str, Any] = {
    "no msgpack": b"\xc1",
    "nothing": b"",
    "a list": msgpack.packb([1, 2]),
    "half": raw("observation", observation(1))[:-9],
    "no such type": raw("config", {"max_batch_size": 4}),
    "type of another type": msgpack.packb({"type": {}, "payload": {}, "seq": 1, "timestamp": 0}),
    "payload is a list": raw("episode_start", [1]),
    "seq is text": raw("observation", {}, seq="x"),  # type: ignore[arg-type]
    "task is a list": raw("episode_start", {"task": [1]}),
    "no images": raw("observation", {"task_description": "go"}),
    "long text": raw("observation", observation(1, "milk " * 20_000)),
    "bytes for text": raw("observation", observation(1) | {"task_description": b"\xff" * 10**6}),
    "NaN state": raw("observation", observation(float("nan"))),
    "deep": raw("observation", {"images": [[[[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]]]}),
    "wide": raw("observation", {"images": [0] * 20_000}),
    "pickle": raw("observation", observation(1) | {"images": {"a": b"cos\nsystem\n(S'x'\ntR."}}),
    "object array": raw(
        "observation",
        {"states": {"__ndarray__": True, "dtype": "|O", "shape": [1], "data": bytes(8)}},
    ),
    "huge array": raw(
        "observation",
        {"states": {"__ndarray__": True, "dtype": "<f8", "shape": [2**40], "data": b""}},
    ),
    "EPS": raw(
        "observation",
        {"images": {"a": {"__image__": True, "format": "eps", "data": b"%!PS", "shape": [1]}}},
    ),
    "EPS called PNG": raw(
        "observation",
        {"images": {"a": {"__image__": True, "format": "png", "data": b"%!PS", "shape": [1]}}},
    ),
    "many images": raw(
        "observation",
        observation(1, images={str(n): np.zeros((4, 4, 3), np.uint8) for n in range(99)}),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_bad_message_is_one_short_error_for_its_client(name: str) -> None:
    async def talk(address: str) -> None:
        async with connect(address) as bad, connect(address) as good:
            for socket in (bad, good):
                await socket.send(raw("episode_start", {}))
            assert (await ask(good, raw("observation", observation(1))))["type"] == "action"
            error = await ask(bad, HOSTILE[name])
            assert error["type"] == "error" and error["payload"]["kind"] == "refused"
            assert 10 < len(error["payload"]["error"]) <= 500
            answer = await ask(good, raw("observation", observation(2)))
            assert answer["payload"]["actions"][0] == 3
            again = await ask(bad, raw("observation", observation(5)))
            if b"episode_start" not in HOSTILE[name]:  # Else it ended the episode before.
                assert again["payload"]["actions"][0] == 5

    served(Small(), talk)


def test_a_text_frame_is_refused() -> None:
    async def talk(address: str) -> None:
        async with connect(address) as socket:
            error = await ask(socket, "hello")
            assert "binary frame" in error["payload"]["error"]

    served(Small(), talk)


def test_an_unknown_error_of_ours_says_nothing_of_the_inside(
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = Small()
    server.translator.actions = lambda _: 1 / 0  # type: ignore[method-assign]

    async def talk(address: str) -> None:
        async with connect(address) as socket:
            await socket.send(raw("episode_start", {}))
            error = await ask(socket, raw("observation", observation(1)))
            assert error["payload"]["error"] == "the server failed: ZeroDivisionError"

    with caplog.at_level(logging.ERROR):
        served(server, talk)
    assert "not of its client" in caplog.text


def test_a_flood_of_bad_messages_fills_no_log(caplog: pytest.LogCaptureFixture) -> None:
    server = Small()

    async def talk(address: str) -> None:
        async with connect(address) as socket:
            bad = raw("observation", {"task_description": "x" * 5000})
            begin = raw("episode_start", {"task": {"name": "x" * 5000}})
            for _ in range(2000):
                await socket.send(begin)
                error = await ask(socket, bad)
                assert len(error["payload"]["error"]) <= 500

    with caplog.at_level(logging.INFO):
        served(server, talk)
    assert len(caplog.text) < 200_000
    assert server.engine.metrics.get("bad_messages_total") == 2000
    assert server.engine.metrics.get("log_lines_dropped_total") > 500


def test_fuzzed_messages_harm_nobody() -> None:
    """Bytes of good messages changed at random; a canary is answered exactly all the while."""
    dice = random.Random(0)
    good = [raw("observation", observation(1)), raw("episode_start", {"task": {"name": "a"}}),
            raw("hello", {}), raw("episode_end", {})]  # fmt: skip

    def fuzzed() -> bytes:
        data = bytearray(dice.choice(good))
        for _ in range(dice.randint(1, 8)):
            at = dice.randrange(len(data))
            match dice.randrange(4):
                case 0:
                    data[at] = dice.randrange(256)
                case 1:
                    del data[at : at + dice.randint(1, 30)]
                case 2:
                    data[at:at] = dice.randbytes(dice.randint(1, 30))
                case 3:
                    data[at] ^= 1 << dice.randrange(8)
            data = data or bytearray(b"\x00")
        return bytes(data)

    async def talk(address: str) -> None:
        canary = await connect(address)
        await canary.send(raw("episode_start", {}))
        total = 0
        for _ in range(10):
            async with connect(address) as socket:
                for _ in range(40):
                    await socket.send(fuzzed())
                total += 1
                answer = await ask(canary, raw("observation", observation(total), seq=total))
                assert answer["seq"] == total and answer["type"] == "action"
                assert answer["payload"]["actions"][0] == total * (total + 1) / 2
        await canary.close()

    served(Small(), talk)


def test_unpacking_keeps_what_was_sent() -> None:
    sent = message(3)
    found = unpack(raw("observation", sent, seq=7), Limits())
    assert (found["type"], found["seq"]) == ("observation", 7)
    for name, image in sent["images"].items():
        assert np.array_equal(found["payload"]["images"][name], image)
    assert np.array_equal(found["payload"]["states"], sent["states"])


# -- late ----------------------------------------------------------------------------------------


def test_a_late_answer_is_said_to_be_late() -> None:
    async def talk(address: str) -> None:
        async with connect(address) as socket:
            await socket.send(raw("episode_start", {}))
            first = await ask(socket, raw("observation", observation(1, "sleep 1")))
            assert first["type"] == "error" and first["payload"]["kind"] == "late"
            await asyncio.sleep(1.2)
            fresh = await ask(socket, raw("observation", observation(1)))
            assert fresh["payload"]["server"]["late"] is False
            late = await ask(socket, raw("observation", observation(1, "sleep 1")))
            assert late["payload"]["server"]["late"] is True
            assert late["payload"]["server"]["age_ms"] >= 200
            # Step 1 of the chunk whose step 0 was the last answer.
            assert late["payload"]["actions"].tolist() == [2, 1]

    served(Small(deadline_s=0.2, execute=1, policy={"warm_up": 0}), talk)


# -- how it ends ---------------------------------------------------------------------------------


def test_it_ends_with_close_frames_after_the_last_answer() -> None:
    server = Small()

    async def talk() -> None:
        port: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(serve_async(server, "127.0.0.1", 0, ready=port.set_result))
        address = f"127.0.0.1:{await port}"
        async with connect(address) as busy, connect(address) as idle:
            await busy.send(raw("episode_start", {}))
            await busy.send(raw("observation", observation(4, "sleep 0.5")))
            await asyncio.sleep(0.2)
            os.kill(os.getpid(), signal.SIGTERM)
            answer = msgpack.unpackb(await asyncio.wait_for(busy.recv(), 120))
            assert answer["type"] == "action"
            for socket in (busy, idle):
                with pytest.raises(websockets.exceptions.ConnectionClosed) as closed:
                    await asyncio.wait_for(socket.recv(), 120)
                assert closed.value.rcvd is not None and closed.value.rcvd.code == 1001
        await asyncio.wait_for(task, 120)

    asyncio.run(asyncio.wait_for(talk(), 300))


CONFIG = {"policy": "mini-oft", "method": "vla-pruner", "keep": 0.25, "benchmark": "pickplace"}
THEIRS = """
from vla_eval.model_servers.serve import run_server
from vla_pruner.serving.server import PolicyServer
run_server(PolicyServer)
"""


@pytest.mark.parametrize("way", ["vla-pruner serve", "python -m", "a script of vla-eval's"])
def test_every_way_of_starting_it_is_as_closed(way: str, tmp_path: Path) -> None:
    config, script = tmp_path / "server.yaml", tmp_path / "theirs.py"
    config.write_text(json.dumps({"args": CONFIG, "port": 0}), "utf-8")
    script.write_text(THEIRS, "utf-8")
    arguments = {
        "vla-pruner serve": [
            "-m",
            "vla_pruner",
            "serve",
            "--benchmark",
            "pickplace",
            "--port",
            "0",
        ],
        "python -m": ["-m", "vla_pruner.serving.server", "--config", str(config)],
        "a script of vla-eval's": [str(script), "--config", str(config)],
    }[way]
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *arguments], stdout=file, stderr=subprocess.STDOUT, cwd=ROOT
        )
    try:
        until = time.monotonic() + 600
        while "listening on 127.0.0.1:" not in log.read_text():
            assert process.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.2)
        address = "127.0.0.1:" + log.read_text().split("listening on 127.0.0.1:")[1].split()[0]

        async def talk() -> None:
            assert (await get(address, "/ready"))[0] == 200
            assert (await get(address, "/config?max_batch_size=4"))[0] == 404
            with pytest.raises(websockets.exceptions.InvalidStatus, match="403"):
                async with connect(address, additional_headers={"Origin": "http://x"}):
                    pass
            async with connect(address) as socket:
                await socket.send(raw("episode_start", {}))
                sent = message(1, "milk " * 20_000)
                error = await ask(socket, raw("observation", sent))
                assert "at most 1024" in error["payload"]["error"]
                await socket.send(raw("observation", message(1)))
                await asyncio.sleep(0.05)
                process.send_signal(signal.SIGTERM)
                answer = msgpack.unpackb(await asyncio.wait_for(socket.recv(), 120))
                assert answer["type"] in ("action", "error")
                with pytest.raises(websockets.exceptions.ConnectionClosed) as closed:
                    await asyncio.wait_for(socket.recv(), 120)
                assert closed.value.rcvd is not None and closed.value.rcvd.code == 1001

        asyncio.run(asyncio.wait_for(talk(), 600))
        assert process.wait(120) == 0, log.read_text()
        assert "Traceback" not in log.read_text()
    finally:
        process.kill()
        process.wait()


def test_endless_empty_pieces_end_their_connection() -> None:
    async def talk(address: str) -> Any:
        async with connect(address) as socket, connect(address) as canary:
            await canary.send(raw("episode_start", {}))
            before = await ask(canary, raw("observation", observation(5)))

            async def pieces() -> Any:
                for _ in range(2000):
                    yield b""

            with pytest.raises(websockets.ConnectionClosed):
                await socket.send(pieces())
                await socket.recv()
            return socket.close_code, before, await ask(canary, raw("observation", observation(7)))

    code, before, after = served(Small(), talk)
    assert code == 1009
    assert [each["payload"]["actions"][0] for each in (before, after)] == [5, 12]


def test_pongs_that_nobody_reads_are_not_kept() -> None:
    """`websockets` answers pings whether or not anybody takes the answers."""
    server = Small()

    async def talk(address: str) -> None:
        host, port = address.split(":")
        reader, writer = await asyncio.open_connection(host, int(port), limit=4096)
        writer.write(
            b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        await reader.readuntil(b"\r\n\r\n")
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        with pytest.raises(ConnectionError):
            async with asyncio.timeout(100):
                while True:
                    writer.write((b"\x89\xfd" + bytes(4) + b"x" * 125) * 1000)
                    await writer.drain()
        while server.engine.metrics.get("connections"):
            await asyncio.sleep(0.02)

    served(server, talk, 120)
