"""A robot's side of openpi's protocol: questions with a deadline, chunks that end in a safe stop.

`Client` asks, one question at a time, and connects again when the connection is lost. `Executor`
asks in a thread of its own and has an action for every tick of a control loop: of the newest chunk
while it holds, and of a stop when there is none.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import msgpack
import numpy as np
import websockets.exceptions
from websockets.sync.client import ClientConnection, connect

__all__ = ["Answer", "Client", "Command", "Executor", "Lost", "ServerError"]

GRACE_S = 0.05
"""How much later than its deadline a server's answer may come, for the way here."""


class Lost(ConnectionError):
    """No answer within the time: the server is away, or too slow."""


class ServerError(RuntimeError):
    """The server refused the observation, or failed; asking the same again will not help."""


@dataclass(frozen=True)
class Answer:
    """What a server said.

    Args:
        actions: `[H, D]`.
        late: they are the rest of the chunk before, because the deadline passed.
        valid: steps of `actions` that still hold.
        about: all else that came: keep, tokens, warm_up, age_ms, infer_ms, method, timings.
    """

    actions: np.ndarray
    late: bool
    valid: int
    about: Mapping[str, Any] = field(default_factory=dict)


class Client(contextlib.AbstractContextManager["Client"]):
    """One connection to a server; every connection is an episode of its own there.

    Args:
        url: `ws://HOST:PORT`, or `wss://` for TLS.
        token: sent as `Authorization: Api-Key TOKEN`.
        timeout_s: how long a question may take in all, connecting again included.
        deadline_s: the server is asked to answer within this, if need be with the rest of the last
            chunk; None: as long as it takes.
        ssl: an `ssl.SSLContext` for a certificate of one's own.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        timeout_s: float = 10.0,
        deadline_s: float | None = None,
        ssl: Any = None,
    ) -> None:
        self.url, self.timeout_s, self.deadline_s = url, timeout_s, deadline_s
        self.metadata: dict[str, Any] = {}
        self.connections = 0
        self._headers = {} if token is None else {"Authorization": f"Api-Key {token}"}
        self._ssl = ssl
        self._socket: ClientConnection | None = None
        self._open = contextlib.ExitStack()
        self._anew = False

    def infer(self, observation: Mapping[str, Any], *, deadline_s: float | None = None) -> Answer:
        """The server's actions for an observation.

        Raises:
            Lost: no answer within `timeout_s`, or within the deadline and a little.
            ServerError: the server refused, or failed.
        """
        deadline = self.deadline_s if deadline_s is None else deadline_s
        left = min(self.timeout_s, self.timeout_s if deadline is None else deadline + GRACE_S)
        until, pause = time.monotonic() + left, 0.02
        while True:
            try:
                return self._ask(observation, deadline, until)
            except (OSError, EOFError, websockets.exceptions.WebSocketException) as error:
                self.close()
                status = getattr(getattr(error, "response", None), "status_code", None)
                if status in (401, 403, 404):
                    raise ServerError(f"{self.url} answers {status}: see the token") from error
                if time.monotonic() + pause >= until:
                    raise Lost(f"no answer of {self.url} in {left:.3g} s: {error}") from error
                time.sleep(pause)
                pause = min(2 * pause, 1.0)

    def reset(self) -> None:
        """The next observation begins an episode."""
        self._anew = True

    def close(self) -> None:
        """Hang up; the next question connects again."""
        self._socket = None
        with contextlib.suppress(Exception):  # the connection is not used again
            self._open.close()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _connected(self, until: float) -> ClientConnection:
        if self._socket is None:
            left = max(until - time.monotonic(), 0.001)
            fixed = {"compression": None, "ping_interval": None, "close_timeout": 0.2}
            headers = {"additional_headers": self._headers, "ssl": self._ssl}
            opening = connect(self.url, open_timeout=left, **fixed, **headers)
            self._socket = self._open.enter_context(opening)
            self.metadata = _unpack(self._socket.recv(max(until - time.monotonic(), 0.001)))
            self.connections += 1
            self._anew = False
        return self._socket

    def _ask(self, observation: Mapping[str, Any], deadline: float | None, until: float) -> Answer:
        socket, message = self._connected(until), dict(observation)
        if self._anew:
            message["reset"] = True
        if deadline is not None and self.metadata.get("server") == "vla-pruner":
            message["deadline_ms"] = max(1000 * deadline, 1.0)
        socket.send(msgpack.packb(message, default=_pack))
        self._anew = False
        reply = socket.recv(max(until - time.monotonic(), 0.001))
        if isinstance(reply, str):
            self.close()
            raise ServerError(reply)
        found = _unpack(reply)
        actions = np.asarray(found["actions"], dtype=np.float32)
        if actions.ndim != 2 or not np.isfinite(actions).all():
            raise ServerError(f"the server sent actions of shape {actions.shape} that are no chunk")
        about = {key: value for key, value in found.items() if key != "actions"}
        about |= about.pop("vla_pruner", {})
        valid = int(about.get("valid", len(actions)))
        return Answer(actions, bool(about.get("late", False)), min(valid, len(actions)), about)


@dataclass(frozen=True)
class Command:
    """What a tick does.

    Args:
        action: `[D]`; None: nothing was ever said, so that there is nothing to hold.
        stopped: it is the safe stop.
        age_s: age of the observation that it answers; of a stop, how long it lasts.
        why: of a stop: what the server or the connection said last.
    """

    action: np.ndarray | None
    stopped: bool
    age_s: float
    why: str = ""


class Executor:
    """An action for every tick. Its stop is not a certified safety function.

    Args:
        client: who is asked.
        observe: gives what the robot sees now; called in this executor's thread.
        stop: "hold" repeats the last action (position control); "zero" sends zeros (velocity or
            delta control) but for the entries in `kept`.
        kept: entries of an action that a zero stop leaves as they were: the gripper.
        ask_at: a new chunk is asked for when so many steps are left.
        max_age_s: actions whose observation is older are not carried out.
    """

    def __init__(
        self,
        client: Client,
        observe: Callable[[], Mapping[str, Any]],
        *,
        stop: Literal["hold", "zero"],
        kept: tuple[int, ...] = (-1,),
        ask_at: int = 0,
        max_age_s: float = 2.0,
    ) -> None:
        if stop not in ("hold", "zero"):
            raise ValueError(f"stop={stop!r}: hold for position control, zero for velocities")
        self.client, self.observe, self.stop, self.kept = client, observe, stop, kept
        self.ask_at, self.max_age_s = ask_at, max_age_s
        self._lock = threading.Condition()
        self._chunk: np.ndarray | None = None
        self._seen = 0.0
        self._at = 0
        self._moved = 0
        self._last: np.ndarray | None = None
        self._since = time.monotonic()
        self._why = "no chunk has come yet"
        self._ending = False
        self._thread = threading.Thread(target=self._ask, daemon=True, name="vla-pruner-client")

    def __enter__(self) -> Executor:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._ending = True
            self._lock.notify_all()
        self._thread.join(self.client.timeout_s + 1)
        self.client.close()

    def step(self) -> Command:
        """The action of this tick; never waits for the server."""
        with self._lock:
            now = time.monotonic()
            chunk, age = self._chunk, now - self._seen
            if chunk is not None and age > self.max_age_s:
                self._why = f"the actions are {age:.3g} s old"
                chunk = self._chunk = None
            if chunk is None or self._at >= len(chunk):
                self._lock.notify_all()
                return Command(self._stopped(), True, now - self._since, self._why)
            action = chunk[self._at]
            self._at += 1
            self._moved += 1
            self._last, self._since = action, now
            if len(chunk) - self._at <= self.ask_at:
                self._lock.notify_all()
            return Command(action.copy(), False, age)

    def _stopped(self) -> np.ndarray | None:
        action = None if self._last is None else self._last.copy()
        if action is not None and self.stop == "zero":
            kept = action[list(self.kept)]
            action[:] = 0
            action[list(self.kept)] = kept
        return action

    def _needed(self) -> bool:
        return self._ending or self._chunk is None or len(self._chunk) - self._at <= self.ask_at

    def _ask(self) -> None:
        while True:
            with self._lock:
                self._lock.wait_for(self._needed)
                if self._ending:
                    return
                seen, moved = time.monotonic(), self._moved
            try:
                answer = self.client.infer(self.observe())
            except Exception as error:  # of the server, the network or the camera: the arm stops
                with self._lock:
                    self._why = str(error) or type(error).__name__
                    self._lock.wait(0.05)
                continue
            with self._lock:
                if answer.late or not answer.valid:
                    self._why = "the server's answer was late"
                    self._lock.wait(0.01)
                    continue
                # Steps that were carried out since belong to the chunk before.
                self._chunk, self._seen = answer.actions[: answer.valid], seen
                self._at = self._moved - moved


def _pack(value: Any) -> Any:
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        made = {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str}
        return made | {b"shape": value.shape}
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"an observation holds a {type(value).__name__}; send numbers, text and arrays")


def _unpack(message: str | bytes) -> Any:
    if isinstance(message, str):
        raise ServerError(message)
    return msgpack.unpackb(message, object_hook=_array)


def _array(found: dict[Any, Any]) -> Any:
    if b"__ndarray__" not in found:
        return found
    dtype = np.dtype(found[b"dtype"])
    if dtype.kind not in "biuf":
        raise ServerError(f"the server sent an array of {dtype}")
    return np.frombuffer(found[b"data"], dtype).reshape(found[b"shape"])
