"""A robot's side of openpi's protocol: questions with a deadline, chunks that end in a safe stop.

`Client` asks, one question at a time, and connects again when the connection is lost. `Executor`
asks in a thread and has an action for every tick: of the newest chunk while it holds, or a stop's.
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
        deadline_s: the server is asked to answer within this, if need be late; None: it is not.
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
        self.connections, self._anew = 0, False
        self._said: str | bytes | None = None
        self._width: int | None = None
        shown = {} if token is None else {"Authorization": f"Api-Key {token}"}
        self._fixed = {"compression": None, "ping_interval": None, "close_timeout": 0.2}
        self._fixed |= {"additional_headers": shown, "ssl": ssl}
        self._socket: ClientConnection | None = None
        self._open = contextlib.ExitStack()

    def infer(self, observation: Mapping[str, Any], *, deadline_s: float | None = None) -> Answer:
        """The server's actions for an observation.

        Raises:
            Lost: no answer within `timeout_s`, or within the deadline and a little.
            ServerError: the server refused, failed, makes no sense, or is another than before.
        """
        deadline = self.deadline_s if deadline_s is None else deadline_s
        left = self.timeout_s if deadline is None else min(deadline + GRACE_S, self.timeout_s)
        if not 0 < left < float("inf"):
            raise ValueError(f"timeout {self.timeout_s} s, deadline {deadline} s: seconds above 0")
        until, pause = time.monotonic() + left, 0.02
        while True:
            try:
                return self._ask(observation, deadline, until)
            except (OSError, EOFError, websockets.exceptions.WebSocketException) as error:
                self.close()
                status = getattr(getattr(error, "response", None), "status_code", None)
                if status is not None and 400 <= status < 500:
                    raise ServerError(f"{self.url} answers {status}: see the token") from error
                if time.monotonic() + pause >= until:
                    raise Lost(f"no answer of {self.url} in {left:.3g} s: {error}") from error
                time.sleep(pause)
                pause = min(2 * pause, 1.0)

    def reset(self) -> None:
        """The next observation begins an episode."""
        self._anew = True

    def close(self, *_: object) -> None:
        """Hang up; the next question connects again."""
        self._socket = None
        with contextlib.suppress(Exception):  # the connection is not used again
            self._open.close()

    __exit__ = close

    def _connected(self, until: float) -> ClientConnection:
        if self._socket is None:
            left = max(until - time.monotonic(), 0.001)
            opening = connect(self.url, open_timeout=left, **self._fixed)
            self._socket = self._open.enter_context(opening)
            said = self._socket.recv(max(until - time.monotonic(), 0.001))
            if said != self._said and self._said is not None:
                said = "another server than before answers; if it is right, make a new client"
            self.metadata, self._said, self._anew = self._read(said, dict), said, False
            self.connections += 1
        return self._socket

    def _ask(self, observation: Mapping[str, Any], deadline: float | None, until: float) -> Answer:
        socket, message = self._connected(until), dict(observation)
        if self._anew:
            message["reset"] = True
        if deadline is not None and self.metadata.get("server") == "vla-pruner":
            message["deadline_ms"] = max(1000 * deadline, 1.0)
        packed = msgpack.packb(message, default=_pack)
        with contextlib.suppress(TimeoutError):  # it would pass for the answer to this question
            self._read(f"it said what nobody asked: {socket.recv(0)!r}", dict)
        socket.send(packed)
        self._anew = False
        answer: Answer = self._read(socket.recv(max(until - time.monotonic(), 0.001)), self._answer)
        return answer

    def _answer(self, found: dict[str, Any]) -> Answer:
        actions = np.asarray(found.pop("actions"), dtype=np.float32)
        about = found | found.pop("vla_pruner", {})
        valid, late = about.get("valid", len(actions)), about.get("late", False)
        rows, width = actions.shape
        if width != (self._width or width) or not np.isfinite(actions).all():
            raise ServerError(f"actions of {width} numbers, once {self._width}; or not finite")
        if type(valid) is not int or not 0 <= valid <= rows or type(late) is not bool:
            raise ServerError(f"{rows} steps, {valid=!r:.50} and {late=!r:.50}")
        self._width = width
        return Answer(actions, late, valid, about)

    def _read(self, message: str | bytes, make: Callable[[dict[str, Any]], Any]) -> Any:
        """What is made of a map that the server sent. Errors: ServerError, after hanging up."""
        try:
            if isinstance(message, str):
                raise ServerError(message)
            return make(msgpack.unpackb(message, object_hook=_array))
        except Exception as error:  # whatever foreign bytes bring about
            self.close()
            said = error if isinstance(error, ServerError) else repr(error)
            raise ServerError(f"{self.url}: {said!s:.300}") from error


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
    """An action for every tick of one episode. Its stop is not a certified safety function.

    Args:
        client: who is asked.
        observe: gives what the robot sees now; called in this executor's thread.
        stop: "hold" repeats the last action (positions); "zero" sends zeros (velocities, deltas).
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
        if stop not in ("hold", "zero") or ask_at < 0 or not max_age_s > 0:
            raise ValueError(f"stop={stop!r} (hold, zero), {ask_at=} (>= 0), {max_age_s=} (> 0)")
        self.client, self.observe, self.stop, self.kept = client, observe, stop, kept
        self.ask_at, self.max_age_s = ask_at, max_age_s
        self._lock = threading.Condition()
        self._chunk: np.ndarray | None = None
        self._last: np.ndarray | None = None
        self._at, self._moved, self._seen, self._since = 0, 0, 0.0, _now()
        self._why, self._ending = "no chunk has come yet", False
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
            self._lock.notify_all()  # it may be time to ask
            now = _now()
            chunk, age = self._chunk, now - self._seen
            if chunk is not None and age > self.max_age_s:
                self._why = f"the actions are {age:.3g} s old"
                chunk = self._chunk = None
            if chunk is None or self._at >= len(chunk):
                return Command(self._stopped(), True, now - self._since, self._why)
            action = chunk[self._at].copy()
            self._at, self._moved = self._at + 1, self._moved + 1
            self._last, self._since = action, now
            return Command(action, False, age)

    def _stopped(self) -> np.ndarray | None:
        action = None if self._last is None else self._last.copy()
        if action is not None and self.stop == "zero":
            action[np.delete(np.arange(len(action)), self.kept)] = 0
        return action

    def _needed(self) -> bool:
        return self._ending or self._chunk is None or len(self._chunk) - self._at <= self.ask_at

    def _ask(self) -> None:
        while True:
            with self._lock:
                self._lock.wait_for(self._needed)
                if self._ending:
                    return
                seen, moved = _now(), self._moved
            try:
                answer = self.client.infer(self.observe())
                _ = answer.actions[:, list(self.kept)]  # an IndexError now rather than in a stop
                if answer.late or not answer.valid:
                    raise Lost("the server's answer was late")
            except Exception as error:  # of the server, the network or the camera: the arm stops
                with self._lock:
                    self._why = str(error) or type(error).__name__
                    self._lock.wait(0.02)
                continue
            with self._lock:
                # Steps that were carried out since belong to the chunk before.
                self._chunk, self._seen = answer.actions[: answer.valid], seen
                self._at = self._moved - moved


def _now() -> float:  # it goes on while the computer sleeps, where there is such a clock
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if clock is None else time.clock_gettime(clock)


def _pack(value: Any) -> Any:
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        made = {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str}
        return made | {b"shape": value.shape}
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"an observation holds a {type(value).__name__}; send numbers, text and arrays")


def _array(found: dict[Any, Any]) -> Any:
    if b"__ndarray__" not in found:
        return found
    dtype = np.dtype(found[b"dtype"])
    if dtype.kind not in "biuf":
        raise ServerError(f"the server sent an array of {dtype}")
    return np.frombuffer(found[b"data"], dtype).reshape(found[b"shape"])
