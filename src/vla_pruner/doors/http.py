"""HTTP/1.1 over asyncio and h11: a few connections, each bounded in bytes and in time."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

import h11

from vla_pruner._short import short
from vla_pruner.doors.door import Listen
from vla_pruner.serving.engine import Refused

logger = logging.getLogger(__name__)

HEAD_S, BODY_S = 10.0, 30.0
"""Seconds in which the first line and headers, and the body, have to have come."""
CLOSE_S = 5.0
"""Seconds that a connection has to close."""
HEAD_BYTES = 64 << 10
PIECES, PIECE = 1024, 256
"""Chunks of a body beyond these may not be smaller than so many bytes."""


@dataclass(frozen=True)
class Request:
    """What was asked; `read` gives the body, once."""

    method: str
    path: str
    headers: Mapping[str, str]
    client: str
    read: Callable[[], Awaitable[bytes]]


@dataclass(frozen=True)
class Response:
    """What is answered."""

    status: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


Answer = Callable[[Request], Awaitable[Response]]


async def serve_http(answer: Answer, listen: Listen, ready: Callable[[int], None]) -> None:
    """Listen until cancelled; `ready` is told the port. `answer` must not raise.

    Raises:
        OSError: the address is not free.
    """
    talking: set[asyncio.Task[None]] = set()

    async def meet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        talking.add(task)
        try:
            connection = _Connection(reader, writer, answer, listen)
            if len(talking) <= listen.clients:
                await connection.talk()
            else:
                said = b'{"error": "too many connections"}'
                await connection.send(Response(503, said), last=True)
        except (OSError, TimeoutError, asyncio.IncompleteReadError):
            pass  # the client went away, or is too slow
        finally:
            talking.discard(task)
            writer.close()
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(CLOSE_S):
                    await writer.wait_closed()
            writer.transport.abort()  # what its client does not read is not kept for it

    tls = listen.tls()
    server = await asyncio.start_server(
        meet,
        listen.host,
        listen.port,
        ssl=tls,
        ssl_handshake_timeout=None if tls is None else HEAD_S,
        limit=256 << 10,
    )
    ready(server.sockets[0].getsockname()[1])
    try:
        await asyncio.Future()
    finally:
        server.close()
        for task in list(talking):
            task.cancel()
        if talking:
            await asyncio.wait(talking, timeout=CLOSE_S + 1)


class _Connection:
    """One client: a request, its response, and so on."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        answer: Answer,
        listen: Listen,
    ) -> None:
        self.reader, self.writer, self.answer, self.listen = reader, writer, answer, listen
        self.state = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_BYTES)
        self.claimed = 0
        self.client = str((writer.get_extra_info("peername") or ("unknown",))[0])

    async def talk(self) -> None:
        """Until the client goes, or is to go."""
        try:
            while await self._exchange():
                self.state.start_next_cycle()
        except h11.RemoteProtocolError as error:
            if self.state.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                said = b'{"error": "this is no HTTP/1.1"}'
                await self.send(Response(getattr(error, "error_status_hint", 400), said), True)

    async def _exchange(self) -> bool:
        """One request and its response; whether another may follow."""
        async with asyncio.timeout(HEAD_S):
            head = await self._event()
        if not isinstance(head, h11.Request):
            return False
        headers: dict[str, str] = {}
        for key, value in head.headers:  # of two of one name, neither is what it should be
            name, said = key.decode("latin-1"), value.decode("latin-1")
            headers[name] = f"{headers[name]}, {said}" if name in headers else said
        if {"content-length", "transfer-encoding"} <= headers.keys():  # a proxy may read the other
            raise h11.RemoteProtocolError("two lengths", error_status_hint=400)
        claimed = headers.get("content-length", "0")
        self.claimed = int(claimed) if claimed.isdecimal() and len(claimed) < 20 else 0
        path = head.target.decode("latin-1").partition("?")[0]
        method = head.method.decode("ascii")
        request = Request(method, path, headers, self.client, self._body)
        response = await self.answer(request)
        return await self.send(response, self.state.their_state is not h11.DONE)

    async def _event(self) -> object:
        while True:
            found = self.state.next_event()
            if found is not h11.NEED_DATA:
                return found
            if self.state.they_are_waiting_for_100_continue:
                self._write(h11.InformationalResponse(status_code=100, headers=[]))
                await self.writer.drain()
            self.state.receive_data(await self.reader.read(64 << 10))

    async def _body(self) -> bytes:
        """The body of the request. Errors: Refused (too large), TimeoutError."""
        self.listen.bounds.check(self.claimed)
        body, pieces = bytearray(), 0
        try:
            async with asyncio.timeout(BODY_S):
                while isinstance(part := await self._event(), h11.Data):
                    body += part.data
                    self.listen.bounds.check(len(body))
                    pieces += 1
                    if pieces > PIECES + len(body) // PIECE:
                        raise Refused(f"the body comes in pieces of less than {PIECE} bytes")
        except h11.RemoteProtocolError as error:
            raise Refused(
                f"the body did not come as it was announced: {short(str(error))}"
            ) from error
        return bytes(body)

    def _write(self, event: h11.Event) -> None:
        data = self.state.send(event)
        if data:
            self.writer.write(data)

    async def send(self, response: Response, last: bool) -> bool:
        """A response; whether another request may follow."""
        headers = {"content-length": str(len(response.body)), **response.headers}
        if last:
            headers["connection"] = "close"
        self._write(
            h11.Response(
                status_code=response.status,
                headers=[(k.encode(), v.encode("latin-1", "replace")) for k, v in headers.items()],
            )
        )
        self._write(h11.Data(data=response.body))
        self._write(h11.EndOfMessage())
        async with asyncio.timeout(BODY_S):
            await self.writer.drain()
        return not last and self.state.our_state is h11.DONE
