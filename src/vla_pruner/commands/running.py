"""What `eval` and `sweep` share: arguments, what runs the episodes, how far they are."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console

from vla_pruner.commands.options import add_control, add_device, add_out, control_of
from vla_pruner.commands.progress import progress_bar
from vla_pruner.episodes.episode import Episode
from vla_pruner.runs.execute import Progress, run_cells
from vla_pruner.runs.job import Job, Planned
from vla_pruner.runs.matrix import Cell
from vla_pruner.runs.processes import Executor, Processes

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
        type=int,
        default=0,
        metavar="N",
        help="with --ray: N actors hold the policy, and the workers only simulators, which ask "
        "them; 0: every worker holds both",
    )
    parser.add_argument(
        "--gpus",
        type=float,
        help="with --ray: GPUs that an actor with a policy reserves, such as 0.5; default: 1 with "
        "--device cuda",
    )
    add_device(parser)
    parser.add_argument(
        "--time-limit",
        type=float,
        default=1800.0,
        help="seconds after which an episode's process is replaced and the episode begun anew",
    )
    parser.add_argument(
        "--video",
        type=int,
        default=0,
        metavar="N",
        help="write an mp4 of the first N episodes of each condition into OUT/videos, dropped "
        "patches dimmed; episodes that had finished before are not repeated for it",
    )
    add_control(parser)


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
    """Run cells as the arguments say; print how to go on. Returns the exit code."""
    console = Console()
    with Bar(console) as progress:
        complete = run_cells(
            cells,
            args.out,
            open_executor(args),
            control=control_of(args),
            videos=args.video,
            progress=progress,
        )
    if not complete:
        console.print("Interrupted. The same command continues.", highlight=False)
    console.print(f"Report: vla-pruner report {args.out}", highlight=False, soft_wrap=True)
    return 0 if complete else INTERRUPTED


class Bar(Progress):
    """A bar of all episodes, from when they are planned until the block is left."""

    def __init__(self, console: Console) -> None:
        self._bar = progress_bar(console)

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def planned(self, cells: Sequence[Planned], missing: Sequence[Job]) -> None:
        """Show the bar."""
        total = sum(item.episodes for item in cells)
        self._line = self._bar.add_task("episodes", total=total, completed=total - len(missing))
        self._bar.start()

    def finished(self, job: Job, episode: Episode) -> None:
        """One more."""
        self._bar.advance(self._line)
