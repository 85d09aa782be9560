"""`vla-pruner tune`: which budget is safe, from recorded observations, without a simulator."""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import nn

from vla_pruner._arguments import a_path, above_0, at_least
from vla_pruner.commands.shared.options import (
    add_control,
    add_device,
    add_keeps,
    add_methods,
    add_out,
    device_of,
    keep_of,
    words_of,
)
from vla_pruner.commands.shared.output_folder import check_folder
from vla_pruner.commands.shared.progress import progress_bar
from vla_pruner.episodes.control import gripper_of, said_by, statistics_of
from vla_pruner.measure.timing import keep_freed_memory
from vla_pruner.models.loading import load, locate
from vla_pruner.runs.job import fingerprint
from vla_pruner.scenes.scene import Suite
from vla_pruner.scenes.suites import open_suite
from vla_pruner.tuning.deviation import check_gripper
from vla_pruner.tuning.receipt import receipt_of, save_receipt
from vla_pruner.tuning.sources import (
    Source,
    is_dataset,
    open_source,
    record_source,
    suite_of,
    with_key,
)
from vla_pruner.tuning.tune import Row, Tuning, conditions_of, tune

RECEIPT, PICTURE, OBSERVATIONS = "receipt.json", "tune.png", "observations"
TOLERANCE = 0.1
"""Mean deviation, in spreads of the action, that is accepted unless another is asked for."""
WIDE = 118


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `vla-pruner tune`."""
    parser.add_argument(
        "policy",
        nargs="?",
        default="mini-oft",
        metavar="POLICY",
        help="a policy that ships here, a folder, or a hub id",
    )
    parser.add_argument(
        "--observations",
        type=a_path,
        metavar="SOURCE",
        help="recorded episodes: a folder of .npz files (docs/methods/fitprune.md), or a "
        "LeRobotDataset v2.1 or v3.0; default: record some in the simulator that the policy was "
        "made for",
    )
    add_methods(parser, ["vla-pruner"])
    add_keeps(parser, ["0.5", "0.25", "0.125"])
    parser.add_argument(
        "--tolerance",
        type=above_0,
        default=TOLERANCE,
        help="mean deviation of the actions that is accepted, in units of their spread",
    )
    parser.add_argument("--episodes", type=int, default=6, help="at most so many, evenly spread")
    parser.add_argument(
        "--calls", type=at_least(1), default=60, help="at most so many of each episode"
    )
    parser.add_argument(
        "--cameras", nargs="+", help="of a LeRobotDataset, in the policy's order (default: its own)"
    )
    parser.add_argument("--instruction", help="for datasets that do not say what was asked for")
    parser.add_argument(
        "--gripper-dims",
        nargs="*",
        type=int,
        default=[-1],
        help="dimensions of an action that open and close; none: no such dimension",
    )
    add_control(parser)
    add_device(parser)
    parser.add_argument("--threads", type=at_least(1, most=4096), default=1, help="of the CPU")
    parser.add_argument(
        "--rounds",
        type=at_least(0),
        default=5,
        help="replays behind each latency; 0: none is measured",
    )
    parser.add_argument("--timed", type=at_least(1), default=2, help="episodes that are timed")
    add_out(parser, "tune-report", "folder for receipt.json, tune.png and what was recorded")


def run(args: argparse.Namespace) -> int:
    """Replay, compare, print, write."""
    return tune_command(args)


def tune_command(
    args: argparse.Namespace,
    *,
    console: Console | None = None,
    find_suite: Callable[[str], Suite] = open_suite,
    open_policy: Callable[[str], Any] | None = None,
) -> int:
    """`run` with any suite and policy.

    Raises:
        ValueError: impossible arguments, or a source that does not fit the policy.
        FileNotFoundError: nothing to replay.
    """
    console = console or Console()
    for name, least in (("episodes", 1), ("calls", 1), ("threads", 1), ("timed", 1), ("rounds", 0)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name} {getattr(args, name)}: must be at least {least}")
    keeps = [keep_of(word) for word in words_of("--keep", args.keep)]
    conditions = conditions_of(words_of("--methods", args.methods), keeps)
    if args.observations is not None:
        is_dataset(args.observations, args.cameras)
    elif args.cameras or args.instruction is not None:
        raise ValueError("--cameras and --instruction say how to read a dataset: --observations")
    _check_out(args.out)
    check_folder(args.out)
    folder = Path(locate(args.policy))
    check_gripper(args.gripper_dims, _numbers_of_an_action(folder))
    device = device_of(args.device)
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    with console.status(f"loading {args.policy}"):
        policy = (open_policy or _load(device))(args.policy)
    if not hasattr(policy, "predict_action"):
        raise ValueError(f"{args.policy} is no policy: it has no `predict_action`")
    check_gripper(args.gripper_dims, getattr(policy.config, "action_dim", None))
    said = said_by(folder)
    chunk = int(getattr(policy.config, "chunk", 1))
    execute = args.execute or int(said.get("execute", min(2, chunk)))
    if not 1 <= execute <= chunk:
        raise ValueError(f"--execute {execute}: a chunk of this policy has {chunk} actions")
    key = statistics_of(policy, args.unnorm_key, folder=folder)
    written = args.gripper or gripper_of(policy, said, key, otherwise="robosuite")
    source, seen = _source(args, policy, said, execute, console, find_suite)
    source = with_key(source, key)
    with progress_bar(console) as bar:
        line = bar.add_task("replaying", total=None)
        found = tune(
            policy,
            conditions,
            source,
            execute=execute,
            tolerance=args.tolerance,
            gripper=args.gripper_dims,
            threshold=0.5 if written == "rlds" else 0.0,
            rounds=args.rounds,
            timed=args.timed,
            on_start=lambda total: bar.update(line, total=total),
            tick=lambda: bar.advance(line),
        )
    values = receipt_of(
        found,
        source,
        policy=args.policy,
        weights=fingerprint(policy),
        device=str(device),
        unnorm_key=key,
        seen=seen,
    )
    args.out.mkdir(parents=True, exist_ok=True)
    save_receipt(values, args.out / RECEIPT)
    _show(console, found, source, args)
    return 0


def _load(device: torch.device) -> Callable[[str], nn.Module]:
    return lambda name: load(name, device=device)


def _numbers_of_an_action(folder: Path) -> int | None:
    """What a policy's config.json says, before its weights are read; None: nothing."""
    file = folder / "config.json"
    if not file.is_file():
        return None
    try:
        config = json.loads(file.read_text("utf-8"))
        if shape := config.get("output_features", {}).get("action", {}).get("shape"):
            return int(shape[0])
        actions = [dataset["action"] for dataset in config.get("norm_stats", {}).values()]
        return min((len(one.get("q01") or one["min"]) for one in actions), default=None)
    except (ValueError, TypeError, KeyError, AttributeError):
        return None  # whatever is damaged there, loading names it


def _check_out(out: Path) -> None:
    """Refuse a folder that holds something else (ValueError)."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; name a folder")
    ours = {RECEIPT, PICTURE, OBSERVATIONS}
    if out.exists() and (other := {path.name for path in out.iterdir()} - ours):
        raise ValueError(f"--out {out} holds something else ({min(other)}); name another folder")


def _source(
    args: argparse.Namespace,
    policy: nn.Module,
    said: Any,
    execute: int,
    console: Console,
    find_suite: Callable[[str], Suite],
) -> tuple[Source, str]:
    """Episodes to replay, and where they are from, for people."""
    if args.observations is not None:
        with console.status(f"reading {args.observations}"):
            source = open_source(
                args.observations,
                policy,
                episodes=args.episodes,
                calls=args.calls,
                execute=execute,
                cameras=args.cameras,
                instruction=args.instruction,
            )
        return source, args.observations.resolve().name
    suite = find_suite(suite_of(args.policy, said))
    with progress_bar(console) as bar:
        line = bar.add_task(f"recording episodes of {suite.name}", total=args.episodes)
        source = record_source(
            policy,
            args.policy,
            suite,
            args.out / OBSERVATIONS,
            episodes=args.episodes,
            calls=args.calls,
            tick=lambda: bar.advance(line),
            execute=args.execute,
            gripper=args.gripper,
            unnorm_key=args.unnorm_key,
        )
    return source, suite.name


# -- what is shown ---------------------------------------------------------------------------------


def _show(console: Console, found: Tuning, source: Source, args: argparse.Namespace) -> None:
    console.print(table(found, wide=console.width >= WIDE))
    if len(found.scale.spread) <= 16 and console.width >= WIDE:
        console.print(dimensions(found))
    for line in notes(found, source):
        console.print(line, highlight=False, markup=False)
    if importlib.util.find_spec("matplotlib") is None:
        console.print("no picture: it needs matplotlib (pip install 'vla-pruner[tune]')")
    else:
        from vla_pruner.tuning.picture import draw

        draw(found, args.out / PICTURE, f"{args.policy}: {source.calls} recorded calls")
    console.print(f"written to {args.out}", highlight=False, markup=False, soft_wrap=True)


def table(found: Tuning, *, wide: bool) -> Table:
    """A row for each condition; `wide` shows all columns."""
    columns: dict[str, Callable[[Row], str]] = {
        "visual tokens": lambda row: row.condition.label,
        "kept": lambda row: f"{row.visual[1]:.0f}",
        "deviation": _deviation,
        "p90": lambda row: f"{row.deviation.p90:.3f}",
        "worst": lambda row: f"{row.deviation.worst:.2f}",
        "gripper flips": lambda row: f"{100 * row.deviation.flips:.1f} %",
        "warm-up": lambda row: f"{100 * row.deviation.warm_up:.0f} %",
        "FLOPs": lambda row: f"{100 * row.flops:.0f} %",
        "call ms": lambda row: "-" if row.latency is None else f"{row.latency.p50_ms:.1f}",
        "p99": lambda row: "-" if row.latency is None else f"{row.latency.p99_ms:.1f}",
        "speed-up": lambda row: "-" if row.latency is None else f"{row.latency.speedup:.2f}",
        "": lambda row: "within" if row.allowed else "[red]beyond[/red]",
    }
    hidden = () if wide else ("p90", "worst", "warm-up", "p99", "kept")
    made = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in (name for name in columns if name not in hidden):
        made.add_column(name, justify="left" if name == "visual tokens" else "right")
    for row in found.rows:
        made.add_row(*(cell(row) for name, cell in columns.items() if name not in hidden))
    return made


def _deviation(row: Row) -> str:
    found = row.deviation
    if found.low is None or found.mean == 0:
        return f"{found.mean:.3f}"
    return f"{found.mean:.3f} ({found.low:.3f}-{found.high:.3f})"


def dimensions(found: Tuning) -> Table:
    """Mean deviation of each dimension in its spread; the first row is the spread, robot units."""
    made = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), title="by dimension", title_justify="left")
    made.add_column("")
    for number in range(len(found.scale.spread)):
        made.add_column(str(number), justify="right")
    made.add_row("spread, robot units", *(f"{value:.3g}" for value in found.scale.spread))
    for row in found.rows[1:]:
        made.add_row(row.condition.label, *(f"{one:.3f}" for one in row.deviation.by_dimension))
    return made


def notes(found: Tuning, source: Source) -> list[str]:
    """The answer in a few sentences, and what it rests on."""
    best = found.recommended
    lines = []
    if best.condition.keep is None:
        lines.append(f"Keep all tokens: no budget stays within a deviation of {found.tolerance:g}.")
    else:
        gain = best.latency
        fast = "" if gain is None else f", {gain.speedup:.2f} times as fast with its warm-up"
        lines.append(
            f"Recommended: {best.condition.label} ({best.condition.name}), the cheapest within a "
            f"deviation of {found.tolerance:g}: {100 * best.flops:.0f} % of the FLOPs{fast}."
        )
        if gain is not None and gain.interval is None:
            lines.append("Timed only once: more --rounds say whether that is so.")
        elif gain is not None and gain.interval is not None and gain.interval.low <= 1:
            lines.append("That is not reliably faster on this machine: keep all tokens here.")
        lost, low, high = (100 * value for value in astuple(best.expected))
        lines.append(
            f"Conditions with such a deviation lost {lost:.0f} % of the success of the policies "
            f"that ship here, nine of ten between {low:.0f} and {high:.0f} %; yours may lose more "
            "(docs/tune.md)."
        )
    if len(source.episodes) < 4:
        count = len(source.episodes)
        many = "1 episode was" if count == 1 else f"{count} episodes were"
        lines.append(f"Only {many} replayed; six or more say more.")
    if found.recorded is not None:
        lines.append(
            f"The unpruned policy is {found.recorded:.2f} spreads from the recorded actions; much "
            "more than 1 would mean other cameras, units or statistics."
        )
    return lines
