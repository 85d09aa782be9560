"""`vla-pruner eval`: one policy in one suite, with all or with few of its visual tokens."""

from __future__ import annotations

import argparse

from vla_pruner.evaluation.episode import Condition
from vla_pruner.evaluation.suites import PICK_PLACE, SUITES
from vla_pruner.evaluation.sweep import Cell, add_run_arguments, run_command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `vla-pruner eval`."""
    parser.add_argument("--policy", default="mini-oft", help="shipped here, or a folder")
    parser.add_argument("--method", default="none", help="see `vla-pruner methods`")
    parser.add_argument(
        "--keep", help="how many visual tokens stay: a fraction such as 0.25, or a number"
    )
    parser.add_argument(
        "--conditions",
        help="instead of --method and --keep, several, such as none,vla-pruner@0.25:window=1",
    )
    parser.add_argument("--suite", default=PICK_PLACE, help=", ".join(SUITES))
    parser.add_argument("--episodes", type=int, default=50, help="scenes")
    parser.add_argument("--seed", type=int, default=0, help="number of the first held-out scene")
    add_run_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run the episodes that are missing in `--out`."""
    if args.conditions and (args.method != "none" or args.keep):
        raise ValueError("--conditions: give either this, or --method and --keep")
    one = args.method if args.keep is None else f"{args.method}@{args.keep}"
    conditions = [Condition.parse(text) for text in (args.conditions or one).split(",")]
    if len({condition.name for condition in conditions}) < len(conditions):
        raise ValueError(f"--conditions {args.conditions}: need different conditions")
    cells = [
        Cell(args.policy, args.suite, condition, args.episodes, args.seed)
        for condition in conditions
    ]
    return run_command(args, cells)
