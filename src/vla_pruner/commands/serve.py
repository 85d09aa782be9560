"""`vla-pruner serve`: answer an evaluation harness with a pruned policy until interrupted."""

from __future__ import annotations

import argparse
import asyncio
import logging
from typing import TYPE_CHECKING

from rich.console import Console

from vla_pruner.commands.options import (
    add_device,
    add_keep,
    add_method,
    add_policy,
    add_unnorm_key,
    device_of,
)
from vla_pruner.episodes.condition import Condition

if TYPE_CHECKING:
    from vla_pruner.serving.server import PolicyServer

PROTOCOLS = ("vla-eval",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `vla-pruner serve`."""
    add_policy(parser)
    add_method(parser, "none")
    add_keep(parser)
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a further option of the method; may be given several times",
    )
    parser.add_argument("--protocol", choices=PROTOCOLS, default=PROTOCOLS[0], help="of the client")
    parser.add_argument(
        "--benchmark",
        default="libero",
        help="whose messages come: libero, pickplace, simpler-google or simpler-widowx",
    )
    add_unnorm_key(parser)
    parser.add_argument(
        "--gripper",
        help="how the policy writes it: rlds (0 close, 1 open) or robosuite (+1 close, -1 open); "
        "by default robosuite for policies that ship with the package, otherwise rlds",
    )
    parser.add_argument(
        "--jpeg",
        action="store_true",
        help="pass images through JPEG first, as published checkpoints were evaluated",
    )
    parser.add_argument(
        "--center-crop",
        action=argparse.BooleanOptionalAction,
        help="override what the policy's configuration says",
    )
    add_device(parser)
    parser.add_argument("--dtype", help="float32, bfloat16 or float16; by default as stored")
    parser.add_argument(
        "--chunk-size",
        type=int,
        help="actions of a chunk that are carried out; by default what the policy says, else all",
    )
    parser.add_argument(
        "--batch", type=int, default=16, help="answer up to so many clients in one pass"
    )
    parser.add_argument(
        "--wait-ms",
        type=float,
        default=3.0,
        help="how long a pass waits for clients that are known to come back at once",
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for other machines"
    )
    parser.add_argument("--port", type=int, default=8000, help="port to listen on")


def run(args: argparse.Namespace) -> int:
    """Serve until Ctrl-C."""
    device_of(args.device)
    if not 0 <= args.port <= 65535:
        raise ValueError(f"--port {args.port}: expected 0 to 65535 (0: any that is free)")
    if args.wait_ms < 0:
        raise ValueError(f"--wait-ms {args.wait_ms}: expected 0 or more")
    server = open_server(args)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    Console().print(
        f"serving {server.description} on ws://{args.host}:{args.port} (Ctrl-C ends)",
        highlight=False,
    )
    _serve(server, args.host, args.port)
    return 0


def open_server(args: argparse.Namespace) -> PolicyServer:
    """The server that the arguments describe.

    Raises:
        ValueError: arguments that do not fit each other or the policy.
        ImportError: vla-eval is not installed.
    """
    from vla_pruner.serving.server import PolicyServer

    kept = "" if args.keep is None else "@" + ":".join([args.keep, *args.option])
    if args.option and args.keep is None:
        raise ValueError("--option: say with --keep how many tokens stay, too")
    condition = Condition.parse(args.method + kept)
    return PolicyServer(
        args.policy,
        condition.method,
        condition.keep,
        args.benchmark,
        dict(condition.options),
        unnorm_key=args.unnorm_key,
        gripper=args.gripper,
        jpeg=args.jpeg,
        center_crop=args.center_crop,
        device=args.device,
        dtype=args.dtype,
        chunk_size=args.chunk_size,
        max_batch_size=args.batch,
        max_wait_time=args.wait_ms / 1000,
    )


def _serve(server: PolicyServer, host: str, port: int) -> None:
    """Listen until the process is ended. Raises RuntimeError: the address is not free."""
    from vla_pruner.serving.listen import serve_async

    try:
        asyncio.run(serve_async(server, host, port))
    except OSError as error:
        raise RuntimeError(
            f"cannot listen on {host}:{port} ({error}); choose another --host or --port"
        ) from error
