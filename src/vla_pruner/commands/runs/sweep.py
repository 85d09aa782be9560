"""`vla-pruner sweep`: policies x methods x ratios x suites, into one run folder, resumable."""

from __future__ import annotations

import argparse

from vla_pruner._arguments import a_path
from vla_pruner.commands.runs.running import add_run_arguments, run_command
from vla_pruner.runs.matrix import read_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `vla-pruner sweep`."""
    parser.add_argument("config", type=a_path, help="YAML file; docs/evaluating.md describes it")
    add_run_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run the matrix of a file."""
    return run_command(args, read_config(args.config))
