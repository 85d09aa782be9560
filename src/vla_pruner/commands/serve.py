"""`vla-pruner serve`: answer robots and evaluation harnesses with a pruned policy."""

from __future__ import annotations

import argparse
import asyncio
import importlib
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from vla_pruner.commands.shared.options import (
    add_capture,
    add_device,
    add_keep,
    add_method,
    add_policy,
    add_unnorm_key,
    condition_of,
    device_of,
)
from vla_pruner.episodes.control import said_by, statistics_of
from vla_pruner.models.loading import locate
from vla_pruner.runs.job import fingerprint
from vla_pruner.serving.engine import Engine
from vla_pruner.serving.options import apart, engine_from, engine_options
from vla_pruner.serving.policy import ServedPolicy

LOOPBACK = ("127.0.0.1", "::1", "localhost")


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
    add_unnorm_key(parser)
    parser.add_argument(
        "--gripper",
        choices=("rlds", "robosuite"),
        help="how the policy writes it: rlds (0 close, 1 open) or robosuite (+1 close, -1 open); "
        "by default robosuite for policies that ship with the package, otherwise rlds",
    )
    parser.add_argument(
        "--center-crop",
        action=argparse.BooleanOptionalAction,
        help="override what the policy's configuration says",
    )
    add_device(parser)
    add_capture(parser)
    parser.add_argument("--dtype", help="float32, bfloat16 or float16; by default as stored")
    parser.add_argument(
        "--chunk-size",
        type=int,
        help="actions of a chunk that are carried out; by default what the policy says, else all",
    )
    _add_doors(parser.add_argument_group("doors"))
    engine_options(parser)


def _add_doors(group: Any) -> None:
    group.add_argument(
        "--protocol",
        action="append",
        metavar="NAME[:PORT]",
        help="of the clients: vla-eval (the default), openpi, act, gr00t or lerobot; may be given "
        "several times",
    )
    group.add_argument("--host", default="127.0.0.1", help="address; 0.0.0.0 for other machines")
    group.add_argument("--port", type=int, help="port of the one door; by default its usual one")
    group.add_argument(
        "--token-file", type=Path, help="file with the token that clients have to show"
    )
    group.add_argument("--tls-cert", type=Path, help="certificate (PEM), with --tls-key")
    group.add_argument("--tls-key", type=Path, help="its key (PEM)")
    group.add_argument(
        "--benchmark",
        default="libero",
        help="vla-eval: whose messages come: libero, pickplace, simpler-google or simpler-widowx",
    )
    group.add_argument(
        "--jpeg",
        action="store_true",
        help="vla-eval: pass images through JPEG first, as published checkpoints were evaluated",
    )
    group.add_argument(
        "--keys",
        default="libero",
        help="openpi: where messages have images and state: libero, droid, aloha or a YAML file",
    )
    group.add_argument(
        "--modalities",
        type=Path,
        help="gr00t: a YAML file with video, state, action and language; by default LIBERO's",
    )
    group.add_argument(
        "--cameras",
        default="",
        help="lerobot: the robot's cameras in the policy's order, with commas between them",
    )
    group.add_argument(
        "--fps", type=float, default=30.0, help="lerobot: ticks of the robot in a second"
    )
    group.add_argument(
        "--accept-lerobot-pickles",
        action="store_true",
        help="lerobot: its messages are pickles, read as data here; says that you know",
    )


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C."""
    if any(each.partition(":")[0] == "vla-eval" for each in args.protocol or ["vla-eval"]):
        importlib.import_module("vla_eval")  # first, so that its extra is the one that is named
    from vla_pruner.doors.run import wanted

    device_of(args.device)
    if args.rerun is not None:
        importlib.import_module("rerun")
    if args.port is not None and not 0 <= args.port <= 65535:
        raise ValueError(f"--port {args.port}: expected 0 to 65535 (0: any that is free)")
    protocols = wanted(args.protocol or ["vla-eval"], args.port)
    if any(name == "lerobot" for name, _ in protocols) and not args.accept_lerobot_pickles:
        raise ValueError(
            "lerobot's client sends pickles. They are read as data here, and nothing in them is "
            "called; if you want this door, say --accept-lerobot-pickles, too"
        )
    engine, doors, what = opened(args, protocols)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    console = Console()
    if args.host not in LOOPBACK and args.token_file is None:
        console.print(
            "anybody who reaches this machine can ask: no --token-file",
            highlight=False,
            soft_wrap=True,
        )

    def say(name: str, address: str) -> None:
        console.print(
            f"serving {what}: {name} on {address} (Ctrl-C ends)", highlight=False, soft_wrap=True
        )

    _serve(engine, doors, say)
    return 0


def _serve(engine: Engine, doors: list[Any], say: Callable[[str, str], None]) -> None:
    """Answer until the process is ended."""
    from vla_pruner.doors.run import open_doors
    from vla_pruner.serving.listen import leave

    try:
        asyncio.run(open_doors(engine, doors, say))
    finally:
        leave(engine)


def opened(
    args: argparse.Namespace, protocols: list[tuple[str, int]]
) -> tuple[Engine, list[Any], str]:
    """Engine, doors, and what is served in words, from the arguments.

    Raises:
        ValueError: arguments that do not fit each other or the policy.
        ImportError: what a door needs is not installed.
    """
    from vla_pruner.doors.door import Listen
    from vla_pruner.doors.keys import Robot
    from vla_pruner.serving.listen import read_token

    if args.token_file is not None:  # what is not there is found before anything is loaded
        read_token(args.token_file)
    Listen(cert=args.tls_cert, key=args.tls_key).tls()
    condition = condition_of(args.method, args.keep, args.option)
    if args.capture and args.ladder is not None:
        raise ValueError("--capture: a captured policy keeps its budget; leave --ladder out")
    model, folder = _load(args.policy, args.device, args.dtype), Path(locate(args.policy))
    control, config = said_by(folder), getattr(model, "config", None)
    chunk = getattr(config, "chunk", 1)
    if args.chunk_size is not None and not 1 <= args.chunk_size <= chunk:
        raise ValueError(
            f"--chunk-size {args.chunk_size}: {args.policy} gives {chunk} action(s) at a time"
        )
    execute = args.chunk_size or int(control.get("execute", chunk))
    settings = {
        "keep": condition.keep,
        "unnorm_key": statistics_of(model, args.unnorm_key, folder=folder),
        "center_crop": args.center_crop,
        "capture": args.capture,
        "show": args.rerun is not None,
        **dict(condition.options),
    }
    robot = Robot(
        cameras=getattr(config, "num_images", 1),
        state_dim=getattr(config, "proprio_dim", None),
        action_dim=getattr(config, "action_dim", None),
        gripper=args.gripper or ("robosuite" if control else "rlds"),
    )
    make: Callable[[], ServedPolicy] = partial(ServedPolicy, model, condition.method, **settings)
    if apart(args):
        make().close()  # what fits here, fits there; each process loads its own
        make = partial(
            _make_served, args.policy, args.device, args.dtype, condition.method, settings
        )
    weights = None if args.ladder is None else fingerprint(model)
    engine = engine_from(args, make, execute=execute, weights=weights)
    doors = [
        _door(name, port, args, engine, robot, model if name == "vla-eval" else None, execute)
        for name, port in protocols
    ]
    what = args.policy + (f" for {args.benchmark}" if "vla-eval" in dict(protocols) else "")
    return engine, doors, f"{what}, method {condition.name}"


def _door(
    name: str,
    port: int,
    args: argparse.Namespace,
    engine: Engine,
    robot: Any,
    model: Any,
    execute: int,
) -> Any:
    """The door of one protocol."""
    from vla_pruner.doors.door import Listen
    from vla_pruner.serving.listen import read_token

    listen = Listen(
        args.host,
        port,
        None if args.token_file is None else read_token(args.token_file),
        args.tls_cert,
        args.tls_key,
        idle_s=engine.limits.idle_s,
        clients=engine.limits.connections,
    )
    if name == "openpi":
        from vla_pruner.doors.keys import keys_of
        from vla_pruner.doors.openpi import OpenpiDoor

        return OpenpiDoor(engine, listen, robot, keys_of(args.keys))
    if name == "act":
        from vla_pruner.doors.act import ActDoor

        return ActDoor(engine, listen, robot)
    if name == "gr00t":
        from vla_pruner.doors.gr00t import Gr00tDoor, Modalities, modalities_of

        found = Modalities() if args.modalities is None else modalities_of(args.modalities)
        return Gr00tDoor(engine, listen, robot, found)
    if name == "lerobot":
        from vla_pruner.doors.lerobot_async import LerobotDoor

        cameras = tuple(each.strip() for each in args.cameras.split(",") if each.strip())
        return LerobotDoor(engine, listen, robot, cameras, args.fps)
    from vla_pruner.doors.run import VlaEvalDoor
    from vla_pruner.serving.server import PolicyServer

    server = PolicyServer(
        model,
        args.method,
        benchmark=args.benchmark,
        unnorm_key=args.unnorm_key,
        gripper=robot.gripper,
        jpeg=args.jpeg,
        chunk_size=execute,
        token_file=None if args.token_file is None else str(args.token_file),
        engine=engine,
    )
    return VlaEvalDoor(server, listen)


def _make_served(
    policy: str, device: str, dtype: str | None, method: str, settings: dict[str, Any]
) -> ServedPolicy:
    """A policy from its name, for a process of its own."""
    return ServedPolicy(_load(policy, device, dtype), method, **settings)


def _load(name: str, device: str, dtype: str | None) -> Any:
    import torch

    from vla_pruner.models.loading import load

    known = ("float32", "bfloat16", "float16")
    if dtype is not None and dtype not in known:
        raise ValueError(f"--dtype {dtype} is unknown; use one of {', '.join(known)}")
    return load(name, device=device, dtype=None if dtype is None else getattr(torch, dtype))
