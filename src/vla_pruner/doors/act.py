"""OpenVLA's `POST /act`, and that of OpenVLA-OFT's deploy script, over HTTP/1.1.

OpenVLA sends `{"image", "instruction", "unnorm_key"?}` and gets the action array; OFT sends
`{"full_image", "...wrist...", "state", "instruction"}` and gets a list of actions. Either may come
as `{"encoded": "<the same as a text>"}`, and is then answered with a text. What is not understood
is answered with a status of 4xx and `{"error": sentence}`: the originals answer 200 and "error".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vla_pruner._short import short
from vla_pruner.doors.door import Listen, carried_out, deadline_of, flag_of, page, told
from vla_pruner.doors.http import Request, Response, serve_http
from vla_pruner.doors.keys import Robot, find, numbers, picture
from vla_pruner.doors.visit import Visits, sentence
from vla_pruner.doors.wire import TooLarge, from_json, to_json
from vla_pruner.serving.engine import Busy, Engine, Hung, Refused, Reply

JSON = {"content-type": "application/json"}
TEXT = {"content-type": "text/plain; charset=utf-8"}


@dataclass
class ActDoor:
    """Listens for requests, see `door.Door`. HTTP knows no episodes, see `_client`."""

    engine: Engine
    listen: Listen
    robot: Robot
    name: str = "act"
    visits: Visits = field(init=False)
    _one: bool = field(default=False, init=False)
    """Whether the policy gives one action at a time; a late reply may be one of many."""

    def __post_init__(self) -> None:
        self.visits = Visits(self.engine, self.listen.idle_s, self.listen.clients)

    async def serve(self, ready: Callable[[str], None]) -> None:
        """Listen until cancelled, see `door.Door`."""
        scheme = "http" if self.listen.cert is None else "https"
        try:
            await serve_http(
                self.answer,
                self.listen,
                lambda port: ready(f"{scheme}://{self.listen.host}:{port}/act"),
            )
        finally:
            await self.visits.close()

    async def answer(self, request: Request) -> Response:
        """The response to a request; never raises but when it is cancelled."""
        try:
            return await self._answer(request)
        except (Refused, Busy, Hung, TimeoutError) as error:
            return _said(_status(error), str(error) or "the request took too long to come")
        except Exception as error:
            return _said(500, sentence(error, self.name, request.client))

    async def _answer(self, request: Request) -> Response:
        path, headers = request.path, request.headers
        shown = page(self.engine, path) if request.method == "GET" else None
        if shown is not None and path != "/metrics":
            return Response(shown[0], shown[1].encode(), TEXT)
        if not self.listen.admits_header(headers.get("authorization")):
            return _said(401, "no token, or another one")
        if shown is not None:
            return Response(shown[0], shown[1].encode(), TEXT)
        if path not in ("/act", "/reset"):
            return _said(404, "there are POST /act, POST /reset and GET /health")
        if request.method != "POST":
            return _said(405, f"{path} takes POST")
        if "origin" in headers:
            return _said(403, "web pages are not served")
        if not headers.get("content-type", "").lower().startswith("application/json"):
            return _said(415, "send JSON, with content-type: application/json")
        body = await request.read()
        message = from_json(body, self.listen.bounds) if body or path == "/act" else {}
        encoded = isinstance(message, Mapping) and "encoded" in message
        if encoded:
            if not isinstance(message["encoded"], str) or len(message) != 1:
                raise Refused("`encoded` must be a text, and the only entry")
            message = from_json(message["encoded"], self.listen.bounds)
        if not isinstance(message, Mapping):
            raise Refused(f"the body is a map of names; got {type(message).__name__}")
        client = _client(message, request.client)
        if path == "/reset":
            await self.visits.reset(client)
            return Response(200, to_json({"status": "ok"}), JSON)
        seen, anew = self._observation(message), flag_of(message, "reset")
        deadline = deadline_of(message)
        visit = await self.visits.of(client)  # last, so that bad requests take nobody's place
        reply = carried_out(await visit.act(seen, reset=anew, deadline_s=deadline))
        made = to_json(self._actions(reply, "full_image" in message))
        return Response(200, to_json(made.decode()) if encoded else made, JSON | _headers(reply))

    def _observation(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """What the policy reads, in either form. Errors: Refused."""
        first = "full_image" if "full_image" in message else "image"
        wrists = [name for name in message if "wrist" in name]
        names = [first, *wrists][: self.robot.cameras]
        if len(names) < self.robot.cameras:
            raise Refused(
                f"this policy takes {self.robot.cameras} images; the request has {short(names)} "
                "(wrist cameras are the entries with `wrist` in their name, in their order)"
            )
        made: dict[str, Any] = {
            "images": [picture(find(message, name), name) for name in names],
            "instruction": find(message, "instruction"),
        }
        if not isinstance(made["instruction"], str) or not made["instruction"].strip():
            raise Refused(f"'instruction' must be a sentence; got {short(made['instruction'])}")
        if self.robot.state_dim is not None:
            made["proprio"] = self.robot.state(numbers(find(message, "state"), "state"), "state")
        key = message.get("unnorm_key")
        if key is not None:
            if not isinstance(key, str):
                raise Refused(f"unnorm_key is {short(key)}; expected a name")
            made["unnorm_key"] = key
        return made

    def _actions(self, reply: Reply, as_list: bool) -> np.ndarray | list[np.ndarray]:
        actions = self.robot.actions(reply.actions, None)
        if not reply.late:
            self._one = len(actions) == 1
        if as_list:
            return list(actions)
        return actions[0] if self._one else actions


def _client(message: Mapping[str, Any], address: str) -> tuple[str, Any]:
    """Whose episode a request belongs to: that of its `session_id`, else that of its address."""
    session = message.get("session_id")
    if session is not None and not (isinstance(session, str | int) and len(str(session)) <= 200):
        raise Refused(f"session_id is {short(session)}; expected a text of up to 200 characters")
    return address, session


def _headers(reply: Reply) -> dict[str, str]:
    """What the reply says besides its actions, `x-vla-pruner-late: false` and so on."""
    return {
        f"x-vla-pruner-{name.replace('_', '-')}": str(value).lower()
        for name, value in told(reply).items()
    }


def _status(error: Exception) -> int:
    if isinstance(error, Refused):
        return 413 if isinstance(error, TooLarge) else 422
    return 503 if isinstance(error, Busy | Hung) else 408


def _said(status: int, error: str) -> Response:
    return Response(status, to_json({"error": error}), JSON)
