"""Options of the doors: which there are, where they listen, who may come in; all read first."""

from __future__ import annotations

import argparse
import importlib
import socket
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vla_pruner._arguments import a_path, above_0
from vla_pruner._short import short, word

LOOPBACK = ("127.0.0.1", "::1", "localhost")
_DOOR_OF = {
    "benchmark": "vla-eval",
    "jpeg": "vla-eval",
    "keys": "openpi",
    "modalities": "gr00t",
    "cameras": "lerobot",
    "fps": "lerobot",
    "accept_lerobot_pickles": "lerobot",
}
"""Options that only one door reads."""


@dataclass(frozen=True)
class Doors:
    """What the options say, read and checked.

    Args:
        wanted: names and ports.
        benchmark: vla-eval's.
        keys: openpi's, see `doors.keys.Keys`; None: no such door.
        modalities: GR00T's, see `doors.gr00t.Modalities`; None: no such door.
        cameras, fps: lerobot's.
        token: what clients have to show; None: nothing.
        cert, key: files for TLS.
        host: address.
    """

    wanted: list[tuple[str, int]]
    benchmark: str = "libero"
    keys: Any = None
    modalities: Any = None
    cameras: tuple[str, ...] = ()
    fps: float = 30.0
    token: str | None = None
    cert: Path | None = None
    key: Path | None = None
    host: str = LOOPBACK[0]


def add_doors(group: Any) -> None:
    """Options of `vla-pruner serve` about its doors."""
    group.add_argument(
        "--protocol",
        action="append",
        metavar="NAME[:PORT]",
        help="of the clients: vla-eval (the default), openpi, act, gr00t or lerobot; may be given "
        "several times",
    )
    group.add_argument("--host", default=LOOPBACK[0], help="address; 0.0.0.0 for other machines")
    group.add_argument("--port", type=int, help="port of the one door; by default its usual one")
    group.add_argument(
        "--token-file", type=a_path, help="file with the token that clients have to show"
    )
    group.add_argument("--tls-cert", type=a_path, help="certificate (PEM), with --tls-key")
    group.add_argument("--tls-key", type=a_path, help="its key (PEM)")
    group.add_argument(
        "--benchmark",
        help="vla-eval: whose messages come: libero, pickplace, simpler-google or simpler-widowx "
        "(default: libero)",
    )
    group.add_argument(
        "--jpeg",
        action="store_true",
        help="vla-eval: pass images through JPEG first, as published checkpoints were evaluated",
    )
    group.add_argument(
        "--keys",
        help="openpi: where messages have images and state: libero, droid, aloha or a YAML file "
        "(default: libero)",
    )
    group.add_argument(
        "--modalities",
        type=a_path,
        help="gr00t: a YAML file with video, state, action and language; by default LIBERO's",
    )
    group.add_argument(
        "--cameras",
        help="lerobot: the robot's cameras in the policy's order, with commas between them",
    )
    group.add_argument(
        "--fps",
        type=partial(above_0, most=1000),
        help="lerobot: ticks of the robot in a second (default: 30)",
    )
    group.add_argument(
        "--accept-lerobot-pickles",
        action="store_true",
        help="lerobot: its messages are pickles, read as data here; says that you know",
    )


def doors_of(args: argparse.Namespace) -> Doors:
    """What `add_doors` says.

    Raises:
        ValueError: options, names or files that are none, or that no door reads.
        ImportError: what a door needs is not installed.
    """
    protocols = args.protocol or ["vla-eval"]
    if any(each.partition(":")[0] == "vla-eval" for each in protocols):
        importlib.import_module("vla_eval")  # first, so that its extra is the one that is named
    from vla_pruner.doors.door import Listen
    from vla_pruner.doors.run import wanted
    from vla_pruner.serving.listen import read_token

    if args.port is not None and not 0 <= args.port <= 65535:
        raise ValueError(f"--port {short(args.port)}: expected 0 to 65535 (0: any that is free)")
    found = wanted(protocols, args.port)
    names = {name for name, _ in found}
    for option, door in _DOOR_OF.items():
        if getattr(args, option) not in (None, False) and door not in names:
            said = "--" + option.replace("_", "-")
            raise ValueError(f"{said} is for the door {door}: add --protocol {door}")
    if "lerobot" in names and not args.accept_lerobot_pickles:
        raise ValueError(
            "lerobot's client sends pickles. They are read as data here, and nothing in them is "
            "called; if you want this door, say --accept-lerobot-pickles, too"
        )
    token = None if args.token_file is None else read_token(args.token_file)
    Listen(token=token, cert=args.tls_cert, key=args.tls_key).tls()
    more: dict[str, Any] = {}
    if "vla-eval" in names:
        more["benchmark"] = _benchmark("libero" if args.benchmark is None else args.benchmark)
    if "openpi" in names:
        from vla_pruner.doors.keys import keys_of

        more["keys"] = keys_of("libero" if args.keys is None else args.keys)
    if "gr00t" in names:
        from vla_pruner.doors.gr00t import Modalities, check_listen, modalities_of

        check_listen(args.tls_cert)
        more["modalities"] = (
            Modalities() if args.modalities is None else modalities_of(args.modalities)
        )
    if "lerobot" in names:
        from vla_pruner.doors.keys import check_names
        from vla_pruner.doors.lerobot_async import check_listen as check_lerobot

        check_lerobot(token, args.tls_cert)
        cameras = () if args.cameras is None else args.cameras.split(",")
        more["cameras"] = tuple(each.strip() for each in cameras)
        check_names("--cameras", more["cameras"])
        more["fps"] = args.fps or 30.0
    if not args.host.strip():
        raise ValueError("--host is empty: 127.0.0.1 is this machine, 0.0.0.0 is open to others")
    return Doors(found, token=token, cert=args.tls_cert, key=args.tls_key, host=args.host, **more)


def _benchmark(name: str) -> str:
    from vla_pruner.serving.conventions import CONVENTIONS

    if name not in CONVENTIONS:
        raise ValueError(
            f"no benchmark is called {short(name)}; there are {', '.join(CONVENTIONS)}"
        )
    return name


def check_free(doors: Doors) -> None:
    """Refuse addresses at which nobody can listen, before a policy is loaded for them.

    Raises:
        RuntimeError: an address is not this machine's, or taken.
    """
    for _, port in doors.wanted:
        try:
            (family, *_, address), *_ = socket.getaddrinfo(
                doors.host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
            socket.create_server(address[:2], family=family).close()
        except (OSError, UnicodeError) as error:
            raise RuntimeError(
                f"cannot listen on {word(doors.host)}:{port} ({error}); choose another --host or "
                "port"
            ) from error
