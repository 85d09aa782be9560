"""What every door has: an address, who may come in, how long one may be silent."""

from __future__ import annotations

import hmac
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vla_pruner._short import short
from vla_pruner.doors.wire import BOUNDS, Bounds
from vla_pruner.serving.engine import Busy, Refused, Reply
from vla_pruner.serving.listen import admitted


@dataclass(frozen=True)
class Listen:
    """Where and how to listen.

    Args:
        host: address; 127.0.0.1 is this machine alone.
        port: 0: any that is free.
        token: what clients have to show; None: nothing.
        cert, key: files for TLS; None: without.
        idle_s: a client that is silent for so long is gone.
        clients: at most so many at once.
        bounds: of a message.
    """

    host: str = "127.0.0.1"
    port: int = 0
    token: str | None = field(default=None, repr=False)
    cert: Path | None = None
    key: Path | None = None
    idle_s: float = 300.0
    clients: int = 512
    bounds: Bounds = BOUNDS

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port {self.port}: expected 0 to 65535 (0: any that is free)")
        if (self.cert is None) != (self.key is None):
            raise ValueError("TLS takes two files: --tls-cert and --tls-key")

    def tls(self) -> ssl.SSLContext | None:
        """What a server socket is wrapped in. Errors: ValueError for files that are none."""
        if self.cert is None or self.key is None:
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(self.cert, self.key, password=_nobody_is_asked)
        except (OSError, ValueError) as error:  # SSLError is an OSError
            raise ValueError(f"{self.cert}, {self.key}: no certificate and key ({error})") from None
        return context

    def admits(self, shown: Any) -> bool:
        """Whether a client that shows this may come in; takes as long whatever it shows."""
        if self.token is None:
            return True
        given = shown if isinstance(shown, str) else ""
        return hmac.compare_digest(given.encode("utf-8", "replace"), self.token.encode())

    def admits_header(self, header: str | None) -> bool:
        """The same for an `Authorization` header, see `serving.listen.admitted`."""
        return admitted(self.token, header)


def _nobody_is_asked() -> str:
    """OpenSSL would ask at the terminal. Errors: ValueError."""
    raise ValueError("the key is encrypted: take the pass phrase off, `openssl pkey -in KEY`")


class Door(Protocol):
    """A protocol that listens."""

    name: str

    async def serve(self, ready: Callable[[str], None]) -> None:
        """Listen until cancelled; `ready` is told the address once there is one.

        Raises:
            OSError: the address is not free.
        """


def told(reply: Reply) -> dict[str, Any]:
    """What a reply says besides its actions, as plain numbers."""
    return {
        "late": reply.late,
        "age_ms": round(reply.age_s * 1000, 3),
        "valid": reply.valid,
        "keep": None if reply.keep is None else float(reply.keep),
        "tokens": reply.tokens,
        "warm_up": reply.warm_up,
        "infer_ms": round(reply.infer_ms, 3),
        "method": reply.method,
    }


def carried_out(reply: Reply) -> Reply:
    """A reply with actions, for clients that would not see that there are none. Errors: Busy."""
    if not reply.valid:
        raise Busy("no answer in time, and nothing is left of the last chunk: hold, and ask again")
    return reply


def page(engine: Any, path: str) -> tuple[int, str] | None:
    """Status and text of the pages that watchers ask for; None: there is no such page."""
    if path in ("/health", "/healthz"):
        return 200, "OK\n"
    if path == "/ready":
        return (200, "ready\n") if getattr(engine, "ready", True) else (503, "not ready\n")
    metrics = getattr(engine, "metrics", None)
    if path == "/metrics" and metrics is not None:
        return 200, metrics.text()
    return None


def deadline_of(message: Mapping[Any, Any]) -> float | None:
    """Seconds in which a client wants its answer, from `deadline_ms`; None: it does not say.

    Raises:
        Refused: not a number of 1 to 600000.
    """
    given = _plain(message.get("deadline_ms"))
    if given is None:
        return None
    if isinstance(given, bool) or not isinstance(given, int | float) or not 1 <= given <= 600_000:
        raise Refused("deadline_ms must be a number of milliseconds, 1 to 600000")
    return given / 1000


def flag_of(message: Mapping[Any, Any], name: str) -> bool:
    """An entry that is true or false, false where there is none. Errors: Refused."""
    given = _plain(message.get(name, False))
    if not isinstance(given, bool):
        raise Refused(f"{name} is {short(given)}; expected true or false")
    return given


def _plain(value: Any) -> Any:
    """A number of numpy as Python's."""
    return value.item() if isinstance(value, np.generic) else value
