"""lerobot's asynchronous inference: its RobotClient over gRPC, asked for nothing but actions.

The client's pickles are read as data (`unpickle`). It names a policy and a device to load; this
server has its policy already and says in its log what was asked for. A client is a connection: its
`Ready` begins an episode.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import grpc
import grpc.aio
import numpy as np

from vla_pruner._short import short
from vla_pruner.doors.door import Listen, flag_of
from vla_pruner.doors.keys import Robot, check_names, numbers, picture
from vla_pruner.doors.unpickle import (
    RemotePolicyConfig,
    TimedObservation,
    fields,
    pickled_actions,
    unpickle,
)
from vla_pruner.doors.visit import Visit, Visits, may_log, sentence
from vla_pruner.serving.engine import Busy, Engine, Hung, Refused

logger = logging.getLogger(__name__)
T = TypeVar("T")

SERVICE = "transport.AsyncInference"
STATE, IMAGES = "observation.state", "observation.images."
LARGEST = 4 << 20
STREAM_S = 30.0
"""How long the parts of an observation, or the message of another call, may take to come."""
CALLS = 16
"""Calls of one client at once."""
WAIT_S = 2.0
"""How long `GetActions` waits for an observation before it answers that there is none."""
BEGIN, MIDDLE, END = 1, 2, 3
NEAR = 1.0
"""Joints that moved less than this since the last prediction are not looked at again."""


@dataclass
class _Client:
    """What one robot said."""

    visit: Visit
    names: tuple[str, ...] = ()
    cameras: tuple[str, ...] = ()
    per_chunk: int = 0
    predicted: set[int] = field(default_factory=set)
    last: np.ndarray | None = None
    newest: asyncio.Queue[dict[str, Any]] = field(default_factory=lambda: asyncio.Queue(1))


def check_listen(token: str | None, cert: Path | None) -> None:
    """Refuse what lerobot's client cannot do. Errors: ValueError."""
    if token is not None:
        raise ValueError(
            "lerobot's client cannot show a token: listen on 127.0.0.1 without one, and lay a "
            "tunnel (ssh -L 8080:127.0.0.1:8080 HOST)"
        )
    if cert is not None:
        raise ValueError("lerobot's client speaks no TLS: leave --tls-cert out")


@dataclass
class LerobotDoor:
    """Listens for lerobot's robot clients, see `door.Door`.

    Args:
        engine, listen, robot: as for the other doors.
        cameras: the robot's cameras in the order in which the policy takes them; empty: the
            robot's own order, if it has as many as the policy takes.
        fps: ticks of the robot in a second, for the times of actions.
    """

    engine: Engine
    listen: Listen
    robot: Robot
    cameras: tuple[str, ...] = ()
    fps: float = 30.0
    name: str = "lerobot"

    def __post_init__(self) -> None:
        check_listen(self.listen.token, self.listen.cert)
        if self.cameras and len(self.cameras) != self.robot.cameras:
            raise ValueError(
                f"this policy takes {self.robot.cameras} images; --cameras names "
                f"{len(self.cameras)}: {', '.join(self.cameras)}"
            )
        check_names("--cameras", self.cameras)
        if not 0 < self.fps <= 1000:
            raise ValueError(f"fps={self.fps}: expected ticks in a second, up to 1000")
        self.visits = Visits(self.engine, self.listen.idle_s, self.listen.clients)
        self._clients: dict[str, _Client] = {}

    async def serve(self, ready: Callable[[str], None]) -> None:
        """Listen until cancelled, see `door.Door`."""
        server = grpc.aio.server(
            maximum_concurrent_rpcs=CALLS * self.listen.clients,
            options=[
                ("grpc.max_receive_message_length", LARGEST),
                ("grpc.max_send_message_length", LARGEST),
                ("grpc.so_reuseport", 0),
                ("grpc.max_concurrent_streams", CALLS),
                ("grpc.max_connection_idle_ms", int(1000 * self.listen.idle_s)),
                ("grpc.keepalive_time_ms", 20_000),  # robots whose cable was pulled
                ("grpc.keepalive_timeout_ms", 20_000),
            ],
        )
        calls = {
            "Ready": self._handler(self._ready),
            "SendPolicyInstructions": self._handler(self._instructions),
            "GetActions": self._handler(self._actions),
            "SendObservations": self._handler(self._observation, stream=True),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, calls),))
        try:
            port = server.add_insecure_port(f"{self.listen.host}:{self.listen.port}")
        except RuntimeError as error:
            raise OSError(f"cannot listen on {self.listen.host}:{self.listen.port}") from error
        await server.start()
        ready(f"{self.listen.host}:{port} (gRPC, no TLS)")
        try:
            await asyncio.Future()
        finally:
            await server.stop(grace=1.0)
            await self.visits.close()

    def _handler(self, call: Callable[[Any, str], Any], stream: bool = False) -> Any:
        """A call whose errors are one sentence for its own client.

        gRPC waits for ever for the one message of a call, so that all are read as streams.
        """

        async def run(parts: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> bytes:
            peer = context.peer()
            try:
                made: bytes = await call(parts if stream else await _first(parts), peer)
                return made
            except Exception as error:
                code = grpc.StatusCode.INTERNAL
                if isinstance(error, Refused):
                    code = grpc.StatusCode.INVALID_ARGUMENT
                elif isinstance(error, Busy | Hung):
                    code = grpc.StatusCode.RESOURCE_EXHAUSTED
                said = sentence(error, self.name, peer)
                if isinstance(error, Refused) and may_log():
                    logger.warning("%s: %s", peer, short(said, 300))
                await context.abort(code, said)
                raise

        return grpc.stream_unary_rpc_method_handler(run)

    # -- calls -----------------------------------------------------------------------------------
    async def _ready(self, _: bytes, peer: str) -> bytes:
        visit = await self.visits.of(peer)
        await visit.reset()
        for gone in [name for name, client in self._clients.items() if client.visit.closed]:
            del self._clients[gone]
        self._clients[peer] = _Client(visit)
        return b""

    async def _instructions(self, request: bytes, peer: str) -> bytes:
        client = await self._client(peer)
        found = unpickle(_data(request, 1), self.listen.bounds)
        if not isinstance(found, RemotePolicyConfig):
            raise Refused("SendPolicyInstructions takes a RemotePolicyConfig")
        told = fields(found)
        features = told.get("lerobot_features")
        if not isinstance(features, Mapping):
            raise Refused("lerobot_features must say what the robot has")
        renamed = told.get("rename_map")
        if renamed is not None and (type(renamed) is not dict or renamed):
            raise Refused("rename_map is not known here; name the cameras with --cameras")
        client.names = _names(features)
        client.cameras = self._order(features)
        per_chunk = told.get("actions_per_chunk")
        if type(per_chunk) is not int or per_chunk < 1:
            raise Refused(f"actions_per_chunk is {short(per_chunk)}; expected at least 1")
        client.per_chunk = per_chunk
        if may_log():
            self._note(peer, told, client)
        return b""

    def _note(self, peer: str, told: Mapping[str, Any], client: _Client) -> None:
        logger.info(
            "%s asks for %s %s; it gets the policy that is served; images: %s; state: %s",
            peer,
            short(told.get("policy_type"), 40),
            short(told.get("pretrained_name_or_path"), 80),
            short(client.cameras, 200),
            short(client.names, 200),
        )

    async def _observation(self, parts: AsyncIterator[bytes], peer: str) -> bytes:
        client = await self._client(peer, told=True)
        message = await _in_time(self._whole(parts))
        read = unpickle(message, self.listen.bounds)
        if not isinstance(read, TimedObservation):
            raise Refused("SendObservations takes a TimedObservation")
        told = fields(read)
        step, when = told.get("timestep"), told.get("timestamp")
        if type(step) is not int or abs(step) > 1 << 62:
            raise Refused(f"the timestep is {short(step)}; expected a whole number")
        if not isinstance(when, float) or not math.isfinite(when):
            raise Refused(f"the timestamp is {short(when)}; expected seconds")
        must_go = flag_of(told, "must_go")
        seen = self._seen(told.get("observation"), client)
        state = seen["state"]
        if not must_go and client.last is not None:
            moved = float(np.linalg.norm(state - client.last))
            if step in client.predicted or moved < NEAR:
                return b""
        if client.newest.full():
            client.newest.get_nowait()
        client.newest.put_nowait({"step": step, "time": when, **seen})
        return b""

    async def _whole(self, parts: AsyncIterator[bytes]) -> bytes:
        """The data of a stream of parts. Errors: Refused."""
        message = bytearray()
        async for part in parts:
            found = _proto(part)
            if found.get(1) not in (BEGIN, MIDDLE, END):
                raise Refused(f"transfer_state is {short(found.get(1))}; expected 1, 2 or 3")
            if found[1] == BEGIN:
                message.clear()
            message += _payload(found, 2)
            self.listen.bounds.check(len(message))
            if found[1] == END:
                break
        return bytes(message)

    async def _actions(self, _: bytes, peer: str) -> bytes:
        client = await self._client(peer, told=True)
        try:
            async with asyncio.timeout(WAIT_S):
                seen = await client.newest.get()
        except TimeoutError:
            return b""
        reply = await client.visit.act(seen["observation"])
        client.last = seen["state"]
        client.predicted.add(seen["step"])
        if len(client.predicted) > 10_000:
            client.predicted = {seen["step"]}
        return _field(1 << 3 | 2, self._chunk(reply.actions[: client.per_chunk], seen))

    def _chunk(self, actions: np.ndarray, seen: Mapping[str, Any]) -> bytes:
        import torch

        chunk = torch.from_numpy(np.array(self.robot.actions(actions, None)))
        return pickled_actions(
            [
                {
                    "timestamp": seen["time"] + number / self.fps,
                    "timestep": seen["step"] + number,
                    "action": action.clone(),
                }
                for number, action in enumerate(chunk)
            ]
        )

    # -- what a robot has ------------------------------------------------------------------------
    async def _client(self, peer: str, told: bool = False) -> _Client:
        client = self._clients.get(peer)
        if client is None or client.visit.closed:
            raise Refused("call Ready first, then SendPolicyInstructions")
        if told and not client.per_chunk:
            raise Refused("call SendPolicyInstructions first")
        client.visit.seen = time.monotonic()
        return client

    def _order(self, features: Mapping[str, Any]) -> tuple[str, ...]:
        """The robot's cameras as the policy takes them. Errors: Refused."""
        has = [name.removeprefix(IMAGES) for name in features if name.startswith(IMAGES)]
        wanted = list(self.cameras) or has
        missing = [name for name in wanted if name not in has]
        if missing or len(wanted) != self.robot.cameras:
            raise Refused(
                f"this policy takes {self.robot.cameras} images"
                + (f" ({', '.join(self.cameras)})" if self.cameras else "")
                + f"; the robot has {', '.join(has) or 'no cameras'}. The server's option "
                "--cameras says which, in the policy's order"
            )
        return tuple(wanted)

    def _seen(self, raw: Any, client: _Client) -> dict[str, Any]:
        """The policy's observation and the joints, from what a robot reads. Errors: Refused."""
        if not isinstance(raw, Mapping):
            raise Refused("the observation of a TimedObservation is a dict")
        missing = [name for name in (*client.names, *client.cameras) if name not in raw]
        if missing:
            raise Refused(f"the observation has no {', '.join(missing)}")
        joints = [numbers(raw[name], name) for name in client.names]
        state = np.concatenate(joints) if joints else np.zeros(0)
        task = raw.get("task")
        if not isinstance(task, str) or not task.strip():
            raise Refused(f"`task` must be a sentence; got {short(task)}")
        made: dict[str, Any] = {
            "images": [picture(raw[name], name) for name in client.cameras],
            "instruction": task,
        }
        if self.robot.state_dim is not None:
            made["proprio"] = self.robot.state(state, STATE)
        return {"observation": made, "state": state}


async def _first(parts: AsyncIterator[bytes]) -> bytes:
    """The message of a call. Errors: Refused."""
    found = await _in_time(anext(parts, None))
    if found is None:
        raise Refused("the call has no message")
    return found


async def _in_time(awaited: Awaitable[T]) -> T:
    """What a client sends. Errors: Refused, it did not come."""
    try:
        async with asyncio.timeout(STREAM_S):
            return await awaited
    except TimeoutError:
        raise Refused(f"a message did not come within {STREAM_S:g} s") from None


def _names(features: Mapping[str, Any]) -> tuple[str, ...]:
    """The joints of a robot in the order of its state. Errors: Refused."""
    found = features.get(STATE)
    names = found.get("names") if isinstance(found, Mapping) else ()
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise Refused(f"{STATE} has the names {short(names)}")
    return tuple(names)


# -- protocol buffers of two fields ----------------------------------------------------------------
def _proto(message: bytes) -> dict[int, int | bytes]:
    """Fields of a message by number: numbers and bytes. Errors: Refused."""
    found: dict[int, int | bytes] = {}
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        size, at = _varint(message, at)
        if tag & 7 == 0:
            found[tag >> 3] = size
        elif tag & 7 == 2 and size <= len(message) - at:
            found[tag >> 3] = message[at : at + size]
            at += size
        else:
            raise Refused("the message is no protocol buffer of lerobot's transport")
    return found


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 63, 7):
        if at >= len(message):
            break
        value |= (message[at] & 127) << shift
        at += 1
        if message[at - 1] < 128:
            return value, at
    raise Refused("the message is no protocol buffer of lerobot's transport")


def _payload(found: Mapping[int, int | bytes], number: int) -> bytes:
    data = found.get(number, b"")
    if not isinstance(data, bytes):
        raise Refused("the data of a message are a number")
    return data


def _data(message: bytes, number: int) -> bytes:
    return _payload(_proto(message), number)


def _field(tag: int, data: bytes) -> bytes:
    """A field of bytes."""
    size, length = len(data), bytearray()
    while size > 127:
        length.append(size & 127 | 128)
        size >>= 7
    return bytes([tag]) + bytes([*length, size]) + data
