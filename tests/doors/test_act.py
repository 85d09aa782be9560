"""The door `/act`: both forms of OpenVLA's requests, episodes without connections, bad requests."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from talking import ROBOT, STEPS, ask, near, opened, seen

from vla_pruner.doors import http
from vla_pruner.doors.act import ActDoor
from vla_pruner.doors.door import Listen
from vla_pruner.doors.wire import from_json, to_json
from vla_pruner.serving.engine import Reply


def door(**options: Any) -> Callable:
    listen = Listen(**options)
    return lambda engine: ActDoor(engine, listen, ROBOT)


def oft(seed: int, **more: Any) -> dict[str, Any]:
    """What OFT's client sends."""
    row = seen(seed)
    return {
        "full_image": row["images"][0],
        "wrist_image": row["images"][1],
        "state": row["proprio"],
        "instruction": row["instruction"],
        **more,
    }


async def request(
    url: str, body: Any = None, path: str = "/act", method: str = "POST", **headers: str
) -> tuple[int, Any, dict[str, str]]:
    """Status, body and headers of one request on a connection of its own."""
    host, port = url.split("/")[2].split(":")
    raw = body if isinstance(body, bytes) else b"" if body is None else to_json(body)
    sent = {"host": "x", "content-type": "application/json", "content-length": str(len(raw))}
    sent |= {name.replace("_", "-"): value for name, value in headers.items()}
    head = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in sent.items())
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(head.encode() + b"connection: close\r\n\r\n" + raw)
    answer = await reader.read()
    writer.close()
    first, _, text = answer.partition(b"\r\n\r\n")
    lines = first.decode().split("\r\n")
    found = dict(line.split(": ", 1) for line in lines[1:])
    is_json = found.get("content-type") == "application/json"
    return int(lines[0].split()[1]), from_json(text) if is_json else text, found


def test_the_forms_of_oft_and_of_openvla(served: Any, direct: Callable) -> None:
    async def talk(url: str) -> Any:
        listed = [await request(url, oft(seed)) for seed in STEPS]
        row = {("image" if k == "full_image" else k): v for k, v in oft(1).items()}
        whole = await request(url, row | {"reset": True, "unnorm_key": "pick_place"})
        text = to_json(row | {"reset": True}).decode()
        return listed, whole, await request(url, {"encoded": text})

    listed, whole, encoded = ask(served, door(), talk)
    wanted = direct(STEPS)
    assert all(status == 200 and isinstance(body, list) for status, body, _ in listed)
    assert near([np.stack(body) for _, body, _ in listed], wanted)
    assert [h["x-vla-pruner-warm-up"] for *_, h in listed] == ["true"] * 3 + ["false"] * 2
    assert near([whole[1]], wanted[:1]) and isinstance(encoded[1], str)
    assert near([from_json(encoded[1])], wanted[:1])


def test_one_action_is_one_array(served: Any) -> None:
    from vla_pruner.serving.engine import Reply

    reply = Reply(np.ones((1, 7), np.float32), False, 0.0, 1, 1.0, None, False, 1.0, "none")
    made = ActDoor(None, Listen(), ROBOT)._actions(reply, as_list=False)  # type: ignore[arg-type]
    assert isinstance(made, np.ndarray) and made.shape == (7,)


def test_sessions_keep_robots_apart(served: Any, direct: Callable) -> None:
    async def talk(url: str) -> Any:
        async def run(name: str, seeds: list[int]) -> list[Any]:
            bodies = [await request(url, oft(seed, session_id=name)) for seed in seeds]
            return [np.stack(body) for _, body, _ in bodies]

        one, two = await asyncio.gather(run("a", STEPS), run("b", STEPS[::-1]))
        status, *_ = await request(url, {"session_id": "a"}, path="/reset")
        return one, two, status, await run("a", STEPS)

    one, two, status, again = ask(served, door(), talk)
    assert near(one, direct(STEPS)) and near(two, direct(STEPS[::-1]))
    assert status == 200 and near(again, one)


def test_two_at_once_without_a_session_are_refused(served: Any) -> None:
    async def talk(url: str) -> list[int]:
        many = await asyncio.gather(*(request(url, oft(seed)) for seed in STEPS))
        assert all("session_id" in body["error"] for status, body, _ in many if status != 200)
        return [status for status, *_ in many]

    answers = ask(served, door(), talk)
    assert 200 in answers and 422 in answers


def test_what_is_not_understood_is_said(served: Any) -> None:
    cases: list[tuple[Any, dict[str, Any], int, str]] = [
        (b"", {}, 422, "no JSON"),
        (b"[1]", {}, 422, "map of names"),
        (b"[" * 3000, {}, 422, "no JSON"),
        (b"[" * 100_000, {}, 422, "made of more than"),
        (b'{"a": NaN}', {}, 422, "NaN"),
        (b'{"a": ' + b"9" * 5000 + b"}", {}, 422, "no JSON"),
        (b"\xff\xfe", {}, 422, "no JSON"),
        ({"encoded": 1}, {}, 422, "must be a text"),
        ({"image": 1, "instruction": "x"}, {}, 422, "takes 2 images"),
        (oft(1, full_image=[1, 2]), {}, 422, "uint8"),
        (oft(1, state=np.full(8, np.inf)), {}, 422, "not finite"),
        (oft(1, unnorm_key="none_such"), {}, 422, "none_such"),
        (oft(1, unnorm_key=1), {}, 422, "unnorm_key"),
        (b'{"image": {"__numpy__": "!", "dtype": "|u1", "shape": [1]}}', {}, 422, "base64"),
        (b'{"image": {"__numpy__": "", "dtype": [["a", "O"]], "shape": [1]}}', {}, 422, "dtype"),
        (oft(1), {"path": "/other"}, 404, "POST /act"),
        (oft(1), {"method": "PUT"}, 405, "takes POST"),
        (oft(1), {"origin": "http://evil.example"}, 403, "web pages"),
        (oft(1), {"content_type": "text/plain"}, 415, "send JSON"),
        (b"x", {"content_length": str(1 << 40)}, 413, "at most"),
    ]

    async def talk(url: str) -> list[Any]:
        return [await request(url, body, **more) for body, more, *_ in cases]

    for (status, body, _), (*_, wanted, said) in zip(ask(served, door(), talk), cases, strict=True):
        assert status == wanted and said in body["error"], (status, body, said)
        assert len(json.dumps(body)) < 2000


def test_pages_and_the_token(served: Any) -> None:
    async def talk(url: str) -> list[int]:
        asked = [
            await request(url, path="/health", method="GET"),
            await request(url, oft(1)),
            await request(url, oft(1), authorization="Bearer " + "t" * 20),
        ]
        return [status for status, *_ in asked]

    assert ask(served, door(token="t" * 20), talk) == [200, 401, 200]


def test_slow_and_silent_connections_do_not_starve_others(
    served: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "HEAD_S", 0.3)
    monkeypatch.setattr(http, "BODY_S", 0.3)

    async def talk(url: str) -> Any:
        host, port = url.split("/")[2].split(":")
        silent = [await asyncio.open_connection(host, int(port)) for _ in range(20)]
        for _, writer in silent[10:]:
            writer.write(
                b"POST /act HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
                b"content-length: 10\r\n\r\n"
            )
        ends = await asyncio.gather(*(asyncio.wait_for(reader.read(), 10) for reader, _ in silent))
        status, *_ = await request(url, oft(1))
        return ends, status

    ends, status = ask(served, door(clients=20), talk)
    assert status == 200 and ends[:10] == [b""] * 10
    assert all(end.startswith(b"HTTP/1.1 408") for end in ends[10:])


def test_what_is_no_http_is_answered_once(served: Any) -> None:
    async def talk(url: str) -> bytes:
        host, port = url.split("/")[2].split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"\x16\x03\x01 hello\r\n\r\n")
        return await asyncio.wait_for(reader.read(), 10)

    assert ask(served, door(), talk).startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize("chunk", [1, 4])
def test_a_late_reply_has_the_form_of_the_others_or_is_an_error(chunk: int) -> None:
    """One step that is left of four is no action of a policy that gives one at a time."""
    rows = np.arange(7.0 * chunk, dtype=np.float32).reshape(chunk, 7)

    class Engine:
        given = iter([(rows, False), (rows[-1:], True), (rows[:0], True)])

        def open(self, label: str) -> int:
            return 0

        async def act(self, *_: Any, **__: Any) -> Reply:
            actions, late = next(self.given)
            return Reply(actions, late, 0.1, len(actions), 1.0, None, False, 1.0, "m")

        async def end(self, episode: int) -> None:
            """Nothing is remembered."""

    seen = {("image" if name == "full_image" else name): v for name, v in oft(1).items()}

    async def talk() -> Any:
        engine: Any = Engine()
        async with opened(ActDoor(engine, Listen(), ROBOT)) as url:
            return [await request(url, seen) for _ in range(3)]

    fresh, late, nothing = asyncio.run(asyncio.wait_for(talk(), 120))
    assert np.array_equal(fresh[1], rows if chunk > 1 else rows[0])
    assert np.array_equal(late[1], rows[-1:] if chunk > 1 else rows[0])
    assert [each[2].get("x-vla-pruner-late") for each in (fresh, late)] == ["false", "true"]
    assert nothing[0] == 503 and "nothing is left of the last chunk" in nothing[1]["error"]
