"""Several doors before one engine: which ports, what is refused, and how it ends."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
from talking import ROBOT, libero, near
from websockets.asyncio.client import connect

from vla_pruner import cli
from vla_pruner.doors.act import ActDoor
from vla_pruner.doors.door import Listen
from vla_pruner.doors.keys import KEYS, keys_of, with_gripper
from vla_pruner.doors.openpi import OpenpiDoor
from vla_pruner.doors.run import open_doors, wanted
from vla_pruner.doors.wire import pack, unpack
from vla_pruner.serving.engine import Engine


def test_ports() -> None:
    assert wanted(["openpi"], None) == [("openpi", 8000)]
    assert wanted(["gr00t"], 7) == [("gr00t", 7)]
    assert wanted(["openpi:0", "act:0", "lerobot"], None)[2] == ("lerobot", 8080)
    for protocols, port, said in [
        (["ros"], None, "choose vla-eval, openpi"),
        (["openpi:x"], None, "the port is 0 to 65535"),
        (["openpi:99999"], None, "the port is 0 to 65535"),
        (["openpi", "act"], None, "two doors at one port"),
        (["openpi", "gr00t"], 5, "--port is for one door"),
    ]:
        with pytest.raises(ValueError, match=said):
            wanted(protocols, port)


def test_two_doors_share_an_engine_and_end_with_sigterm(served: Any, direct: Callable) -> None:
    async def both() -> Any:
        engine, open_ = Engine(served), asyncio.Queue()
        doors = [
            OpenpiDoor(engine, Listen(), ROBOT, KEYS["libero"]),
            ActDoor(engine, Listen(), ROBOT),
        ]
        task = asyncio.create_task(open_doors(engine, doors, lambda *a: open_.put_nowait(a)))
        found = dict([await open_.get(), await open_.get()])
        async with connect(found["openpi"], compression=None) as socket:
            await socket.recv()
            await socket.send(pack(libero(1)))
            actions = unpack(await socket.recv())["actions"]
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.wait_for(task, 30)
            await socket.wait_closed()
            return found, actions, socket.close_code

    found, actions, code = asyncio.run(both())
    assert set(found) == {"openpi", "act"} and code == 1001
    assert near([actions], [with_gripper(direct([1])[0], "rlds", "robosuite")])


def test_keys_of_ones_own(tmp_path: Any) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text("cameras: [top, images.wrist]\nstate: [joints]\ngripper: rlds\n")
    assert keys_of(str(file)).cameras == ("top", "images.wrist")
    for text in ("cameras: top\nstate: []", "a: 1", "[", "cameras: []\nstate: []\ngripper: up"):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"keys\.yaml"):
            keys_of(str(file))
    for text in ("cameras: [a, a]\nstate: [s]", "cameras: [a, b]\nstate: ['']"):
        file.write_text(text)
        with pytest.raises(ValueError, match="twice, or nothing"):
            keys_of(str(file))
    with pytest.raises(ValueError, match="choose libero, droid, aloha"):
        keys_of("franka")


def test_lerobot_asks_for_a_second_word(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "--protocol", "lerobot"]) == cli.BAD_INPUT
    assert "--accept-lerobot-pickles" in capsys.readouterr().err
