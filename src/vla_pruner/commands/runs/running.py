"""What `eval` and `sweep` share: arguments, what runs the episodes, how far they are."""

from __future__ import annotations

import argparse
import math
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

from rich.console import Console

from vla_pruner._short import word
from vla_pruner.commands.shared.options import (
    above_0,
    add_capture,
    add_control,
    add_device,
    add_out,
    at_least,
    control_of,
    device_of,
    words_of,
)
from vla_pruner.commands.shared.progress import RunProgress
from vla_pruner.episodes.condition import Condition
from vla_pruner.reports.compare import read_runs
from vla_pruner.reports.terminal import table
from vla_pruner.runs.execute import run_cells
from vla_pruner.runs.matrix import Cell
from vla_pruner.runs.processes import EpisodesFailed, Executor, Processes
from vla_pruner.runs.store import Store
from vla_pruner.scenes.clock import Pace
from vla_pruner.scenes.perturb import PERTURBATIONS

INTERRUPTED = 130


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Where and how to run episodes, for `eval` and `sweep`."""
    add_out(parser, None, "run folder; resumed if it exists")
    parser.add_argument("--workers", type=int, default=2, help="processes, or actors of Ray")
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="run in this Ray cluster; `auto` is the one that this machine belongs to",
    )
    parser.add_argument(
        "--policy-actors",
        type=at_least(0),
        default=0,
        metavar="N",
        help="with --ray: N actors hold the policy, and the workers only simulators, which ask "
        "them; 0: every worker holds both",
    )
    parser.add_argument(
        "--gpus",
        type=at_least(0, float),
        help="with --ray: GPUs that an actor with a policy reserves, such as 0.5; default: 1 with "
        "--device cuda",
    )
    add_device(parser)
    parser.add_argument(
        "--time-limit",
        type=at_least(0.001, float),
        default=1800.0,
        help="seconds after which an episode's process is replaced and the episode begun anew",
    )
    parser.add_argument(
        "--video",
        type=at_least(0),
        default=0,
        metavar="N",
        help="write an mp4 of the first N episodes of each condition into OUT/videos, dropped "
        "patches dimmed; episodes that had finished before are not repeated for it",
    )
    parser.add_argument(
        "--drop",
        nargs="+",
        default=[],
        metavar="CONDITION",
        help="delete what the run folder holds of these conditions first, such as one that cannot "
        "be run; `vla-pruner report --without` only leaves them out",
    )
    add_control(parser)
    add_capture(parser)
    _add_changes(parser)


def _add_changes(parser: argparse.ArgumentParser) -> None:
    """What is changed of the suites: time that does not wait, another look."""
    parser.add_argument(
        "--live",
        nargs="?",
        type=above_0,
        const=0.0,
        metavar="HZ",
        help="the simulator goes on while the policy computes, HZ steps a second (default: the "
        "suite's own rate); the robot holds still until the actions are there",
    )
    parser.add_argument(
        "--latency",
        nargs="+",
        default=[],
        metavar="MS",
        help="with --live: how long a call takes, whatever it takes here; several give a curve",
    )
    parser.add_argument(
        "--latency-of",
        metavar="FILE",
        help="with --live: latencies of each condition, from the report.csv of a run that "
        "`vla-pruner latency` timed, or from JSON that maps conditions to ms",
    )
    parser.add_argument(
        "--pace",
        choices=get_args(Pace),
        default="wait",
        help="with --live: wait holds still during every call; ahead begins the next call before "
        "the chunk ends, and leaves out actions of the past; rtc continues the running chunk (flow "
        "policies), rtc-full with the policy's Jacobian",
    )
    parser.add_argument(
        "--perturb",
        nargs="+",
        default=[],
        metavar="NAME",
        help=f"robosuite_pickplace with a change: {', '.join(PERTURBATIONS)}; none is without, all "
        "is every one and none",
    )


def changes_of(args: argparse.Namespace) -> list[str]:
    """What the arguments add to the names of suites, such as `+camera` and `+live5:200ms`.

    Raises:
        ValueError: arguments that do not go together.
    """
    perturb = words_of("--perturb", args.perturb) if args.perturb else ["none"]
    if perturb == ["all"]:
        perturb = ["none", *PERTURBATIONS]
    latencies = words_of("--latency", args.latency) if args.latency else []
    if args.live is None:
        if latencies or args.latency_of or args.pace != "wait":
            raise ValueError("--latency, --latency-of and --pace say what --live does; add --live")
        live = [""]
    else:
        if latencies and args.latency_of:
            raise ValueError("--latency and --latency-of: give one of them")
        given = [f":{_ms(latency)}ms" for latency in latencies]
        given = given or [f":{args.latency_of}" if args.latency_of else ""]
        pace = "" if args.pace == "wait" else f":{args.pace}"
        rate = f"{args.live:g}" if args.live else ""
        live = [f"+live{rate}{one}{pace}" for one in given]
    looks = ["" if name == "none" else f"+{name}" for name in perturb]
    return [look + clock for look in looks for clock in live]


def _ms(said: str) -> str:
    ms = said.removesuffix("ms")
    try:
        known = 0 <= float(ms) < math.inf
    except ValueError:
        known = False
    if not known:
        raise ValueError(f"--latency {word(said)}: milliseconds of 0 or more, such as 200")
    return ms


def open_executor(args: argparse.Namespace) -> Executor:
    """What runs the episodes: processes of this machine, or actors of a Ray cluster."""
    if args.ray is None:
        if args.policy_actors or args.gpus is not None:
            raise ValueError("--policy-actors and --gpus are for a Ray cluster: add --ray auto")
        return Processes(args.workers, args.time_limit, args.device)
    from vla_pruner.runs.ray import RayActors

    gpus = args.gpus
    if gpus is None:
        gpus = 0 if args.device == "cpu" else 1
    return RayActors(args.ray, args.workers, args.time_limit, args.device, gpus, args.policy_actors)


def run_command(args: argparse.Namespace, cells: Sequence[Cell]) -> int:
    """Run cells as the arguments say; print the table, and how to go on. Returns the exit code."""
    console = Console()
    if args.ray is None:
        device_of(args.device)
    drop = words_of("--drop", args.drop) if args.drop else []
    cells = [
        replace(cell, suite=cell.suite + change) for change in changes_of(args) for cell in cells
    ]
    try:
        with RunProgress(console) as progress:
            complete = run_cells(
                cells,
                args.out,
                open_executor(args),
                control=control_of(args),
                videos=args.video,
                drop=[Condition.parse(word).name for word in drop],
                progress=progress,
            )
    except EpisodesFailed:
        show_tables(console, args.out, cells)
        raise
    show_tables(console, args.out, cells)
    if not complete:
        console.print("Interrupted. The same command continues.", highlight=False)
    command = f"vla-pruner report {shlex.quote(str(args.out))}"
    console.print(f"Report: {command}", highlight=False, markup=False, soft_wrap=True)
    return 0 if complete else INTERRUPTED


def show_tables(console: Console, out: Path, cells: Sequence[Cell]) -> None:
    """Success and cost of what the folder holds, for each policy and suite of the cells."""
    wanted = {(cell.policy, cell.suite) for cell in cells}
    with Store(out) as store:
        if not any(store.tally(item)[1] for item in store.planned()):
            return
    for group in read_runs([out]):
        if (group.setup.policy, group.setup.suite) in wanted:
            summary = group.summary()
            console.print(table(summary, group.title))
            if not summary.complete:
                missing = summary.planned - len(summary.episodes)
                console.print(f"{missing} episodes are missing", highlight=False)
