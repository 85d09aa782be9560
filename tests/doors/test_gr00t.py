"""GR00T's door, asked by a client written from the protocol."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np
import pytest
import zmq
import zmq.asyncio
from talking import ROBOT, STEPS, ask, near, seen

from vla_pruner.doors.door import Listen
from vla_pruner.doors.gr00t import Gr00tDoor, Modalities
from vla_pruner.doors.keys import Robot
from vla_pruner.doors.wire import pack, unpack

NAMES = Modalities(state=("pose", "fingers"))


def door(**options: Any) -> Callable:
    listen = Listen(**options)
    return lambda engine: Gr00tDoor(engine, listen, ROBOT, NAMES)


def observation(seed: int, task: str = "pick up the can") -> dict[str, Any]:
    row = seen(seed)
    state = row["proprio"]
    return {
        "video": dict(zip(NAMES.video, (i[None, None] for i in row["images"]), strict=True)),
        "state": {"pose": state[None, None, :6], "fingers": state[None, None, 6:]},
        "language": {"task": [[task]]},
    }


class Client:
    """REQ, msgpack, arrays as `numpy.save` writes them."""

    def __init__(self, url: str) -> None:
        self.socket = zmq.asyncio.Context.instance().socket(zmq.REQ)
        self.socket.connect(url)

    async def raw(self, message: bytes) -> Any:
        await self.socket.send(message)
        return unpack(await self.socket.recv())

    async def ask(self, endpoint: str, data: Any = None, **more: Any) -> Any:
        return await self.raw(pack({"endpoint": endpoint, "data": data, **more}, as_npy=True))

    async def act(self, *seeds: int) -> list[np.ndarray]:
        chunks = []
        for seed in seeds:
            data = {"observation": observation(seed), "options": None}
            actions, info = await self.ask("get_action", data)
            assert info["method"] == "vla-pruner" and info["valid"] == 4
            chunks.append(np.concatenate(list(actions.values()), axis=2)[0])
        return chunks

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close(linger=0)


def test_answers_are_those_of_the_policy_itself(served: Any, direct: Callable) -> None:
    async def talk(url: str) -> Any:
        with Client(url) as one, Client(url) as two:
            assert (await one.ask("ping"))["status"] == "ok"
            found = await one.ask("get_modality_config")
            assert found["video"]["as_json"]["modality_keys"] == list(NAMES.video)
            mixed = [(await one.act(seed), await two.act(seed)) for seed in STEPS]
            assert await one.ask("reset", {"options": None}) == {}
            return [a[0] for a, _ in mixed], [b[0] for _, b in mixed], await one.act(*STEPS)

    one, two, again = ask(served, door(), talk)
    assert near(one, direct(STEPS)) and near(two, one) and near(again, one)


def test_bad_requests_are_errors_for_their_client(served: Any) -> None:
    array = {"__ndarray_class__": True}
    buffer = io.BytesIO()
    np.save(buffer, np.array([{}], dtype=object), allow_pickle=True)
    huge = b"\x93NUMPY\x01\x00v\x00" + (
        b"{'descr': '<f8', 'fortran_order': False, 'shape': (4000000, 40000), }".ljust(117) + b"\n"
    )
    good = observation(1)
    cases = [
        (b"\xc1", "extension"),
        (msgpack.packb(1), "map of names"),
        (pack({"endpoint": "kill"}), "SIGTERM"),
        (pack({"endpoint": "x" * 9999}), "there are ping"),
        (pack({"data": 1}), "`data`"),
        (pack({"data": {"observation": 1}}), "must hold a map"),
        (pack({"data": {"observation": array}}), "no 'as_npy'"),
        (pack({"data": {"observation": array | {"as_npy": b"x"}}}), "NPY form"),
        (pack({"data": {"observation": array | {"as_npy": buffer.getvalue()}}}), "dtype '|O'"),
        (pack({"data": {"observation": array | {"as_npy": huge}}}), "takes 1280000000000 bytes"),
    ]
    for part, value, said in [
        ("video", {}, "has no array 'image'"),
        ("video", {"image": good["video"]["image"][0], "wrist_image": 0}, "expected [1, 1"),
        ("state", {"pose": np.zeros((1, 1, 6))}, "has no array 'fingers'"),
        ("state", {"pose": np.zeros((1, 1, 6)), "fingers": np.zeros((1, 1, 9))}, "15 numbers"),
        ("language", {"task": []}, "must be [[sentence]]"),
    ]:
        data = {"observation": good | {part: value}}
        cases.append((pack({"endpoint": "get_action", "data": data}, as_npy=True), said))

    async def talk(url: str) -> list[Any]:
        with Client(url) as client:
            answers = [await client.raw(message) for message, _ in cases]
            await client.act(1)
            return answers

    for answer, (_, said) in zip(ask(served, door(), talk), cases, strict=True):
        assert said in answer["error"], answer
        assert len(answer["error"]) < 500


def test_the_token(served: Any) -> None:
    async def talk(url: str) -> list[Any]:
        with Client(url) as client:
            return [
                await client.ask("ping"),
                await client.ask("ping", api_token=["t"]),
                await client.ask("ping", api_token="t" * 20),
            ]

    first, second, third = ask(served, door(token="t" * 20), talk)
    assert "Unauthorized" in first["error"] and "Unauthorized" in second["error"]
    assert third["status"] == "ok"


def test_what_does_not_fit_is_refused_before_it_listens() -> None:
    with pytest.raises(ValueError, match="8 numbers an action"):
        Gr00tDoor(None, Listen(), Robot(1, None, 8))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="takes 3 images"):
        Gr00tDoor(None, Listen(), Robot(3))  # type: ignore[arg-type]
