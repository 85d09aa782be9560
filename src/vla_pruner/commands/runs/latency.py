"""`vla-pruner latency`: time the conditions of a run apart, on recorded observations, in turn."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from vla_pruner._short import short
from vla_pruner.commands.shared.options import add_device, at_least, device_of
from vla_pruner.commands.shared.progress import progress_bar
from vla_pruner.measure.environment import stamp
from vla_pruner.measure.timing import keep_freed_memory
from vla_pruner.models.loading import load
from vla_pruner.runs.job import Planned, Setup
from vla_pruner.runs.plan import settings_of
from vla_pruner.runs.replay import Recorded, measure, read_recorded, recorded
from vla_pruner.runs.runner import Policies
from vla_pruner.runs.store import Store
from vla_pruner.scenes.suites import open_suite


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `vla-pruner latency`."""
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="what eval or sweep wrote to")
    parser.add_argument("--rounds", type=int, default=7, help="how often everything is replayed")
    parser.add_argument(
        "--scenes",
        type=at_least(1),
        default=2,
        help="episodes to record, on all tokens, of the first scenes of each suite; those that are "
        "in RUN/observations already are not recorded again",
    )
    parser.add_argument(
        "--calls",
        type=at_least(1),
        default=40,
        help="at most so many calls of each recorded episode",
    )
    parser.add_argument(
        "--observations",
        type=Path,
        help="replay the .npz files of this folder instead (format: docs/methods/fitprune.md); "
        "needs no simulator",
    )
    add_device(parser)
    parser.add_argument("--threads", type=at_least(1), default=1, help="of the CPU")


def run(args: argparse.Namespace) -> int:
    """Measure every policy and suite of a run, and keep the replays beside its episodes.

    Raises:
        ValueError: impossible arguments, no episodes, or other weights than those of the run.
        OSError: the disk is full.
    """
    device_of(args.device)
    for name in ("rounds", "scenes", "calls", "threads"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: must be at least 1")
    Store(args.run_folder).close()  # Raises: there is nothing to read.
    console = Console()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    with Store(args.run_folder, write=True) as store:
        groups: dict[Setup, list[Planned]] = {}
        for item in store.planned():
            groups.setdefault(item.setup, []).append(item)
        policies = Policies(partial(load, device=args.device))
        for setup in sorted(groups, key=lambda setup: setup.policy):
            policy = policies.get(setup)
            seen = _recorded(args, policy, setup, groups[setup], console)
            _measure_group(args, store, policy, setup, groups[setup], seen, console)
    command = f"vla-pruner report {shlex.quote(str(args.run_folder))}"
    console.print(f"Report: {command}", highlight=False, markup=False, soft_wrap=True)
    return 0


def _recorded(
    args: argparse.Namespace,
    policy: nn.Module,
    setup: Setup,
    items: Sequence[Planned],
    console: Console,
) -> list[Recorded]:
    """The observations to replay, recorded first where they are missing."""
    if args.observations is not None:
        paths = sorted(args.observations.glob("*.npz"))
        if not paths:
            raise FileNotFoundError(f"no observations (*.npz) in {short(str(args.observations))}")
        return read_recorded(paths, args.calls)
    suite = open_suite(setup.suite)
    seeds = suite.held_out(args.scenes, items[0].first)
    with console.status(f"recording episodes of {setup.suite}"):
        return recorded(args.run_folder, policy, suite, setup, seeds, args.calls)


def _measure_group(
    args: argparse.Namespace,
    store: Store,
    policy: nn.Module,
    setup: Setup,
    items: Sequence[Planned],
    seen: Sequence[Recorded],
    console: Console,
) -> None:
    """Replay, then keep everything at once in place of what was measured before."""
    now = []
    for item in items:
        settings, recipe = settings_of(item.condition, policy)
        now.append(replace(item, settings=settings, recipe=recipe))
    store.begin(now, stamp(args.device))  # Raises: settings differ from those of the episodes.
    total = args.rounds * len(seen) * len(items)
    with progress_bar(console) as bar:
        line = bar.add_task(f"{setup.policy} in {setup.suite}", total=total)
        conditions = [item.condition for item in items]
        found = measure(policy, conditions, seen, args.rounds, lambda: bar.advance(line))
    store.keep_replays(setup, found)
