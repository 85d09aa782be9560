"""Sockets of vla-eval's protocol: who may come in, what is read of a message, how it all ends."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import os
import signal
import ssl
import sys
import time
from base64 import b64decode
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from pathlib import Path
from typing import Any, Protocol

import msgpack
import numpy as np
from websockets.asyncio.server import ServerConnection
from websockets.asyncio.server import serve as listen_websockets
from websockets.exceptions import ConnectionClosed

from vla_pruner._short import cut, short
from vla_pruner.serving.engine import Busy, Engine, Failed, Hung, Refused
from vla_pruner.serving.limits import CONNECTIONS, Limits

logger = logging.getLogger(__name__)

DRAIN_S = 20.0
"""Seconds that a server which is told to end waits for answers that are being worked out."""
END_S = 10.0
"""Seconds after that in which a pass may still end, before the process does without it."""
SEND_S = 30.0
"""Seconds in which a client has to take what is sent to it off the wire."""
UNREAD = 1 << 20
"""Bytes that may wait for a client to read them; pongs are sent without anybody's leave."""
CLOSE_S = 8.0
"""Seconds that connections have to close when a server ends."""
SPARE = 64
"""Connections in their handshake, besides those that are open."""
GOING_AWAY, SILENT, TOO_BIG = 1001, 1008, 1009
PIECES = 1024
"""Frames that a message may come in: empty ones have no bytes that could be counted."""


class Talk(Protocol):
    """One connection."""

    async def answer(self, kind: Any, payload: dict[str, Any]) -> tuple[str, dict] | None:
        """Type and payload of what is sent back; None: nothing is."""

    async def end(self) -> None:
        """The client is gone."""


class Guard:
    """Makes a server's connections (`create_connection`), and ends those that nobody else would.

    `websockets` waits for ever until a client reads, also to close, and counts no handshakes.
    """

    def __init__(self, most: int) -> None:
        self.most = most + SPARE
        self.open: set[Any] = set()

    def __call__(self, *protocol_and_server: Any, **options: Any) -> ServerConnection:
        made = _Guarded(*protocol_and_server, **options)
        made.guard = self
        return made

    async def shut(self, server: Any) -> None:
        """Close a server and its connections; those that do not close in time are cut."""
        server.close(code=GOING_AWAY, reason="the server is ending")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_S):
                await server.wait_closed()
        for connection in list(self.open):
            connection.transport.abort()


class _Guarded(ServerConnection):
    """A connection whose client has to read."""

    guard: Guard
    _stuck: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.guard.open.add(self)
        if len(self.guard.open) > self.guard.most:
            self.transport.abort()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.transport.get_write_buffer_size() > UNREAD:
            self.transport.abort()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stuck = self.loop.call_later(SEND_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._free()

    def connection_lost(self, exc: Exception | None) -> None:
        self.guard.open.discard(self)
        self._free()
        super().connection_lost(exc)

    def _free(self) -> None:
        if self._stuck is not None:
            self._stuck.cancel()
            self._stuck = None


class Server(Protocol):
    """Who answers connections."""

    engine: Engine
    token: str | None

    def talk(self) -> Talk:
        """What answers one connection."""


@contextlib.asynccontextmanager
async def listening(
    server: Server,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    tls: ssl.SSLContext | None = None,
    ended: Callable[[], object] | None = None,
) -> AsyncIterator[Any]:
    """Answer connections inside the block; warmed up when it is entered, drained when it is left.

    Args:
        server: who answers.
        host, port: where; port 0: any that is free.
        tls: what encrypts connections.
        ended: called when SIGTERM came and everything is answered and closed; None: the signal is
            left alone.

    Raises:
        OSError: the address is not free.
    """
    engine, limits = server.engine, server.engine.limits
    decoders = ThreadPoolExecutor(2, "decode")
    here: set[ServerConnection] = set()

    async def meet(socket: ServerConnection) -> None:
        engine.metrics.add("connections_total", "accepted")
        here.add(socket)
        engine.metrics.put("connections", len(here))
        talk = server.talk()
        patience = limits.first_s
        try:
            while True:
                async with asyncio.timeout(patience):
                    message = await received(socket)
                sent = await _exchange(talk, message, engine, decoders)
                del message
                if sent is not None:
                    await socket.send(sent)
                patience = limits.idle_s
        except TimeoutError:
            CONNECTIONS.info("a client was silent for %g s", patience)
            await socket.close(SILENT, f"silent for {patience:g} s")
        except ConnectionClosed:
            pass
        finally:
            here.discard(socket)
            engine.metrics.put("connections", len(here))
            with contextlib.suppress(Exception):
                await talk.end()

    def enter(socket: ServerConnection, request: Any) -> Any:
        """Pages for watchers; who may come in."""
        path = request.path.partition("?")[0]
        if path == "/health":
            return _page(socket, HTTPStatus.OK, '{"status": "ok"}\n', "application/json")
        if path == "/ready":
            code = HTTPStatus.OK if engine.ready else HTTPStatus.SERVICE_UNAVAILABLE
            return _page(socket, code, f'{{"ready": {str(engine.ready).lower()}}}\n')
        if not admitted(server.token, shown_by(request)):
            return _page(socket, HTTPStatus.UNAUTHORIZED, "no token, or another one\n")
        if path == "/metrics":
            return _page(socket, HTTPStatus.OK, engine.metrics.text())
        if path == "/config":
            return _page(socket, HTTPStatus.NOT_FOUND, "nothing can be set from outside\n")
        if len(here) >= limits.connections:
            engine.metrics.add("connections_total", "refused")
            return _page(socket, HTTPStatus.SERVICE_UNAVAILABLE, "too many connections\n")
        return None

    guard = Guard(limits.connections)
    await engine.start()
    async with listen_websockets(
        meet,
        host,
        port,
        process_request=enter,
        origins=[None],  # Web pages send one; robots and harnesses do not.
        compression=None,
        max_size=limits.frame,
        max_queue=1,
        ping_interval=20,
        ping_timeout=120,  # A simulator that loads a scene blocks its client's event loop.
        close_timeout=5,
        server_header=None,
        logger=CONNECTIONS,
        create_connection=guard,  # type: ignore[arg-type]
        ssl=tls,
    ) as sockets:
        loop, ending = asyncio.get_running_loop(), None

        async def end() -> None:
            await engine.drain(DRAIN_S)
            await asyncio.sleep(0.05)  # What was answered last is on its way.
            await guard.shut(sockets)
            if ended is not None:
                ended()

        def told_to_end() -> None:
            nonlocal ending
            ending = ending or loop.create_task(end())

        if ended is not None:
            with contextlib.suppress(RuntimeError, ValueError):  # Not the main thread: no signals.
                loop.add_signal_handler(signal.SIGTERM, told_to_end)
        where = sockets.sockets[0].getsockname()
        logger.info("listening on %s:%d", where[0], where[1])
        try:
            yield sockets
        finally:
            if ended is not None:
                with contextlib.suppress(RuntimeError, ValueError):
                    loop.remove_signal_handler(signal.SIGTERM)
            await guard.shut(sockets)
            decoders.shutdown(wait=False, cancel_futures=True)


async def serve_async(
    server: Server,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    tls: ssl.SSLContext | None = None,
    ready: Callable[[int], object] | None = None,
) -> None:
    """Listen until SIGTERM, then drain and return. `ready` is told the port."""
    over = asyncio.Event()
    async with listening(server, host, port, tls=tls, ended=over.set) as sockets:
        if ready is not None:
            ready(sockets.sockets[0].getsockname()[1])
        await over.wait()


async def received(socket: ServerConnection) -> str | bytes:
    """The next message. Errors: ConnectionClosed, also where it came in too many pieces."""
    pieces: list[Any] = []
    async for piece in socket.recv_streaming():
        pieces.append(piece)
        if len(pieces) > PIECES:
            await socket.close(TOO_BIG, f"a message in more than {PIECES} frames")
            raise socket.protocol.close_exc
    whole: str | bytes = type(pieces[0])().join(pieces)
    return whole


def shown_by(request: Any) -> str | None:
    """The `Authorization` of a handshake; of several, none counts."""
    shown = request.headers.get_all("Authorization")
    return shown[0] if len(shown) == 1 else None


async def _exchange(
    talk: Talk, message: str | bytes, engine: Engine, decoders: ThreadPoolExecutor
) -> bytes | None:
    """The answer to one message, as bytes; an error is one for its own client."""
    limits, seq = engine.limits, 0
    try:
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(decoders, unpack, message, limits)
        seq = found["seq"]
        answer = await talk.answer(found["type"], found["payload"])
        if answer is None:
            return None
        return _pack(*answer, seq)
    except (Refused, Busy, Hung, Failed) as error:
        kind = type(error).__name__.lower()
        if isinstance(error, Refused):
            engine.metrics.add("bad_messages_total")
        logger.warning("%s: %s", kind, cut(str(error), limits.error))
        return _pack("error", {"error": cut(str(error), limits.error), "kind": kind}, seq)
    except (asyncio.CancelledError, ConnectionClosed):
        raise
    except Exception as error:
        logger.exception("an error of this server, not of its client")
        said = cut(f"the server failed: {type(error).__name__}", limits.error)
        return _pack("error", {"error": said, "kind": "failed"}, seq)


def unpack(message: str | bytes, limits: Limits) -> dict[str, Any]:
    """`type`, `payload` and `seq` of a message of vla-eval's protocol. Errors: Refused."""
    budget = [limits.images, 4 * limits.pixels]

    def decode(found: dict) -> Any:
        if "__image__" in found and found.get("format") != "raw":
            if found.get("format") not in ("png", "jpeg"):
                raise Refused(
                    f"image format {short(found.get('format'))}: png, jpeg or raw is read"
                )
            image = limits.image(found.get("data"))
        elif "__image__" in found or "__ndarray__" in found:
            image = limits.array(found.get("data"), found.get("dtype"), found.get("shape"))
        else:
            return found
        if image.ndim > 1:
            budget[0] -= 1
            budget[1] -= image.size // 3
        if min(budget) < 0:
            raise Refused(f"a message holds at most {limits.images} images")
        return image

    found = limits.unpack(message, decode)
    if not isinstance(found, dict) or not {"type", "payload", "seq"} <= set(found):
        raise Refused("a message is a map with type, payload, seq and timestamp")
    if not isinstance(found["payload"], dict):
        raise Refused(f"`payload` must map names to values; got {short(found['payload'])}")
    if type(found["seq"]) is not int:
        raise Refused(f"`seq` must be a whole number; got {short(found['seq'])}")
    return found


def _pack(kind: str, payload: dict[str, Any], seq: int) -> bytes:
    """A message of vla-eval's protocol."""
    message = {"type": kind, "payload": payload, "seq": seq, "timestamp": time.time()}
    packed: bytes = msgpack.packb(message, default=_plain, use_bin_type=True)
    return packed


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        entry = {"__ndarray__": True, "data": value.tobytes(), "dtype": value.dtype.str}
        return {**entry, "shape": list(value.shape)}
    return value.item()


def _page(socket: ServerConnection, code: HTTPStatus, text: str, kind: str = "text/plain") -> Any:
    response = socket.respond(code, text)
    del response.headers["Content-Type"]
    response.headers["Content-Type"] = f"{kind}; charset=utf-8"
    if code is HTTPStatus.UNAUTHORIZED:
        response.headers["WWW-Authenticate"] = 'Bearer realm="vla-pruner"'
    return response


def admitted(token: str | None, header: str | None) -> bool:
    """Whether a client that sends this `Authorization` may come in; in constant time.

    `Bearer TOKEN`, `Api-Key TOKEN`, or `Basic` with the token as password, which is what
    `ws://any:TOKEN@host` sends.
    """
    if token is None:
        return True
    scheme, _, shown = (header or "").strip().partition(" ")
    if scheme.lower() == "basic":
        with contextlib.suppress(ValueError):
            shown = b64decode(shown, validate=True).decode("utf-8", "replace").partition(":")[2]
    elif scheme.lower() not in ("bearer", "api-key"):
        shown = ""
    return hmac.compare_digest(shown.strip().encode("utf-8", "replace"), token.encode())


def read_token(file: Path) -> str:
    """The token in a file, without white space around it. Errors: ValueError, there is none."""
    try:
        found = file.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} holds no token: {error}") from None
    if not 16 <= len(found) <= 512 or not found.isascii() or len(found.split()) != 1:
        raise ValueError(f"{file} must hold one word of 16 to 512 characters: the token")
    return found


def leave(engine: Engine, timeout_s: float = END_S) -> None:
    """End the process, if a pass still hangs in its thread after so long; else do nothing.

    A thread cannot be ended, and an interpreter waits for its threads.
    """
    if not engine.ended(timeout_s):
        print("a pass of the policy hangs; the process ends without it", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
