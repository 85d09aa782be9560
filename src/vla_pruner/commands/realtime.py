"""`vla-pruner realtime`: a simulated arm that does not wait for its policy."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console

from vla_pruner.commands.shared.options import (
    above_0,
    add_control,
    add_device,
    add_out,
    add_policy,
    add_scenes,
    at_least,
    words_of,
)
from vla_pruner.commands.shared.output_folder import check_folder
from vla_pruner.episodes.condition import Condition
from vla_pruner.episodes.control import Control, said_by
from vla_pruner.measure.environment import stamp
from vla_pruner.models.loading import locate
from vla_pruner.reports.files import to_csv, write_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `vla-pruner realtime`."""
    add_policy(parser)
    parser.add_argument(
        "--conditions",
        nargs="+",
        default=["none", "vla-pruner@0.25"],
        help="each in a server of its own; differences are from the first",
    )
    parser.add_argument(
        "--url",
        help="instead of servers that this command starts: one that runs, perhaps elsewhere; "
        "--conditions then is the name of what it serves",
    )
    parser.add_argument("--token", help="of the server at --url")
    add_scenes(parser, 10)
    parser.add_argument("--hz", type=float, default=25.0, help="ticks of the arm in a second")
    parser.add_argument(
        "--actions-hz",
        type=float,
        default=5.0,
        help="actions of the policy in a second; 5 is the scene's own time, 25 five times as fast",
    )
    parser.add_argument(
        "--max-age-s", type=above_0, default=2.0, help="older actions are not carried out"
    )
    parser.add_argument(
        "--deadline-ms", type=at_least(1, float), help="asked of the server with every observation"
    )
    parser.add_argument("--film", action="store_true", help="keep a moving picture of each scene")
    parser.add_argument(
        "--rerun", action="store_true", help="a Rerun file of each server, in rerun/ of --out"
    )
    add_control(parser)
    add_device(parser)
    add_out(parser, "realtime", "folder of the results")


def run(args: argparse.Namespace) -> int:
    """Every scene under every condition in turn; then the table.

    Raises:
        ImportError: the client or the simulator is not installed.
        RuntimeError: a server does not start.
    """
    try:
        importlib.import_module("vla_pruner_client")
    except ModuleNotFoundError as error:
        if error.name != "vla_pruner_client":
            raise
        raise ImportError(
            "the arm asks with our client, which is a package of its own, in the repository: "
            "pip install ./clients/python"
        ) from None
    from vla_pruner.realtime.arm import Pace

    conditions = [Condition.parse(word) for word in words_of("--conditions", args.conditions)]
    if args.url is not None and len(conditions) > 1:
        raise ValueError("--url is one server: name what it serves with one of --conditions")
    pace = Pace(args.hz, args.actions_hz)
    check_folder(args.out)
    console = Console()
    found = _trials(args, conditions, pace, console)
    _write(args, found, [condition.name for condition in conditions], pace, console)
    return 0


def _trials(
    args: argparse.Namespace, conditions: list[Condition], pace: Any, console: Console
) -> list[Any]:
    from vla_pruner.realtime.arm import WatchedClient, observation, run_trial
    from vla_pruner.realtime.served import Served
    from vla_pruner.realtime.table import film
    from vla_pruner.scenes.suites import PICK_PLACE, open_suite

    suite = open_suite(PICK_PLACE)
    seeds = suite.held_out(args.episodes, args.seed)
    said = said_by(Path(locate(args.policy))) if args.url is None else {}
    execute = args.execute or int(said.get("execute", 2))
    control = Control(suite.cameras, execute, reads_state=True)
    more = [] if args.gripper is None else ["--gripper", args.gripper]
    more += [] if args.unnorm_key is None else ["--unnorm-key", args.unnorm_key]
    deadline = None if args.deadline_ms is None else args.deadline_ms / 1000
    trials = []
    with ExitStack() as open_:
        urls = {}
        for condition in conditions:
            if args.url is not None:
                urls[condition.name] = args.url
                continue
            name = re.sub(r"[^\w.@-]", "_", condition.name)
            log = ["--rerun", str(args.out / "rerun" / f"{name}.rrd")] if args.rerun else []
            served = Served(args.policy, condition, device=args.device, more=[*more, *log])
            urls[condition.name] = open_.enter_context(served).url
        scene: Any = suite.open_scene()
        open_.callback(scene.close)
        scene.reset(seeds[0], suite.task_of(seeds[0]))
        seen = observation(scene, control, "wait")
        chunk = 1
        for url in urls.values():
            with WatchedClient(url, token=args.token, timeout_s=60) as client:
                chunk = len(client.infer(seen).actions)
        for seed in seeds:
            mine = []
            for condition in conditions:
                client = WatchedClient(
                    urls[condition.name], token=args.token, timeout_s=30, deadline_s=deadline
                )
                trial = run_trial(
                    scene,
                    client,
                    seed,
                    suite.task_of(seed),
                    control=control,
                    pace=pace,
                    step_limit=suite.step_limit,
                    condition=condition.name,
                    ask_at=max(chunk - execute, 0),
                    max_age_s=args.max_age_s,
                    film=args.film,
                )
                mine.append(trial)
                console.print(
                    f"scene {seed}, {condition.name}: {'solved' if trial.success else 'not solved'}"
                    f", {trial.ticks / pace.hz:.1f} s, stood {trial.before} of {trial.ticks} ticks "
                    f"before the first action and {trial.held} after it",
                    highlight=False,
                )
            if args.film:
                film(args.out / "films" / f"{seed}.webp", scene, mine)
            for trial in mine:
                trial.states.clear()
            trials += mine
    return trials


def _write(
    args: argparse.Namespace, trials: list[Any], names: list[str], pace: Any, console: Console
) -> None:
    from vla_pruner.realtime.table import table
    from vla_pruner.scenes.suites import PICK_PLACE

    about = stamp("cpu") | {
        "policy": args.policy,
        "hz": pace.hz,
        "actions_hz": pace.actions_hz,
        "speed": pace.speed,
        "load": os.getloadavg(),
        "cores": os.cpu_count(),
    }
    values = {"about": about, "trials": [trial.as_dict() for trial in trials]}
    write_text(args.out / "realtime.json", json.dumps(values, default=str))
    suite = {"suite": f"{PICK_PLACE}+clock{pace.actions_hz:g}"}
    rows = [suite | trial.as_row() for trial in trials]
    write_text(args.out / "episodes.csv", to_csv(rows))
    shown = table(trials, names)
    said = ", ".join(f"{name} {value}" for name, value in about.items() if value is not None)
    page = f"# {args.policy} in real time\n\n{shown}\n{said}.\n"
    write_text(args.out / "realtime.md", page)
    console.print(page, highlight=False, soft_wrap=True, markup=False)
    where = args.out / "realtime.md"
    console.print(f"Results: {where}", highlight=False, markup=False, soft_wrap=True)
