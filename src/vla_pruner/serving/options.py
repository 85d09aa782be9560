"""Options of whatever starts an engine, and the engine that they describe."""

from __future__ import annotations

import argparse
import importlib
import math
from collections.abc import Callable
from functools import partial

from vla_pruner._arguments import a_path, above_0, at_least, ray_address
from vla_pruner.reports.rerun_log import RerunLog
from vla_pruner.serving.engine import Engine
from vla_pruner.serving.ladder import Ladder
from vla_pruner.serving.limits import Limits
from vla_pruner.serving.policy import ServedPolicy
from vla_pruner.serving.worker import Apart, OnRay

DAY = 86_400
"""Seconds; longer times are slips of the keyboard, and some clocks cannot count them."""
WATCHDOG_S = 30.0


def engine_options(parser: argparse.ArgumentParser) -> None:
    """Options of the engine, for a command; `--deadline-ms` among them."""
    group = parser.add_argument_group("serving")
    group.add_argument(
        "--batch",
        type=at_least(1, most=4096),
        default=16,
        help="answer up to so many episodes in one pass",
    )
    group.add_argument(
        "--wait-ms",
        type=at_least(0, float, 10_000),
        default=3.0,
        help="how long a pass waits for clients that are known to come back at once",
    )
    group.add_argument(
        "--deadline-ms",
        type=at_least(1, float, 600_000),
        help="answer within this time, if need be with the rest of the last chunk (`late`)",
    )
    group.add_argument(
        "--ladder",
        type=a_path,
        metavar="RECEIPT",
        help="keep fewer tokens when answers come close to the deadline: a receipt of "
        "`vla-pruner tune`, whose allowed budgets are used",
    )
    group.add_argument(
        "--replicas",
        type=at_least(0, most=1024),
        default=0,
        metavar="N",
        help="run the policy in N processes, each replaced when it hangs or dies; an episode stays "
        "with its process (0: in a thread of this one, which nothing can replace)",
    )
    group.add_argument(
        "--ray",
        type=ray_address,
        metavar="ADDRESS",
        help="run the replicas (at least one) in actors of this Ray cluster, HOST:PORT or auto, "
        "instead of processes; the policy must be found under its name on every node",
    )
    group.add_argument(
        "--ray-gpus",
        type=at_least(0, float, 64),
        help="with --ray: GPUs that a replica reserves, a share of one or whole ones (default: 0)",
    )
    group.add_argument(
        "--watchdog-s",
        type=partial(above_0, most=DAY),
        help=f"with --replicas or --ray: seconds after which a pass counts as hung (default: "
        f"{WATCHDOG_S:g})",
    )
    group.add_argument(
        "--rerun",
        type=a_path,
        metavar="FILE",
        help="write images, kept tokens, scores, actions and latency of every answer to a Rerun "
        "file (.rrd); images are dropped first, and answers never wait for it",
    )
    default, count = Limits(), at_least(1, most=10**9)
    group.add_argument(
        "--max-text", type=count, default=default.text, help="bytes of an instruction"
    )
    group.add_argument(
        "--max-pixels", type=count, default=default.pixels, help="pixels of one image"
    )
    group.add_argument(
        "--max-episodes", type=count, default=default.episodes, help="episodes open at once"
    )
    group.add_argument(
        "--max-connections", type=count, default=default.connections, help="connections at once"
    )
    group.add_argument(
        "--idle-s",
        type=partial(above_0, most=7 * DAY),
        default=default.idle_s,
        help="close a connection after so many seconds without a message",
    )


def apart(arguments: argparse.Namespace) -> bool:
    """Whether the policy runs in other processes than this one."""
    return bool(arguments.replicas) or arguments.ray is not None


def check_engine(arguments: argparse.Namespace) -> None:
    """Refuse options that do not fit each other, and files that are none, before any is used.

    Raises:
        ValueError: which, and what to do.
        ImportError: Ray or Rerun is asked for, and not installed.
    """
    gpus = arguments.ray_gpus
    if arguments.ladder is not None:
        if arguments.deadline_ms is None:
            raise ValueError("--ladder: say with --deadline-ms what answers must not exceed, too")
        Ladder.read(arguments.ladder, arguments.deadline_ms / 1000)
    if arguments.watchdog_s is not None and not apart(arguments):
        raise ValueError(
            "--watchdog-s: nothing can replace the thread of this process; add --replicas or --ray"
        )
    if gpus is not None and arguments.ray is None:
        raise ValueError("--ray-gpus: say with --ray which cluster they are of")
    if gpus is not None and gpus > 1 and gpus % 1:
        raise ValueError(f"--ray-gpus {gpus:g}: Ray reserves a share of one GPU, or whole ones")
    if arguments.ray is not None:
        importlib.import_module("ray")
    if arguments.rerun is not None:
        importlib.import_module("rerun")


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
    check_engine(arguments)
    deadline = None if arguments.deadline_ms is None else arguments.deadline_ms / 1000
    ladder = None
    if arguments.ladder is not None:
        ladder = Ladder.read(arguments.ladder, deadline or math.inf, weights=weights)
    on_ray = partial(OnRay, address=arguments.ray, gpus=arguments.ray_gpus or 0.0)
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
        watchdog_s=arguments.watchdog_s or WATCHDOG_S,
        replicas=max(arguments.replicas, 1),
        apart=Apart if arguments.ray is None else on_ray,
        log=None if arguments.rerun is None else RerunLog(arguments.rerun),
    )
