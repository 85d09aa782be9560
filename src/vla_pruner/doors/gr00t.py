"""GR00T's protocol over ZeroMQ: a msgpack map with an endpoint, answered by one message.

Each connection of a client is an episode's worth of history, as its `reset` says; `get_action`
takes one observation of one time step, with the batch and time axes that GR00T's messages have.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import zmq
import zmq.asyncio

from vla_pruner._short import short
from vla_pruner._yaml import read_yaml
from vla_pruner.doors.door import Listen, carried_out, told
from vla_pruner.doors.keys import Robot, check_names, numbers, picture
from vla_pruner.doors.visit import Visits, sentence
from vla_pruner.doors.wire import pack, unpack
from vla_pruner.episodes.control import Gripper
from vla_pruner.serving.engine import Engine, Refused

MODALITY = "__ModalityConfig_class__"


@dataclass(frozen=True)
class Modalities:
    """Names in GR00T's messages.

    Args:
        video: cameras, in the order in which a policy takes them.
        state: parts of the robot's state, laid one behind the other.
        action: parts of an action and how many numbers each has.
        language: the instruction.
        gripper: how the robot reads the last number of an action; None: as the policy writes it.
    """

    video: tuple[str, ...] = ("image", "wrist_image")
    state: tuple[str, ...] = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
    action: tuple[tuple[str, int], ...] = (
        ("x", 1), ("y", 1), ("z", 1), ("roll", 1), ("pitch", 1), ("yaw", 1), ("gripper", 1),
    )  # fmt: skip
    language: str = "task"
    gripper: Gripper | None = None


def modalities_of(file: Path) -> Modalities:
    """The names in a YAML file; `action` maps names to how many numbers each has.

    Raises:
        ValueError: no such file, or one that does not fit.
    """
    found = read_yaml(file)
    lists, sizes = ("video", "state"), found.get("action") if isinstance(found, Mapping) else None
    fits = (
        isinstance(found, Mapping)
        and set(found) <= {field.name for field in fields(Modalities)}
        and all(isinstance(found.get(name), list) for name in lists)
        and all(isinstance(name, str) for key in lists for name in found[key])
        and isinstance(sizes, Mapping)
        and all(isinstance(n, str) and type(size) is int and size > 0 for n, size in sizes.items())
        and isinstance(found.get("language", ""), str)
        and found.get("gripper") in (None, "robosuite", "rlds")
    )
    if not fits:
        raise ValueError(
            f"{file} must say `video` and `state` (lists of names) and `action` (names and sizes), "
            f"and may say `language` and `gripper`; it says {short(found)}"
        )
    for name in lists:
        check_names(f"{file}: `{name}`", found[name])
    more = {name: found[name] for name in ("language", "gripper") if name in found}
    return Modalities(
        tuple(found["video"]), tuple(found["state"]), tuple(found["action"].items()), **more
    )


def check_listen(cert: Path | None) -> None:
    """Refuse what this protocol cannot do. Errors: ValueError."""
    if cert is not None:
        raise ValueError(
            "gr00t speaks ZeroMQ, which has no TLS: leave --tls-cert out and lay a tunnel "
            "(ssh -L 5555:127.0.0.1:5555 HOST)"
        )


@dataclass
class Gr00tDoor:
    """Listens for GR00T's clients, see `door.Door`."""

    engine: Engine
    listen: Listen
    robot: Robot
    modalities: Modalities = Modalities()
    name: str = "gr00t"
    visits: Visits = field(init=False)

    def __post_init__(self) -> None:
        self.robot.check(len(self.modalities.video), "the door gr00t", self.modalities.state)
        width = sum(width for _, width in self.modalities.action)
        if self.robot.action_dim not in (None, width):
            raise ValueError(
                f"this policy gives {self.robot.action_dim} numbers an action; the door gr00t has "
                f"names for {width}"
            )
        check_listen(self.listen.cert)
        self.visits = Visits(self.engine, self.listen.idle_s, self.listen.clients)

    async def serve(self, ready: Callable[[str], None]) -> None:
        """Listen until cancelled, see `door.Door`."""
        context = zmq.asyncio.Context()
        socket = context.socket(zmq.ROUTER)
        socket.setsockopt(zmq.MAXMSGSIZE, self.listen.bounds.message)
        socket.setsockopt(zmq.RCVHWM, 8)
        socket.setsockopt(zmq.SNDHWM, 8)
        socket.setsockopt(zmq.LINGER, 1000)
        socket.setsockopt(zmq.HANDSHAKE_IVL, 10_000)
        socket.setsockopt(zmq.HEARTBEAT_IVL, 20_000)
        running: set[asyncio.Task[None]] = set()
        try:
            try:
                port = (
                    socket.bind_to_random_port(f"tcp://{self.listen.host}")
                    if not (self.listen.port)
                    else self._bind(socket)
                )
            except zmq.ZMQError as error:
                raise OSError(error.errno, str(error)) from error
            ready(f"tcp://{self.listen.host}:{port}")
            while True:
                frames = await socket.recv_multipart()
                while len(running) >= self.listen.clients:
                    await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                task = asyncio.create_task(self._meet(socket, frames))
                running.add(task)
                task.add_done_callback(running.discard)
        finally:
            for task in list(running):
                task.cancel()
            await self.visits.close()
            socket.close()
            context.term()

    def _bind(self, socket: Any) -> int:
        socket.bind(f"tcp://{self.listen.host}:{self.listen.port}")
        return self.listen.port

    async def _meet(self, socket: Any, frames: list[bytes]) -> None:
        """Answer one message; one that is no request of ours gets no answer."""
        if len(frames) != 3 or frames[1]:
            return
        who, _, message = frames
        try:
            answer = await self.answer(who, message)
        except Exception as error:
            answer = pack({"error": sentence(error, self.name, who.hex())}, as_npy=True)
        with contextlib.suppress(zmq.ZMQError):
            await socket.send_multipart([who, b"", answer])

    async def answer(self, who: bytes, message: bytes) -> bytes:
        """The reply to a message. Errors: Refused, Busy, Hung."""
        found = unpack(message, self.listen.bounds)
        if not isinstance(found, Mapping):
            raise Refused(f"a request is a map of names; got {type(found).__name__}")
        if not self.listen.admits(found.get("api_token")):
            raise Refused("Unauthorized: no api_token, or another one")
        endpoint, data = found.get("endpoint", "get_action"), found.get("data") or {}
        if not isinstance(data, Mapping):
            raise Refused(f"`data` is a map of names; got {type(data).__name__}")
        if endpoint == "ping":
            return pack({"status": "ok", "message": "Server is running"})
        if endpoint == "get_modality_config":
            return pack(self.config())
        if endpoint == "kill":
            raise Refused("this server is not ended by its clients; send it SIGTERM")
        if endpoint not in ("get_action", "reset"):
            raise Refused(
                f"endpoint is {short(endpoint)}; there are ping, get_action, reset and "
                "get_modality_config"
            )
        if endpoint == "reset":
            await self.visits.reset(who)
            return pack({})
        seen = self.observation(data.get("observation"))
        visit = await self.visits.of(who)  # last, so that bad requests take nobody's place
        reply = carried_out(await visit.act(seen))
        actions = self.robot.actions(reply.actions, self.modalities.gripper)
        return pack([self.parts(actions), told(reply)], as_npy=True)

    def config(self) -> dict[str, Any]:
        """What `get_modality_config` answers, by modality."""
        video = list(self.modalities.video[: self.robot.cameras])
        state = list(self.modalities.state) if self.robot.state_dim is not None else []
        action = [name for name, _ in self.modalities.action]
        keys = {"video": video, "state": state, "action": action}
        keys["language"] = [self.modalities.language]
        return {
            name: {MODALITY: True, "as_json": {"delta_indices": [0], "modality_keys": names}}
            for name, names in keys.items()
        }

    def observation(self, found: Any) -> dict[str, Any]:
        """What the policy reads, from `video`, `state` and `language`. Errors: Refused."""
        video, language = _inside(found, "video"), _inside(found, "language")
        views = []
        for name in self.modalities.video[: self.robot.cameras]:
            views.append(picture(_single(video, name, "video", 5), f"video.{name}"))
        task = language.get(self.modalities.language)
        while isinstance(task, list) and len(task) == 1:
            task = task[0]
        if not isinstance(task, str) or not task.strip():
            raise Refused(f"language.{self.modalities.language} must be [[sentence]]")
        made: dict[str, Any] = {"images": views, "instruction": task}
        if self.robot.state_dim is not None:
            state = _inside(found, "state")
            parts = [
                numbers(_single(state, name, "state", 3), f"state.{name}")
                for name in self.modalities.state
            ]
            made["proprio"] = self.robot.state(np.concatenate(parts), "state")
        return made

    def parts(self, actions: np.ndarray) -> dict[str, np.ndarray]:
        """Actions `[H, D]` by name, each `[1, H, d]`."""
        widths = [width for _, width in self.modalities.action]
        ends = np.cumsum(widths)
        return {
            name: np.ascontiguousarray(actions[None, :, end - width : end])
            for (name, width), end in zip(self.modalities.action, ends, strict=True)
        }


def _inside(found: Any, name: str) -> Mapping[Any, Any]:
    inner = found.get(name) if isinstance(found, Mapping) else None
    if not isinstance(inner, Mapping):
        raise Refused(f"`observation` must hold a map {name!r}; got {short(inner)}")
    return inner


def _single(found: Mapping[Any, Any], name: str, kind: str, ndim: int) -> np.ndarray:
    """The one time step of the one row of an array `[1, 1, ...]`. Errors: Refused."""
    value = found.get(name)
    if not isinstance(value, np.ndarray):
        raise Refused(f"{kind} has no array {name!r}; it has {short(list(found))}")
    if value.ndim != ndim or value.shape[:2] != (1, 1):
        raise Refused(
            f"{kind}.{name} has shape {value.shape}; expected [1, 1, ...]: one robot, one time step"
        )
    step: np.ndarray = value[0, 0]
    return step
