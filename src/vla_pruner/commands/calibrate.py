"""`vla-pruner calibrate`: search a method's recipe on recorded observations."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from vla_pruner.calibration.search import METHODS, calibrate, check_request
from vla_pruner.commands.shared.options import (
    add_device,
    add_out,
    add_policy,
    add_unnorm_key,
    at_least,
    device_of,
)
from vla_pruner.commands.shared.output_folder import check_file
from vla_pruner.commands.shared.progress import progress_bar
from vla_pruner.episodes.control import Control, statistics_of
from vla_pruner.episodes.observations import Observations, read_observations, record_observations
from vla_pruner.methods.recipe import Recipe
from vla_pruner.models.loading import load, locate
from vla_pruner.scenes.scene import Suite
from vla_pruner.scenes.suites import pick_place

FIRST_SEED = 900_000
"""Training scenes from here on are recorded; the shipped policies did not learn from them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `vla-pruner calibrate`."""
    parser.add_argument("method", choices=METHODS, metavar="METHOD", help=", ".join(METHODS))
    add_policy(parser)
    add_device(parser)
    add_unnorm_key(parser)
    parser.add_argument(
        "--observations",
        type=Path,
        help="folder of .npz files with what the policy sees (format: docs/methods/fitprune.md)",
    )
    parser.add_argument(
        "--episodes",
        type=int,
        help="record this many episodes of the reference task first, of training scenes alone; "
        "into --observations, or beside --out. What was recorded before is not recorded again",
    )
    parser.add_argument("--first-seed", type=int, default=FIRST_SEED, help="first scene to record")
    parser.add_argument(
        "--keep",
        type=float,
        help="budget (fitprune, vtw): visual tokens may cost, over all layers, what keeping this "
        "share of them from one layer on would cost",
    )
    parser.add_argument(
        "--layer",
        type=at_least(0),
        default=3,
        help="that layer; 0: --keep is the share of the cost itself",
    )
    parser.add_argument(
        "--eta", type=at_least(0, float), help="divergence that vtw accepts, instead of --keep"
    )
    add_out(parser, "recipe.json", "where the recipe goes")


def run(args: argparse.Namespace) -> int:
    """Record if asked to, search, write the recipe."""
    return calibrate_command(args)


def calibrate_command(
    args: argparse.Namespace,
    *,
    console: Console | None = None,
    open_suite: Callable[[], Suite] | None = None,
    open_policy: Callable[[str], Any] | None = None,
) -> int:
    """`run` on any suite.

    Raises:
        ValueError: impossible arguments; FileNotFoundError: no observations.
    """
    console, open_suite = console or Console(), open_suite or pick_place
    if args.observations is None and args.episodes is None:
        raise ValueError(
            "nothing to calibrate on: give --observations FOLDER, or --episodes 16 to record some."
        )
    check_file(args.out)
    folder = args.observations or args.out.with_name(f"{args.out.stem}-observations")
    device = device_of(args.device)
    policy = load(args.policy, device=device) if open_policy is None else open_policy(args.policy)
    if not hasattr(policy, "predict_action"):
        raise ValueError(
            f"{args.policy} is no policy: it has no `predict_action`. Calibrate it from Python, "
            "with vla_pruner.calibration.search.calibrate and inputs of its own."
        )
    key = statistics_of(policy, args.unnorm_key, folder=Path(locate(args.policy)))
    request = {"keep": args.keep, "layer": args.layer, "eta": args.eta}
    check_request(args.method, policy, **request)
    if args.episodes is not None:
        _record(args, policy, folder, open_suite(), console)
    seen = read_observations(folder, held_out=_held_out(open_suite))
    if key is not None:
        items = tuple({"unnorm_key": key, **item} for item in seen.items)
        seen = replace(seen, items=items)
    recipe = _search(args, policy, seen, console)
    recipe.save(args.out)
    console.print(summary(recipe), highlight=False)
    console.print(f"written to {args.out}", highlight=False, markup=False)
    return 0


def summary(recipe: Recipe) -> str:
    """What was found, in one line."""
    values, count = recipe.values, recipe.observations["count"]
    start = f"{recipe.method} on {count} observations: "
    if recipe.method == "fitprune":
        share = 100 * recipe.settings["share"]
        return f"{start}{values['left']} visual tokens by layer, {share:.1f} % of their cost"
    if recipe.method == "vtw":
        layer = values["layer"]
        return (
            f"{start}visual tokens leave before layer {layer} of {recipe.model.layers}; the "
            f"{recipe.settings['measure']} then differ by {values['divergence'][str(layer)]:.3g}"
        )
    ranked = sorted(range(recipe.model.layers), key=lambda i: (values["importance"][i], i))
    return f"{start}layers from least to most important: {', '.join(map(str, ranked))}"


def _held_out(open_suite: Callable[[], Suite]) -> Sequence[int]:
    """Scenes kept for evaluation; none where the simulator that has them is not installed."""
    try:
        return open_suite().seeds
    except ImportError:
        return ()


def _record(
    args: argparse.Namespace, policy: Any, folder: Path, suite: Suite, console: Console
) -> None:
    if args.episodes < 1 or args.first_seed < 0:
        raise ValueError(
            f"--episodes {args.episodes} --first-seed {args.first_seed}: record at least one "
            "episode, from a scene that is not negative."
        )
    seeds = range(args.first_seed, args.first_seed + args.episodes)
    if seeds[-1] >= min(suite.seeds):
        raise ValueError(
            f"scenes {seeds[0]} to {seeds[-1]} are not all training scenes: those from "
            f"{min(suite.seeds)} on are kept for evaluation. Choose a smaller --first-seed."
        )
    folder_of_policy = Path(locate(args.policy))
    control = Control.of(policy, suite.cameras, folder=folder_of_policy, unnorm_key=args.unnorm_key)
    with progress_bar(console) as bar:
        line = bar.add_task("recording", total=len(seeds))
        record_observations(
            policy,
            suite.open_scene,
            folder,
            seeds,
            suite=suite,
            control=control,
            on_episode=lambda: bar.advance(line),
        )


def _search(args: argparse.Namespace, policy: Any, seen: Observations, console: Console) -> Recipe:
    with progress_bar(console) as bar:
        line = bar.add_task(f"calibrating {args.method}", total=None)
        return calibrate(
            args.method,
            policy,
            seen,
            keep=args.keep,
            layer=args.layer,
            eta=args.eta,
            on_start=lambda total: bar.update(line, total=total),
            tick=lambda: bar.advance(line),
        )
