"""`vla-pruner serve`: answer robots and evaluation harnesses with a pruned policy."""

from __future__ import annotations

import argparse
import asyncio
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from vla_pruner._arguments import at_least
from vla_pruner.commands.shared.doors import LOOPBACK, Doors, add_doors, check_free, doors_of
from vla_pruner.commands.shared.options import (
    add_capture,
    add_device,
    add_keep,
    add_method,
    add_policy,
    add_unnorm_key,
    check_capture,
    condition_of,
    device_of,
)
from vla_pruner.commands.shared.output_folder import check_file
from vla_pruner.episodes.control import Gripper, gripper_of, said_by, statistics_of
from vla_pruner.models.loading import locate, read_config
from vla_pruner.runs.job import fingerprint
from vla_pruner.serving.engine import Engine
from vla_pruner.serving.options import apart, check_engine, engine_from, engine_options
from vla_pruner.serving.policy import ServedPolicy


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
        "default: what its config.json or the range of its statistics says, else robosuite for "
        "policies that ship with the package and rlds for others",
    )
    parser.add_argument(
        "--center-crop",
        action=argparse.BooleanOptionalAction,
        help="override what the policy's configuration says",
    )
    add_device(parser)
    add_capture(parser)
    parser.add_argument(
        "--dtype",
        help="float32, bfloat16, float16, or short: fp32, bf16, fp16; by default as stored",
    )
    parser.add_argument(
        "--chunk-size",
        type=at_least(1),
        help="actions of a chunk that are carried out; by default what the policy says, else all",
    )
    add_doors(parser.add_argument_group("doors"))
    engine_options(parser)


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C."""
    device_of(args.device)
    check_capture(args.capture)
    chosen = doors_of(args)
    check_engine(args)
    if args.rerun is not None:
        check_file(args.rerun, "--rerun")
        if args.rerun.suffix != ".rrd":
            raise ValueError(f"--rerun {args.rerun}: the name must end in .rrd")
    condition_of(args.method, args.keep, args.option)
    read_config(locate(args.policy))
    check_free(chosen)
    engine, doors, what = opened(args, chosen)
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


def opened(args: argparse.Namespace, chosen: Doors) -> tuple[Engine, list[Any], str]:
    """Engine, doors, and what is served in words, from the arguments.

    Raises:
        ValueError: arguments that do not fit each other or the policy.
        ImportError: what a door needs is not installed.
    """
    from vla_pruner.doors.keys import Robot

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
    key = statistics_of(model, args.unnorm_key, folder=folder)
    usual: Gripper = "robosuite" if control else "rlds"
    settings = {
        "keep": condition.keep,
        "unnorm_key": key,
        "center_crop": args.center_crop,
        "capture": args.capture,
        "show": args.rerun is not None,
        **dict(condition.options),
    }
    robot = Robot(
        cameras=getattr(config, "num_images", 1),
        state_dim=getattr(config, "proprio_dim", None),
        action_dim=getattr(config, "action_dim", None),
        gripper=args.gripper or gripper_of(model, control, key, otherwise=usual),
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
        _door(name, port, args, chosen, engine, robot, model, execute)
        for name, port in chosen.wanted
    ]
    what = args.policy + (f" for {chosen.benchmark}" if "vla-eval" in dict(chosen.wanted) else "")
    return engine, doors, f"{what}, method {condition.name}"


def _door(
    name: str,
    port: int,
    args: argparse.Namespace,
    chosen: Doors,
    engine: Engine,
    robot: Any,
    model: Any,
    execute: int,
) -> Any:
    """The door of one protocol."""
    from vla_pruner.doors.door import Listen

    listen = Listen(
        chosen.host,
        port,
        chosen.token,
        chosen.cert,
        chosen.key,
        idle_s=engine.limits.idle_s,
        clients=engine.limits.connections,
    )
    if name == "openpi":
        from vla_pruner.doors.openpi import OpenpiDoor

        return OpenpiDoor(engine, listen, robot, chosen.keys)
    if name == "act":
        from vla_pruner.doors.act import ActDoor

        return ActDoor(engine, listen, robot)
    if name == "gr00t":
        from vla_pruner.doors.gr00t import Gr00tDoor

        return Gr00tDoor(engine, listen, robot, chosen.modalities)
    if name == "lerobot":
        from vla_pruner.doors.lerobot_async import LerobotDoor

        return LerobotDoor(engine, listen, robot, chosen.cameras, chosen.fps)
    from vla_pruner.doors.run import VlaEvalDoor
    from vla_pruner.serving.server import PolicyServer

    server = PolicyServer(
        model,
        args.method,
        benchmark=chosen.benchmark,
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
    from vla_pruner.models.loading import load

    return load(name, device=device, dtype=dtype)
