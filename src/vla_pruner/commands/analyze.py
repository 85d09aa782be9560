"""`vla-pruner analyze`: what a policy looks at, and what each method would keep of it."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from torch import nn

from vla_pruner._arguments import at_least
from vla_pruner.analysis.oracle import Oracle
from vla_pruner.analysis.page import write_page
from vla_pruner.analysis.record import Trace, Way, trace
from vla_pruner.analysis.tables import agreement_rows, forecast_rows, overlap_rows, step_rows
from vla_pruner.commands.shared.options import (
    add_device,
    add_keeps,
    add_methods,
    add_out,
    add_policy,
    add_resume,
    add_scenes,
    add_suite,
    add_unnorm_key,
    device_of,
    keep_of,
    words_of,
)
from vla_pruner.commands.shared.output_folder import check_folder, prepare_folder
from vla_pruner.commands.shared.progress import progress_bar
from vla_pruner.episodes.condition import ALL_TOKENS, Condition, make_method
from vla_pruner.measure.doctor import check_budget
from vla_pruner.measure.environment import stamp
from vla_pruner.models.loading import load
from vla_pruner.models.prune import prune
from vla_pruner.pruning.history import Censored
from vla_pruner.reports.files import to_csv, write_text
from vla_pruner.runs.job import Setup
from vla_pruner.scenes.scene import Suite
from vla_pruner.scenes.suites import open_suite

WATCHED = 3
SETUP = "setup.json"
TRACES = "traces"
ORACLE = "oracle"
INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `vla-pruner analyze`."""
    add_policy(parser)
    add_suite(parser)
    add_methods(parser, ["vla-pruner", "fastv"])
    add_keeps(parser, ["0.25"])
    parser.add_argument(
        "--layer",
        type=at_least(1),
        help="K, for all methods: tokens are cut before it, scores read in the layer before that "
        f"(default: each method's own; scores of all tokens are read before layer {WATCHED})",
    )
    add_scenes(parser, 4)
    add_device(parser)
    add_unnorm_key(parser)
    parser.add_argument(
        "--oracle",
        action="store_true",
        help="also search the best patches of every call: thousands of forward passes each",
    )
    parser.add_argument(
        "--stride",
        type=at_least(1),
        default=1,
        help="patches that the oracle's search adds per round: 5 takes a fifth of the time",
    )
    add_out(parser, "analysis", "folder for the page")
    add_resume(parser)


def run(args: argparse.Namespace) -> int:
    """Run the episodes, write the page and the CSV files; also what Ctrl-C leaves of them."""
    return analyze(args, open_suite(args.suite))


def analyze(args: argparse.Namespace, suite: Suite, console: Console | None = None) -> int:
    """`run` on any suite.

    Raises:
        ValueError: impossible arguments, or a folder that this must not write to.
    """
    console = console or Console()
    device_of(args.device)
    watched = args.layer or WATCHED
    methods, keeps = words_of("--methods", args.methods), words_of("--keep", args.keep)
    stride = args.stride if args.oracle else None
    named = ways(methods, keeps, layer=args.layer, oracle_stride=stride)
    budgets = [keep_of(word) for word in keeps]
    seeds = suite.held_out(args.episodes, args.seed)
    check_folder(args.out)
    with console.status(f"loading {args.policy}"):
        policy = load(args.policy, device=args.device)
    setup = Setup.of(args.policy, policy, suite, unnorm_key=args.unnorm_key)
    _check(named, policy)
    prepare_folder(args.out, SETUP, "analysis", resume=args.resume)
    with console.status("opening the simulator"):
        scene = suite.open_scene()
    interrupted = False
    try:
        about = {
            **setup.as_dict(),
            "layer": args.layer,
            "watched": watched,
            "replays": list(named),
            "stride": stride,
        }
        _same_setup(args.out / SETUP, about)
        traces = _stored(args.out, seeds)
        with progress_bar(console) as bar:
            line = bar.add_task("episodes", total=len(seeds), completed=len(traces))
            for seed in seeds:
                if seed in traces:
                    continue
                target = suite.task_of(seed)
                traces[seed] = trace(
                    policy, scene, seed, target, setup=setup, layer=watched, ways=named
                )
                traces[seed].save(_file(args.out, seed))
                bar.advance(line)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        scene.close()
    finished = [traces[seed] for seed in seeds if seed in traces]
    write_report(args.out, finished, budgets, setup, command=command_of(args), planned=len(seeds))
    if interrupted:
        console.print(
            f"Interrupted after {len(finished)} of {len(seeds)} episodes. "
            f"Continue with: {command_of(args)} --resume",
            highlight=False,
        )
    page = (args.out / "index.html").resolve().as_uri()
    console.print(f"Analysis: {page}", highlight=False, soft_wrap=True)
    return INTERRUPTED if interrupted else 0


def _check(named: Mapping[str, Way], policy: nn.Module) -> None:
    """Refuse what cannot prune the policy, by name, before anything is run (ValueError)."""
    for name, way in named.items():
        if isinstance(way, Oracle):
            way = make_method("random", keep=way.keep, layer=way.layer)
        try:
            with prune(policy, way) as session:
                check_budget(session)
        except (ValueError, NotImplementedError) as error:
            raise ValueError(f"{name}: {error}") from error


def ways(
    methods: Sequence[str],
    keeps: Sequence[str],
    *,
    layer: int | None,
    oracle_stride: int | None = None,
) -> dict[str, Way]:
    """What is replayed, by name: each method at each budget, and VLA-Pruner's kinds of memory.

    Args:
        methods, keeps: names and budgets, as on the command line.
        layer: K, for all of them; None: each method's own.
        oracle_stride: patches that the oracle adds per round; None: no oracle.

    Raises:
        ValueError: an unknown method, an impossible budget or layer, or one that is named twice.
    """
    if not methods or not keeps:
        raise ValueError("name at least one method and one amount to keep")
    if ALL_TOKENS in methods:
        raise ValueError(f"--methods {ALL_TOKENS}: the full policy is always there; leave it out")
    names = [Condition.parse(f"{m}@{keep}").name for keep, m in product(keeps, methods)]
    if len(set(names)) < len(names):
        raise ValueError(f"need different methods and amounts, got {', '.join(names)}")
    result: dict[str, Way] = {}
    for keep in map(keep_of, keeps):
        for method in methods:
            result[f"{method}@{keep}"] = make_method(method, keep=keep, layer=layer)
        if "vla-pruner" in methods:
            for rule in (rule for rule in get_args(Censored) if rule != "zero"):
                way = make_method("vla-pruner", keep=keep, layer=layer, censored=rule)
                result[f"vla-pruner ({rule})@{keep}"] = way
        if oracle_stride is not None:
            result[f"{ORACLE}@{keep}"] = Oracle(
                keep=keep, layer=layer or WATCHED, stride=oracle_stride
            )
    return result


def command_of(args: argparse.Namespace) -> str:
    """What to type to get the same analysis."""
    words = ["vla-pruner", "analyze", "--policy", str(args.policy), "--methods", *args.methods]
    words += ["--keep", *args.keep, "--episodes", str(args.episodes)]
    words += ["--layer", str(args.layer)] if args.layer is not None else []
    words += ["--seed", str(args.seed), "--suite", args.suite]
    words += ["--unnorm-key", args.unnorm_key] if args.unnorm_key else []
    words += ["--oracle", "--stride", str(args.stride)] if args.oracle else []
    return shlex.join([*words, "--out", str(args.out)])


def write_report(
    out: Path,
    traces: Sequence[Trace],
    keeps: Sequence[float | int],
    setup: Setup,
    *,
    command: str,
    planned: int,
) -> None:
    """Write `index.html`, and `steps`, `overlaps`, `forecasts` and `agreement` as CSV."""
    steps = step_rows(traces, keeps)
    tables = {
        "steps": steps,
        "overlaps": overlap_rows(steps),
        "forecasts": forecast_rows(traces, keeps),
        "agreement": agreement_rows(traces, keeps),
    }
    for name, rows in tables.items():
        write_text(out / f"{name}.csv", to_csv(rows))
    environment = {name: value for name, value in stamp().items() if value is not None}
    facts = {
        "policy": f"{setup.policy}, weights {setup.weights}",
        "scenes": ", ".join(str(one.seed) for one in traces) or "none",
        "solved on all tokens": f"{sum(one.success for one in traces)} of {len(traces)}",
        **environment,
    }
    cameras = setup.control.cameras
    write_page(
        out / "index.html",
        traces,
        tables,
        cameras=cameras,
        facts=facts,
        command=command,
        planned=planned,
    )


def _file(out: Path, seed: int) -> Path:
    return out / TRACES / f"{seed}.npz"


def _stored(out: Path, seeds: Sequence[int]) -> dict[int, Trace]:
    return {seed: Trace.load(_file(out, seed)) for seed in seeds if _file(out, seed).exists()}


def _same_setup(path: Path, about: dict[str, Any]) -> None:
    """Note how the episodes are run, or check that it is how they were.

    Raises:
        ValueError: another setup than before.
    """
    about = json.loads(json.dumps(about))
    if not path.exists():
        write_text(path, json.dumps(about, indent=1) + "\n")
        return
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); choose another folder") from error
    if found != about:
        names = [name for name in about if found.get(name) != about[name]]
        raise ValueError(
            f"{path.parent} holds episodes of another {', '.join(names) or 'version'}; continue "
            "with the same one, or choose another folder with --out"
        )
