"""openpi's websocket protocol, with the resets of RoboArena and the path of vLLM-Omni.

The server speaks first (metadata), then answers each binary message with one. An error is a text
frame and the end of the connection, as openpi's client expects; on vLLM-Omni's path it is a message
`{"type": "error", "message"}`, and the connection goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import numpy as np
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from vla_pruner._short import cut, short
from vla_pruner.doors.door import Listen, deadline_of, flag_of, page, told
from vla_pruner.doors.keys import Keys, Robot
from vla_pruner.doors.visit import RULE, Visit, sentence
from vla_pruner.doors.wire import pack, unpack
from vla_pruner.serving.engine import Busy, Engine, Refused, Reply
from vla_pruner.serving.limits import CONNECTIONS
from vla_pruner.serving.listen import GOING_AWAY, Guard, received, shown_by

logger = logging.getLogger(__name__)

OMNI = "/v1/realtime/robot/openpi"
INTERNAL_ERROR, TRY_LATER = 1011, 1013
LONGEST_ERROR = 2000


@dataclass
class OpenpiDoor:
    """Listens for openpi's clients.

    Args:
        engine: who answers.
        listen: where.
        robot: what the policy takes.
        keys: where messages have it.
        metadata: said to every client besides what the server says itself.
    """

    engine: Engine
    listen: Listen
    robot: Robot
    keys: Keys
    metadata: Mapping[str, Any] = field(default_factory=dict)
    name: str = "openpi"

    def __post_init__(self) -> None:
        self.robot.check(len(self.keys.cameras), "--keys", self.keys.state)
        self._here = 0

    def greeting(self) -> dict[str, Any]:
        """What a client is told first."""
        wrist = sum("wrist" in name for name in self.keys.cameras[: self.robot.cameras])
        return {
            "server": "vla-pruner",
            "reset": RULE,
            "image_resolution": None,
            "n_external_cameras": self.robot.cameras - wrist,
            "needs_wrist_camera": wrist > 0,
            "needs_stereo_camera": False,
            "needs_session_id": False,
            "action_space": "as the policy was trained",
            "cameras": list(self.keys.cameras[: self.robot.cameras]),
            "state": list(self.keys.state) if self.robot.state_dim is not None else [],
            "prompt": self.keys.prompt,
            **self.metadata,
        }

    async def serve(self, ready: Callable[[str], None]) -> None:
        """Listen until cancelled, see `door.Door`."""
        tls, guard = self.listen.tls(), Guard(self.listen.clients)
        async with serve(
            self._talk,
            self.listen.host,
            self.listen.port,
            process_request=self._enter,
            compression=None,
            max_size=self.listen.bounds.message,
            max_queue=1,
            ping_interval=20,
            ping_timeout=20,
            close_timeout=5,
            ssl=tls,
            server_header=None,
            logger=CONNECTIONS,
            create_connection=guard,  # type: ignore[arg-type]
        ) as server:
            port = next(iter(server.sockets)).getsockname()[1]
            ready(f"{'ws' if tls is None else 'wss'}://{self.listen.host}:{port}")
            try:
                await asyncio.Future()
            finally:
                await guard.shut(server)

    async def _enter(self, connection: ServerConnection, request: Request) -> Response | None:
        """Answers pages, and turns away who may not come in."""
        path = request.path.partition("?")[0]
        shown = page(self.engine, path)
        if shown is not None and path != "/metrics":
            return connection.respond(HTTPStatus(shown[0]), shown[1])
        if not self.listen.admits_header(shown_by(request)):
            return connection.respond(HTTPStatus.UNAUTHORIZED, "no token, or another one\n")
        if shown is not None:
            return connection.respond(HTTPStatus(shown[0]), shown[1])
        if "Origin" in request.headers:
            return connection.respond(HTTPStatus.FORBIDDEN, "web pages are not served\n")
        if self._here >= self.listen.clients:
            return connection.respond(HTTPStatus.SERVICE_UNAVAILABLE, "too many connections\n")
        return None

    async def _talk(self, socket: ServerConnection) -> None:
        client = short(socket.remote_address)
        omni = socket.request is not None and socket.request.path.partition("?")[0] == OMNI
        visit = Visit(self.engine, client)
        self._here += 1
        try:
            await socket.send(pack(self.greeting()))
            previous: float | None = None
            while True:
                async with asyncio.timeout(self.listen.idle_s):
                    message = await received(socket)
                started = time.monotonic()
                try:
                    answer = await self._answer(message, visit, omni, previous)
                except ConnectionClosed:
                    raise
                except Exception as error:
                    said = cut(sentence(error, self.name, client), LONGEST_ERROR)
                    if not omni:
                        await socket.send(said)
                        code = TRY_LATER if isinstance(error, Busy) else INTERNAL_ERROR
                        await socket.close(code, cut(said, 100).encode("ascii", "replace").decode())
                        return
                    answer = pack({"type": "error", "message": said})
                await socket.send(answer)
                previous = (time.monotonic() - started) * 1000
        except TimeoutError:
            await socket.close(GOING_AWAY, f"silent for {self.listen.idle_s:g} s")
        except ConnectionClosed:
            pass
        finally:
            self._here -= 1
            with contextlib.suppress(asyncio.CancelledError):
                await visit.close()

    async def _answer(
        self, message: str | bytes, visit: Visit, omni: bool, previous: float | None
    ) -> str | bytes:
        if isinstance(message, str):
            raise Refused("a text frame came; observations are binary msgpack messages")
        found = unpack(message, self.listen.bounds)
        if not isinstance(found, Mapping):
            raise Refused(f"a message is a map of names; got {type(found).__name__}")
        endpoint = found.get("endpoint", "infer")
        if endpoint == "reset":
            await visit.reset()
            return pack({"status": "reset successful"}) if omni else "reset successful"
        if endpoint != "infer":
            raise Refused(f"endpoint is {short(endpoint)}; there are infer and reset")
        anew = flag_of(found, "reset")
        started = time.monotonic()
        reply = await visit.act(
            self.robot.observation(found, self.keys),
            session=found.get("session_id"),
            reset=anew,
            deadline_s=deadline_of(found),
        )
        actions = self.robot.actions(reply.actions, self.keys.gripper)
        if omni:
            return pack(actions)
        return pack(self._reply(reply, actions, (time.monotonic() - started) * 1000, previous))

    def _reply(
        self, reply: Reply, actions: np.ndarray, took_ms: float, previous: float | None
    ) -> dict[str, Any]:
        timing = {"infer_ms": took_ms}
        if previous is not None:
            timing["prev_total_ms"] = previous
        return {
            "actions": actions,
            "policy_timing": {"infer_ms": reply.infer_ms},
            "server_timing": timing,
            "vla_pruner": told(reply),
        }
