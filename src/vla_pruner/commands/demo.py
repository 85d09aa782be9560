"""`vla-pruner demo`: a policy at work with all and with few of its visual tokens, on one page."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from rich.console import Console

from vla_pruner.commands.shared.options import (
    add_capture,
    add_device,
    add_keeps,
    add_method,
    add_out,
    add_policy,
    add_resume,
    add_scenes,
    add_suite,
    add_unnorm_key,
    check_capture,
    device_of,
    words_of,
)
from vla_pruner.commands.shared.output_folder import check_folder, prepare_folder
from vla_pruner.commands.shared.progress import progress_bar
from vla_pruner.episodes.condition import ALL_TOKENS, Condition
from vla_pruner.measure.environment import stamp
from vla_pruner.measure.timing import keep_freed_memory
from vla_pruner.models.base import find_adapter
from vla_pruner.models.loading import load, shipped
from vla_pruner.pages.demo_page import write_page
from vla_pruner.reports.files import write_text
from vla_pruner.reports.latency import pace_notes
from vla_pruner.reports.summary import Summary, episodes_csv, rows_csv, summarise
from vla_pruner.reports.terminal import table
from vla_pruner.reports.timings import timings
from vla_pruner.runs.job import Setup
from vla_pruner.runs.matrix import Cell
from vla_pruner.runs.plan import missing_jobs, plan
from vla_pruner.runs.processes import one_thread
from vla_pruner.runs.replay import measure, recorded
from vla_pruner.runs.runner import EpisodeRunner
from vla_pruner.runs.store import FILE, Store
from vla_pruner.scenes.scene import Suite
from vla_pruner.scenes.suites import open_suite

RECORDINGS = "recordings"
INTERRUPTED = 130

# Replays of one scene: at most so many rounds, in about so much time, or none at all.
_ROUNDS, _TIMED_MS, _FEWEST_ROUNDS = 12, 20_000, 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `vla-pruner demo`."""
    add_method(parser, "vla-pruner")
    add_keeps(parser, ["0.5", "0.25"])
    add_policy(parser)
    add_suite(parser)
    add_scenes(parser, 12)
    add_device(parser)
    add_capture(parser)
    add_unnorm_key(parser)
    add_out(parser, "demo-report", "folder for the report")
    add_resume(parser)


def run(args: argparse.Namespace) -> int:
    """Run the episodes, print the table, write the report; also what Ctrl-C leaves of them."""
    if args.policy in shipped() and args.policy.startswith("mini"):
        # These are so small that a second thread gains little, and on a busy machine the first
        # would wait for it at every operation.
        one_thread()
    return demo(args, open_suite(args.suite))


def demo(args: argparse.Namespace, suite: Suite, console: Console | None = None) -> int:
    """`run` on any suite.

    Raises:
        ValueError: impossible arguments, or a folder that this demo must not write to.
    """
    console = console or Console()
    device_of(args.device)
    check_capture(args.capture)
    keeps = words_of("--keep", args.keep)
    if args.method == ALL_TOKENS:
        raise ValueError(f"--method {args.method}: name a method that prunes")
    conditions = [Condition(), *(Condition.parse(f"{args.method}@{keep}") for keep in keeps)]
    names = [condition.name for condition in conditions]
    seeds = suite.held_out(args.episodes, args.seed)
    cells = [Cell(args.policy, suite.name, one, args.episodes, args.seed) for one in conditions]
    total, interrupted = len(conditions) * len(seeds), False
    check_folder(args.out)
    with console.status(f"loading {args.policy}"):
        policy = load(args.policy, device=args.device)
    control = {"unnorm_key": args.unnorm_key, "captured": args.capture}
    planned = plan(cells, {suite.name: suite}, lambda name: policy, control)
    prepare_folder(args.out, FILE, "demo report", resume=args.resume)
    with (
        Store(args.out, write=True) as store,
        closing(EpisodeRunner(lambda name: policy)) as runner,
    ):
        store.begin(list(planned), stamp(args.device))
        setup = next(iter(planned)).setup
        jobs = missing_jobs(planned, store, record=len(seeds))
        try:
            with progress_bar(console) as bar:
                line = bar.add_task("episodes", total=total, completed=total - len(jobs))
                for job in jobs:
                    episode = runner.run(job)
                    name = _recording(args.out, episode.condition, episode.seed)
                    write_text(name, json.dumps(episode.recording))
                    store.add(job, episode)
                    bar.advance(line)
            _time_apart(args.out, store, policy, suite, setup, conditions, seeds[0], console)
        except KeyboardInterrupt:
            interrupted = True
        episodes = store.episodes(setup, conditions, seeds)
        timed = timings(store.replays(setup)[0])
    summary = summarise(
        episodes,
        conditions,
        planned=total,
        settings={**setup.as_dict(), "seeds": [seeds[0], seeds[-1]]},
        environment=stamp(args.device),
        apart={name: timed[name] for name in names} if timed.keys() >= set(names) else {},
    )
    decoder = _decoder(policy)
    write_report(args.out, summary, conditions, suite, command=command_of(args), decoder=decoder)
    console.print(table(summary))
    console.print(pace_notes(summary), style="dim", highlight=False)
    if args.policy in shipped() and args.policy.startswith("mini"):
        console.print(
            f"{args.policy} is small: choosing tokens costs about what dropping them saves. "
            "Whose calls get faster: --policy smol-oft (docs/smol.md says what it needs).",
            highlight=False,
        )
    page = (args.out / "index.html").resolve().as_uri()
    if interrupted:
        console.print(
            f"Interrupted after {len(summary.episodes)} of {total} episodes. "
            f"Continue with: {command_of(args)} --resume",
            highlight=False,
        )
    console.print(f"Report: {page}", highlight=False, soft_wrap=True)
    return INTERRUPTED if interrupted else 0


def _time_apart(
    out: Path,
    store: Store,
    policy: Any,
    suite: Suite,
    setup: Setup,
    conditions: Sequence[Condition],
    seed: int,
    console: Console,
) -> None:
    """Replay what the policy sees in one scene under all conditions in turn, if that is quick.

    Episodes take turns in minutes, and what else the machine does in that time falls on one
    condition or another by chance.
    """
    timed = {replay.condition for replay in store.replays(setup)[0]}
    if timed >= {condition.name for condition in conditions}:
        return
    (episode,) = store.episodes(setup, [Condition()], [seed])
    once_ms = len(conditions) * sum(call.latency_ms for call in episode.calls)
    rounds = min(_ROUNDS, int(_TIMED_MS / once_ms))
    if rounds < _FEWEST_ROUNDS:
        return
    seen = recorded(out, policy, suite, setup, [seed], len(episode.calls))
    keep_freed_memory()
    with progress_bar(console) as bar:
        line = bar.add_task("latency", total=rounds * len(conditions))
        found = measure(
            policy,
            conditions,
            seen,
            rounds,
            lambda: bar.advance(line),
            captured=setup.captured,
        )
    store.keep_replays(setup, found)


def command_of(args: argparse.Namespace) -> str:
    """What to type to get the same report."""
    words = ["vla-pruner", "demo", "--method", args.method, "--keep", *args.keep]
    words += ["--policy", str(args.policy), "--suite", args.suite]
    words += ["--unnorm-key", args.unnorm_key] if args.unnorm_key else []
    words += ["--episodes", str(args.episodes)]
    return shlex.join([*words, "--seed", str(args.seed), "--out", str(args.out)])


def _decoder(policy: Any) -> tuple[int, int]:
    """Width and number of layers of what is pruned."""
    adapter = find_adapter(policy)
    adapter.bind(policy)
    decoder: Any = adapter.decoder
    return decoder.config.hidden_size, decoder.config.num_hidden_layers


def write_report(
    out: Path,
    summary: Summary,
    conditions: Sequence[Condition],
    suite: Suite,
    *,
    command: str,
    decoder: tuple[int, int] | None = None,
) -> None:
    """Write `index.html`, `results.json`, `results.csv` and `episodes.csv`."""
    recordings: dict[tuple[str, int], dict[str, Any]] = {}
    for episode in summary.episodes:
        file = _recording(out, episode.condition, episode.seed)
        if file.exists():
            recordings[episode.condition, episode.seed] = json.loads(file.read_text("utf-8"))
    values = {"command": command, **summary.as_dict()}
    write_text(out / "results.json", json.dumps(values, indent=1, allow_nan=False) + "\n")
    write_text(out / "results.csv", rows_csv(summary))
    write_text(out / "episodes.csv", episodes_csv(summary))
    write_page(
        out / "index.html",
        summary,
        conditions,
        recordings,
        command=command,
        objects=suite.tasks,
        hz=suite.hz,
        decoder=decoder,
    )


def _recording(out: Path, condition: str, seed: int) -> Path:
    return out / RECORDINGS / f"{condition}-{seed}.json"
