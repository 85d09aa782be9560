"""Our light client against servers that lie, mumble, repeat themselves or are swapped."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgpack
import numpy as np
import pytest

pytest.importorskip("vla_pruner_client", reason="pip install ./clients/python")

from test_client import look, ticks
from vla_pruner_client import Client, Executor, Lost, ServerError
from websockets.sync.server import ServerConnection, serve

from vla_pruner.doors.wire import pack

GOOD = {"actions": np.ones((4, 7), np.float32)}
HELLO = pack({"server": "another"})


@contextmanager
def server(talk: Callable[[ServerConnection], Any]) -> Iterator[str]:
    """A server that says what `talk` says on each connection."""
    with serve(talk, "127.0.0.1", 0, compression=None) as made:
        thread = threading.Thread(target=made.serve_forever, daemon=True)
        thread.start()
        yield f"ws://127.0.0.1:{made.socket.getsockname()[1]}"
        made.shutdown()
        thread.join(5)


def answering(*answers: Any, hello: Any = HELLO) -> Callable[[ServerConnection], None]:
    """Says hello, then one of the answers to each question, and then waits."""

    def talk(socket: ServerConnection) -> None:
        socket.send(hello)
        for answer in answers:
            socket.recv()
            socket.send(answer if isinstance(answer, bytes | str) else pack(answer))
        socket.recv()

    return talk


def actions(value: Any) -> dict[str, Any]:
    return {"actions": value}


@pytest.mark.parametrize(
    "answer",
    [
        actions(np.full((4, 7), np.nan, np.float32)),
        actions(np.full((4, 7), np.inf)),
        actions(np.ones(7, np.float32)),
        actions(np.ones((1, 4, 7), np.float32)),
        actions(np.float32(1)),
        actions(None),
        actions("left"),
        actions([[1.0], [1.0, 2.0]]),
        {},
        {"action": np.ones((4, 7), np.float32)},
        [1, 2],
        None,
        {**GOOD, "valid": -1},
        {**GOOD, "valid": 5},
        {**GOOD, "valid": 2.5},
        {**GOOD, "valid": True},
        {**GOOD, "late": "no"},
        {**GOOD, "vla_pruner": [1]},
        {**GOOD, "vla_pruner": {"valid": -3}},
        b"",
        b"\xc1",
        pack(GOOD)[:-3],
        pack(GOOD) + b"x",
        msgpack.packb({"actions": {b"__ndarray__": True, b"data": b"", b"dtype": "|O"}}),
        msgpack.packb(
            {"actions": {b"__ndarray__": 1, b"data": b"", b"dtype": "<f4", b"shape": [2, 2]}}
        ),
        msgpack.packb(
            {"actions": {b"__ndarray__": 1, b"data": b"", b"dtype": "<c8", b"shape": [0, 7]}}
        ),
        "the policy failed",
    ],
)
def test_an_answer_that_makes_no_sense_is_an_error(answer: Any) -> None:
    with server(answering(answer)) as url, Client(url, timeout_s=10) as client:
        with pytest.raises(ServerError) as told:
            client.infer(look())
        assert url in str(told.value) and len(str(told.value)) < 400
    with server(answering(GOOD)) as url, Client(url, timeout_s=10) as client:
        assert np.array_equal(client.infer(look()).actions, GOOD["actions"])


@pytest.mark.parametrize("hello", [b"", b"\xc1", pack([1]), pack(None), "go away", pack("x")])
def test_a_greeting_that_is_none_is_an_error(hello: Any) -> None:
    talk = answering(GOOD, hello=hello)
    with server(talk) as url, Client(url, timeout_s=10) as client, pytest.raises(ServerError):
        client.infer(look())


def test_an_answer_to_no_question_is_not_taken_for_the_next() -> None:
    def twice(socket: ServerConnection) -> None:
        socket.send(HELLO)
        for number in range(9):
            socket.recv()
            socket.send(pack(actions(np.full((4, 7), number, np.float32))))
            socket.send(pack(actions(np.full((4, 7), 100 + number, np.float32))))

    with server(twice) as url, Client(url, timeout_s=10) as client:
        assert client.infer(look()).actions[0, 0] == 0
        threading.Event().wait(0.2)  # the second answer is here by now
        with pytest.raises(ServerError, match="what nobody asked"):
            client.infer(look())
        assert client.infer(look()).actions[0, 0] == 0  # on a new connection


def test_another_width_or_another_server_is_not_followed() -> None:
    narrow = actions(np.ones((4, 6), np.float32))
    with server(answering(GOOD, narrow)) as url, Client(url, timeout_s=10) as client:
        client.infer(look())
        with pytest.raises(ServerError, match="actions of 6 numbers, once 7"):
            client.infer(look())

    hellos = iter([HELLO, HELLO, pack({"server": "swapped"}), pack({"server": "swapped"})])

    def once(socket: ServerConnection) -> None:
        socket.send(next(hellos))
        socket.recv()
        socket.send(pack(GOOD))

    with server(once) as url, Client(url, timeout_s=10) as client:
        assert [client.infer(look()).valid for _ in range(2)] == [4, 4]
        assert client.connections == 2
        for _ in range(2):
            with pytest.raises(ServerError, match="another server than before answers"):
                client.infer(look())


def test_a_server_that_leaves_in_the_middle_of_an_answer_is_lost() -> None:
    def leaves(socket: ServerConnection) -> None:
        socket.send(HELLO)
        socket.recv()
        socket.socket.sendall(b"\x82\x7e\x10\x00abc")
        socket.socket.close()

    with server(leaves) as url, Client(url, timeout_s=0.5) as client, pytest.raises(Lost):
        client.infer(look())


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_times_that_are_none(seconds: float) -> None:
    with pytest.raises(ValueError, match="seconds above 0"):
        Client("ws://127.0.0.1:9", timeout_s=seconds).infer(look())
    if not seconds >= 0:
        with pytest.raises(ValueError, match="seconds above 0"):
            Client("ws://127.0.0.1:9").infer(look(), deadline_s=seconds)


def test_an_executor_says_why_it_stands_instead_of_failing_in_a_stop() -> None:
    with server(answering(GOOD, GOOD)) as url:
        options: dict[str, Any] = {"stop": "zero", "kept": (7,)}
        with Executor(Client(url, timeout_s=5), look, **options) as executor:
            ticks(executor, lambda command: "out of bounds" in command.why)
            assert executor.step().action is None
    for wrong in ({"ask_at": -1}, {"max_age_s": 0.0}, {"max_age_s": float("nan")}):
        with pytest.raises(ValueError, match=r">= 0.*> 0"):
            Executor(Client("ws://127.0.0.1:9"), look, stop="hold", **wrong)


def test_what_a_stop_holds_cannot_be_changed_from_outside() -> None:
    options: dict[str, Any] = {"stop": "hold", "max_age_s": 60}
    with (
        server(answering(GOOD)) as url,
        Executor(Client(url, timeout_s=1), look, **options) as executor,
    ):
        ticks(executor, lambda command: not command.stopped)
        held = ticks(executor, lambda command: command.stopped)[-1]
        held.action[:] = 99
        assert (executor.step().action == 1).all()
