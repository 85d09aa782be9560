"""`vla-pruner eval`: one policy in one suite, with all or with few of its visual tokens."""

from __future__ import annotations

import argparse

from vla_pruner.commands.runs.running import add_run_arguments, run_command
from vla_pruner.commands.shared.options import (
    add_keep,
    add_method,
    add_policy,
    add_scenes,
    add_suite,
    condition_of,
    conditions_of,
)
from vla_pruner.runs.matrix import Cell


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `vla-pruner eval`."""
    add_policy(parser)
    add_method(parser, "none")
    add_keep(parser)
    parser.add_argument(
        "--conditions",
        nargs="+",
        help="instead of --method and --keep, several, apart by spaces or commas, such as "
        "none,vla-pruner@0.25:window=1",
    )
    add_suite(parser)
    add_scenes(parser, 50)
    add_run_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run the episodes that are missing in `--out`."""
    if args.conditions and (args.method != "none" or args.keep):
        raise ValueError("--conditions: give either this, or --method and --keep")
    conditions = (
        conditions_of("--conditions", args.conditions)
        if args.conditions
        else [condition_of(args.method, args.keep)]
    )
    cells = [
        Cell(args.policy, args.suite, condition, args.episodes, args.seed)
        for condition in conditions
    ]
    return run_command(args, cells)
