"""Options of whatever starts an engine, and the engine that they describe."""

from __future__ import annotations

import argparse
import importlib
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

from vla_pruner.reports.rerun_log import RerunLog
from vla_pruner.serving.engine import Engine
from vla_pruner.serving.ladder import Ladder
from vla_pruner.serving.limits import Limits
from vla_pruner.serving.policy import ServedPolicy
from vla_pruner.serving.worker import Apart, OnRay


def engine_options(parser: argparse.ArgumentParser) -> None:
    """Options of the engine, for a command; `--deadline-ms` among them."""
    group = parser.add_argument_group("serving")
    group.add_argument(
        "--batch", type=int, default=16, help="answer up to so many episodes in one pass"
    )
    group.add_argument(
        "--wait-ms",
        type=float,
        default=3.0,
        help="how long a pass waits for clients that are known to come back at once",
    )
    group.add_argument(
        "--deadline-ms",
        type=float,
        help="answer within this time, if need be with the rest of the last chunk (`late`)",
    )
    group.add_argument(
        "--ladder",
        type=Path,
        metavar="RECEIPT",
        help="keep fewer tokens when answers come close to the deadline: a receipt of "
        "`vla-pruner tune`, whose allowed budgets are used",
    )
    group.add_argument(
        "--replicas",
        type=int,
        default=0,
        metavar="N",
        help="run the policy in N processes, each replaced when it hangs or dies; an episode stays "
        "with its process (0: in a thread of this one, which nothing can replace)",
    )
    group.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="run the replicas (at least one) in actors of this Ray cluster, HOST:PORT or auto, "
        "instead of processes; the policy must be found under its name on every node",
    )
    group.add_argument(
        "--ray-gpus", type=float, default=0.0, help="GPUs that a replica reserves, with --ray"
    )
    group.add_argument(
        "--watchdog-s",
        type=float,
        default=30.0,
        help="with --replicas: seconds after which a pass counts as hung",
    )
    group.add_argument(
        "--rerun",
        type=Path,
        metavar="FILE",
        help="write images, kept tokens, scores, actions and latency of every answer to a Rerun "
        "file (.rrd); images are dropped first, and answers never wait for it",
    )
    default = Limits()
    group.add_argument("--max-text", type=int, default=default.text, help="bytes of an instruction")
    group.add_argument("--max-pixels", type=int, default=default.pixels, help="pixels of one image")
    group.add_argument(
        "--max-episodes", type=int, default=default.episodes, help="episodes open at once"
    )
    group.add_argument(
        "--max-connections", type=int, default=default.connections, help="connections at once"
    )
    group.add_argument(
        "--idle-s",
        type=float,
        default=default.idle_s,
        help="close a connection after so many seconds without a message",
    )


def apart(arguments: argparse.Namespace) -> bool:
    """Whether the policy runs in other processes than this one."""
    return bool(arguments.replicas) or arguments.ray is not None


def engine_from(
    arguments: argparse.Namespace,
    make: Callable[[], ServedPolicy],
    *,
    execute: int | None = None,
    weights: str | None = None,
) -> Engine:
    """The engine that the options of `engine_options` describe.

    Args:
        arguments: as parsed.
        make: gives the policy; picklable where `--replicas` or `--ray` is used.
        execute: steps of a chunk that clients carry out per answer; None: all.
        weights: fingerprint of the policy, which a receipt has to be of; None: not compared.

    Raises:
        ValueError: options that do not fit each other.
    """
    deadline = None if arguments.deadline_ms is None else arguments.deadline_ms / 1000
    ladder = None
    if arguments.ladder is not None:
        if deadline is None:
            raise ValueError("--ladder: say with --deadline-ms what answers must not exceed, too")
        ladder = Ladder.read(arguments.ladder, deadline, weights=weights)
    if arguments.replicas < 0:
        raise ValueError(f"--replicas {arguments.replicas}: expected 0 or more")
    for name in ("deadline_ms", "wait_ms", "watchdog_s", "idle_s", "ray_gpus"):
        value = getattr(arguments, name)
        if value is not None and not 0 <= value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} {value}: expected a number of 0 or more")
    if arguments.ray is not None:
        importlib.import_module("ray")
    on_ray = partial(OnRay, address=arguments.ray, gpus=arguments.ray_gpus)
    return Engine(
        make if apart(arguments) else make(),
        Limits(
            text=arguments.max_text,
            pixels=arguments.max_pixels,
            episodes=arguments.max_episodes,
            connections=arguments.max_connections,
            idle_s=arguments.idle_s,
        ),
        deadline_s=deadline,
        ladder=ladder,
        batch=arguments.batch,
        wait_s=arguments.wait_ms / 1000,
        execute=execute,
        watchdog_s=arguments.watchdog_s,
        replicas=max(arguments.replicas, 1),
        apart=Apart if arguments.ray is None else on_ray,
        log=None if arguments.rerun is None else RerunLog(arguments.rerun),
    )
