"""openpi's door: answers of the policy itself, both reset dialects, and errors for one client."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np
import pytest
from talking import ROBOT, STEPS, ask, libero, near
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from vla_pruner.doors.door import Listen
from vla_pruner.doors.keys import KEYS, Robot, with_gripper
from vla_pruner.doors.openpi import OMNI, OpenpiDoor
from vla_pruner.doors.wire import pack, unpack

OTHERS = [11, 12, 13, 14, 15]


def door(**options: Any) -> Callable:
    listen = Listen(**options)
    return lambda engine: OpenpiDoor(engine, listen, ROBOT, KEYS["libero"])


async def say(socket: Any, message: dict[str, Any]) -> Any:
    """A message's answer: text as it is, binary unpacked."""
    await socket.send(pack(message))
    answer = await socket.recv()
    return answer if isinstance(answer, str) else unpack(answer)


async def steps(socket: Any, seeds: list[int], **more: Any) -> list[np.ndarray]:
    return [(await say(socket, libero(seed) | more))["actions"] for seed in seeds]


def robosuite(actions: list[np.ndarray]) -> list[np.ndarray]:
    return [with_gripper(chunk, "rlds", "robosuite") for chunk in actions]


def test_the_server_speaks_first_and_answers_as_the_policy(served: Any, direct: Callable) -> None:
    async def talk(url: str) -> Any:
        async with connect(url, compression=None) as socket:
            told = unpack(await socket.recv())
            return told, [await say(socket, libero(seed)) for seed in STEPS]

    told, answers = ask(served, door(), talk)
    assert "changed instruction" in told["reset"] and told["cameras"] == [
        "observation/image",
        "observation/wrist_image",
    ]
    assert near([a["actions"] for a in answers], robosuite(direct(STEPS)))
    assert "prev_total_ms" not in answers[0]["server_timing"]
    assert all(a["server_timing"]["prev_total_ms"] > 0 for a in answers[1:])
    assert all(a["policy_timing"]["infer_ms"] > 0 for a in answers)
    said = [a["vla_pruner"] for a in answers]
    assert [s["warm_up"] for s in said] == [True, True, True, False, False]
    assert said[0]["keep"] == 1.0 and said[4]["keep"] == pytest.approx(0.25, abs=0.05)
    assert all(s["valid"] == 4 and not s["late"] for s in said)


@pytest.mark.parametrize(
    "between",
    ["reset", "instruction", "session", "endpoint", "connection", "nothing"],
)
def test_what_begins_an_episode(served: Any, direct: Callable, between: str) -> None:
    async def talk(url: str) -> Any:
        async with connect(url, compression=None) as socket:
            await socket.recv()
            first = await steps(
                socket, STEPS, **({"session_id": "a"} if between == "session" else {})
            )
            if between == "endpoint":
                assert await say(socket, {"endpoint": "reset"}) == "reset successful"
            more = {
                "reset": {"reset": True},
                "instruction": {"prompt": "lift the milk"},
                "session": {"session_id": "b"},
            }.get(between, {})
            if between == "connection":
                async with connect(url, compression=None) as other:
                    await other.recv()
                    return first, await steps(other, STEPS)
            head = await steps(socket, STEPS[:1], **more)
            more.pop("reset", None)
            return first, head + await steps(socket, STEPS[1:], **more)

    first, second = ask(served, door(), talk)
    text = "lift the milk" if between == "instruction" else "pick up the can"
    assert near(first, robosuite(direct(STEPS)))
    anew = robosuite(direct(STEPS, text))
    assert near(second, anew) == (between != "nothing")


def test_interleaved_clients_are_as_if_alone(served: Any, direct: Callable) -> None:
    async def talk(url: str) -> Any:
        async with connect(url, compression=None) as one, connect(url, compression=None) as two:
            await one.recv(), await two.recv()
            return await asyncio.gather(steps(one, STEPS), steps(two, OTHERS))

    one, two = ask(served, door(), talk)
    assert near(one, robosuite(direct(STEPS))) and near(two, robosuite(direct(OTHERS)))


def test_the_path_of_vllm_omni(served: Any, direct: Callable) -> None:
    async def talk(url: str) -> Any:
        async with connect(url + OMNI, compression=None) as socket:
            await socket.recv()
            first = [await say(socket, libero(seed)) for seed in STEPS]
            wrong = await say(socket, {"endpoint": "infer", "prompt": "x"})
            status = await say(socket, {"endpoint": "reset"})
            return first, wrong, status, [await say(socket, libero(seed)) for seed in STEPS]

    first, wrong, status, again = ask(served, door(), talk)
    assert near(first, robosuite(direct(STEPS))) and near(again, first)
    assert wrong["type"] == "error" and "no 'observation/image'" in wrong["message"]
    assert status == {"status": "reset successful"}


BAD = [
    (b"\xc1", "extension type"),
    (b"", "ends in the middle"),
    (msgpack.packb([1, 2]), "a map of names"),
    (msgpack.packb({"a": [[[[[[[[[1]]]]]]]]]}), "nested deeper"),
    (msgpack.packb({"a": list(range(5000))}), "made of more than"),
    (b"\xdd\xff\xff\xff\xff", "ends in the middle"),
    (msgpack.packb({"prompt": "x" * 100_000}), "a text has"),
    (
        msgpack.packb({b"__ndarray__": True, b"dtype": "|O", b"shape": [1], b"data": b"x" * 8}),
        "dtype",
    ),
    (
        msgpack.packb({b"__ndarray__": True, b"dtype": "<f4", b"shape": [9**9], b"data": b""}),
        "side",
    ),
    (
        msgpack.packb({b"__ndarray__": True, b"dtype": "<f4", b"shape": [3], b"data": b"x"}),
        "takes 12",
    ),
    (msgpack.packb({b"__ndarray__": True}), "no 'dtype'"),
    (msgpack.packb({b"__npgeneric__": True, b"dtype": "|u1", b"data": 300}), "does not fit"),
    ("text", "a text frame came"),
    (pack(libero(1) | {"observation/image": np.zeros((4, 4, 3))}), "uint8"),
    (pack(libero(1) | {"observation/image": np.zeros((4, 4), np.uint8)}), "expected .height"),
    (pack(libero(1) | {"observation/state": np.full(8, np.nan)}), "not finite"),
    (pack(libero(1) | {"observation/state": np.zeros(7)}), "has 7 numbers"),
    (pack(libero(1) | {"prompt": ""}), "must be a sentence"),
    (pack(libero(1) | {"reset": 1}), "true or false"),
    (pack(libero(1) | {"session_id": [1]}), "session_id"),
    (pack(libero(1) | {"deadline_ms": -1}), "deadline_ms"),
    (pack({"endpoint": "kill"}), "there are infer and reset"),
]


def test_a_bad_message_is_an_error_for_its_client_alone(served: Any, direct: Callable) -> None:
    async def bad(url: str, message: bytes | str) -> tuple[Any, int]:
        async with connect(url, compression=None) as socket:
            await socket.recv()
            await socket.send(message)
            said = await socket.recv()
            with pytest.raises(ConnectionClosed) as closed:
                await socket.recv()
            return said, closed.value.rcvd.code

    async def talk(url: str) -> Any:
        async with connect(url, compression=None) as canary:
            await canary.recv()
            first = await steps(canary, STEPS[:2])
            said = [await bad(url, message) for message, _ in BAD]
            return said, first + await steps(canary, STEPS[2:])

    said, answers = ask(served, door(), talk)
    for (text, code), (_, wanted) in zip(said, BAD, strict=True):
        assert isinstance(text, str) and code == 1011
        assert __import__("re").search(wanted, text) and len(text) <= 2000
    assert near(answers, robosuite(direct(STEPS)))


def test_a_frame_beyond_the_limit_is_not_read(served: Any) -> None:
    async def talk(url: str) -> tuple[int, bytes]:
        reader, writer = await asyncio.open_connection(*url.removeprefix("ws://").split(":"))
        upgrade = "GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        upgrade += (
            "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        writer.write(upgrade.encode())
        await reader.readuntil(b"\r\n\r\n")
        head = await reader.readexactly(2)
        size = int.from_bytes(await reader.readexactly(2), "big") if head[1] == 126 else head[1]
        await reader.readexactly(size)
        writer.write(b"\x82\xff" + (1 << 40).to_bytes(8, "big") + bytes(4))  # 1 TiB will follow
        closing = await reader.read()
        writer.close()
        return closing[0], closing[2:4]

    assert ask(served, door(), talk) == (0x88, (1009).to_bytes(2, "big"))


def test_who_may_come_in(served: Any) -> None:
    async def status(url: str, **headers: str) -> int:
        try:
            async with connect(url, additional_headers=headers, compression=None) as socket:
                await socket.recv()
                return 101
        except InvalidStatus as error:
            return error.response.status_code

    async def talk(url: str) -> list[int]:
        token = "Api-Key " + "t" * 20
        return [
            await status(url),
            await status(url, Authorization="Api-Key " + "u" * 20),
            await status(url, Authorization="Api-Key \xff\xfe"),
            await status(url, Authorization=token),
            await status(url, Authorization=token, Origin="http://evil.example"),
            await status(url + "/healthz"),
            await status(url + "/ready"),
        ]

    assert ask(served, door(token="t" * 20), talk) == [401, 401, 401, 101, 403, 200, 200]


def test_the_silent_and_the_many_are_turned_away(served: Any) -> None:
    async def talk(url: str) -> Any:
        async with connect(url, compression=None) as one, connect(url, compression=None):
            await one.recv()
            with pytest.raises(InvalidStatus) as full:
                await connect(url, compression=None)
            with pytest.raises(ConnectionClosed) as silent:
                await one.recv()
            return full.value.response.status_code, silent.value.rcvd.code

    assert ask(served, door(idle_s=0.5, clients=2), talk) == (503, 1001)


def test_an_error_of_ours_is_a_number_in_the_log(served: Any, caplog: Any) -> None:
    def broken(*_: Any) -> Any:
        raise MemoryError("secret path")

    async def talk(url: str) -> str:
        async with connect(url, compression=None) as socket:
            await socket.recv()
            served.act = broken
            return await say(socket, libero(1))

    said = ask(served, door(), talk)
    number = said.split("(error ")[1][:8]
    assert "secret" not in said and number in caplog.text and "secret path" in caplog.text


@pytest.mark.parametrize("name", ["droid", "aloha"])
def test_other_robots(name: str) -> None:
    keys = KEYS[name]
    image = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    if name == "droid":
        message = {
            "observation/exterior_image_1_left": image,
            "observation/wrist_image_left": image[::-1],
            "observation/joint_position": np.arange(7.0),
            "observation/gripper_position": np.array([7.0], np.float32),
        }
        robot = Robot(2, 8)
    else:
        cameras = ("cam_high", "cam_low", "cam_left_wrist", "cam_right_wrist")
        message = {
            "images": {n: image.transpose(2, 0, 1) for n in cameras},
            "state": np.arange(14.0),
        }
        robot = Robot(3, 14)
    found = robot.observation(unpack(pack(message | {"prompt": "fold"})), keys)
    assert len(found["images"]) == robot.cameras and np.array_equal(found["images"][0], image)
    assert np.array_equal(found["proprio"], np.arange(float(robot.state_dim or 0)))
    with pytest.raises(ValueError, match="takes 5 images"):
        Robot(5).check(len(keys.cameras), "--keys")
