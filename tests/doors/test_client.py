"""Our light client: deadlines, connecting again, and the stop when the server dies in mid-chunk."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vla_pruner_client", reason="pip install ./clients/python")

import counting_server
from vla_pruner_client import Answer, Client, Executor, Lost, ServerError

ROOT = Path(__file__).parents[2]
CHUNK = counting_server.CHUNK
FORK = multiprocessing.get_context("fork")  # torch is loaded already


class Server:
    """A process that answers with chunks of numbers: episode, step of the episode, place in it."""

    def __init__(self, port: int = 0, sleep: float = 0.0, token: str | None = None) -> None:
        here, there = FORK.Pipe(duplex=False)
        self.process = FORK.Process(target=counting_server.run, args=(port, sleep, token, there))
        self.process.start()
        assert here.poll(30)
        self.url = here.recv()
        self.port = int(self.url.rsplit(":", 1)[1])

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


@pytest.fixture
def start() -> Iterator[Callable[..., Server]]:
    made: list[Server] = []

    def run(*arguments: Any) -> Server:
        made.append(Server(*arguments))
        return made[-1]

    yield run
    for server in made:
        server.kill()


def look() -> dict[str, Any]:
    return {
        "observation/image": np.zeros((8, 8, 3), np.uint8),
        "observation/state": np.zeros(8),
        "prompt": "pick up the can",
    }


def ticks(executor: Executor, wanted: Callable[[Any], bool], limit_s: float = 20.0) -> list[Any]:
    """Commands of the ticks until one is as wanted; fails if none is."""
    until, made = time.monotonic() + limit_s, []
    while time.monotonic() < until:
        made.append(executor.step())
        if wanted(made[-1]):
            return made
        time.sleep(0.01)
    raise AssertionError(f"not within {limit_s} s; last {made[-1]}")


def test_it_asks_resets_and_connects_again(start: Callable) -> None:
    server = start()
    with Client(server.url, timeout_s=20) as client:
        first, second = client.infer(look()), client.infer(look())
        client.reset()
        anew = client.infer(look())
        assert isinstance(first, Answer) and first.actions.shape == (CHUNK, 7)
        assert [a.actions[0, 1] for a in (first, second, anew)] == [0, 1, 0]
        assert first.about["method"] == "counting" and first.about["server_timing"]["infer_ms"] > 0
        server.kill()
        timer = threading.Timer(0.5, start, (server.port,))
        timer.start()
        back = client.infer(look())
        timer.join()
        assert back.actions[0, 1] == 0 and client.connections == 2


def test_a_refusal_is_no_loss(start: Callable) -> None:
    with Client(start().url, timeout_s=20) as client:
        client.infer(look())
        with pytest.raises(ServerError, match="no 'prompt'"):
            client.infer({k: v for k, v in look().items() if k != "prompt"})
        assert client.infer(look()).actions[0, 1] == 0
        with pytest.raises(TypeError, match="holds a object"):
            client.infer(look() | {"x": object()})


def test_no_server_and_a_slow_one_are_losses(start: Callable) -> None:
    with Client("ws://127.0.0.1:9", timeout_s=0.3) as client, pytest.raises(Lost, match=r"0\.3 s"):
        client.infer(look())
    slow = start(0, 30.0)
    with Client(slow.url, deadline_s=0.2) as client, pytest.raises(Lost, match=r"0\.25 s"):
        client.infer(look())


def test_the_token(start: Callable) -> None:
    server = start(0, 0.0, "t" * 20)
    with Client(server.url) as client, pytest.raises(ServerError, match="401"):
        client.infer(look())
    with Client(server.url, token="t" * 20) as client:
        assert client.infer(look()).actions.shape == (CHUNK, 7)


@pytest.mark.parametrize("stop", ["hold", "zero"])
def test_the_server_dies_in_mid_chunk(start: Callable, stop: Any) -> None:
    server = start()
    client = Client(server.url, timeout_s=1)
    with Executor(client, look, stop=stop, max_age_s=60) as executor:
        ticks(executor, lambda c: not c.stopped)
        server.kill()
        made = ticks(executor, lambda c: c.stopped and "no answer" in c.why)
        moving = [c.action[2] for c in made if not c.stopped]
        assert moving[-1] == CHUNK - 1  # what was left of the last chunk was carried out
        stopped = [c.action for c in made if c.stopped]
        last = np.array([0, stopped[0][1], CHUNK - 1, 9, 9, 9, 0.5], np.float32)
        if stop == "zero":
            last[:-1] = 0
        assert all(np.array_equal(action[2:], last[2:]) for action in stopped)
        start(server.port)
        again = ticks(executor, lambda c: not c.stopped)[-1]
        assert again.action[1] == 0 and client.connections == 2


def test_steps_that_were_carried_out_meanwhile_are_not_repeated(start: Callable) -> None:
    with Executor(
        Client(start(0, 0.05).url), look, stop="hold", ask_at=6, max_age_s=60
    ) as executor:
        made = ticks(executor, lambda c: not c.stopped and c.action[1] == 3)
    moving = [c.action[1:3] for c in made if not c.stopped]
    for before, after in pairwise(moving):
        if after[0] == before[0]:
            assert after[1] == before[1] + 1
    firsts = [after[1] for before, after in pairwise(moving) if after[0] != before[0]]
    assert len(firsts) == 3 and max(firsts) >= 1


def test_old_actions_are_not_carried_out(start: Callable) -> None:
    server = start()
    with Executor(Client(server.url, timeout_s=1), look, stop="hold", max_age_s=0.2) as executor:
        ticks(executor, lambda c: not c.stopped)
        server.kill()
        time.sleep(0.3)
        command = executor.step()
    assert command.stopped and "s old" in command.why


def test_nothing_was_ever_said() -> None:
    with Executor(Client("ws://127.0.0.1:9", timeout_s=0.2), look, stop="zero") as executor:
        command = executor.step()
    assert command.stopped and command.action is None
    with pytest.raises(ValueError, match="stop='halt'"):
        Executor(Client("ws://127.0.0.1:9"), look, stop="halt")  # type: ignore[arg-type]


def test_it_is_small_and_needs_no_torch() -> None:
    source = (ROOT / "clients/python/src/vla_pruner_client/__init__.py").read_text("utf-8")
    assert len(source.splitlines()) < 300
    code = "import sys, vla_pruner_client; sys.exit('torch' in sys.modules)"
    folder = str(ROOT / "clients" / "python" / "src")
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": folder})
    assert done.returncode == 0
