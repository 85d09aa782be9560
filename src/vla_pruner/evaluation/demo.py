"""`vla-pruner demo`: a policy at work with all and with few of its visual tokens, on one page."""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vla_pruner.bench.environment import stamp
from vla_pruner.bench.measure import keep_freed_memory
from vla_pruner.evaluation.episode import ALL_TOKENS, Condition
from vla_pruner.evaluation.latency import measure, recorded
from vla_pruner.evaluation.page import write_page
from vla_pruner.evaluation.replay import pace, pace_notes, timings
from vla_pruner.evaluation.rollouts import Runner, Setup
from vla_pruner.evaluation.store import FILE, Store
from vla_pruner.evaluation.suites import PICK_PLACE, SUITES, Suite, open_suite
from vla_pruner.evaluation.summary import (
    Summary,
    episodes_csv,
    percent,
    rows_csv,
    summarise,
    write_text,
)
from vla_pruner.evaluation.sweep import Cell, missing_jobs, plan, progress_bar
from vla_pruner.evaluation.workers import one_thread
from vla_pruner.models.loading import load, shipped

RECORDINGS = "recordings"
INTERRUPTED = 130

# Replays of one scene: at most so many rounds, in about so much time, or none at all.
_ROUNDS, _TIMED_MS, _FEWEST_ROUNDS = 12, 20_000, 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `vla-pruner demo`."""
    parser.add_argument("--method", default="vla-pruner", help="see `vla-pruner methods`")
    parser.add_argument(
        "--keep",
        nargs="+",
        default=["0.5", "0.25"],
        help="how many visual tokens stay: fractions such as 0.25, or numbers such as 50",
    )
    parser.add_argument(
        "--policy",
        default="mini-oft",
        help="a policy that ships with the package (mini-oft, mini-openvla, mini-pi0; "
        "mini-oft-libero for --suite libero_object), or a folder",
    )
    parser.add_argument(
        "--suite", default=PICK_PLACE, help=f"{', '.join(SUITES)}, or MODULE:FUNCTION"
    )
    parser.add_argument("--episodes", type=int, default=12, help="scenes, each run in every way")
    parser.add_argument(
        "--seed", type=int, default=0, help="number of the first scene, among the held-out ones"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("demo-report"), help="folder for the report"
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue the episodes that are in --out already"
    )


def run(args: argparse.Namespace) -> int:
    """Run the episodes, print the table, write the report; also what Ctrl-C leaves of them."""
    if args.policy in shipped():
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
    keeps = [word for words in args.keep for word in words.split(",") if word]
    if args.method == ALL_TOKENS or not keeps or len(set(keeps)) < len(keeps):
        raise ValueError(
            f"--method {args.method} --keep {' '.join(keeps)}: name a method that prunes, and "
            "different amounts to keep"
        )
    conditions = [Condition(), *(Condition.parse(f"{args.method}@{keep}") for keep in keeps)]
    names = [condition.name for condition in conditions]
    seeds = suite.held_out(args.episodes, args.seed)
    cells = [Cell(args.policy, suite.name, one, args.episodes, args.seed) for one in conditions]
    prepare_folder(args.out, resume=args.resume)
    total, interrupted = len(conditions) * len(seeds), False
    with console.status(f"loading {args.policy}"):
        policy = load(args.policy)
    with Store(args.out, write=True) as store, closing(Runner(lambda name: policy)) as runner:
        planned = plan(cells, {suite.name: suite}, lambda name: policy)
        store.begin(list(planned), stamp())
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
        environment=stamp(),
        apart={name: timed[name] for name in names} if timed.keys() >= set(names) else {},
    )
    write_report(args.out, summary, conditions, suite, command=command_of(args))
    console.print(table(summary))
    console.print(pace_notes(summary), style="dim", highlight=False)
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
    seen = recorded(out, policy, suite, setup, [seed], len(episode.calls), console)
    keep_freed_memory()
    with progress_bar(console) as bar:
        line = bar.add_task("latency", total=rounds * len(conditions))
        found = measure(policy, conditions, seen, rounds, lambda: bar.advance(line))
    store.keep_replays(setup, found)


def prepare_folder(out: Path, *, resume: bool) -> None:
    """Make room for a new report, or make sure that there is one to continue.

    An earlier report is set aside as `NAME.previous`.

    Raises:
        ValueError: `out` is a file, holds something else, or there is nothing to resume.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; name a folder")
    if resume:
        if not (out / FILE).exists():
            raise ValueError(f"--resume: there is nothing to continue in {out}; leave it out")
        return
    if not out.exists() or not any(out.iterdir()):
        return
    if not (out / FILE).exists():
        raise ValueError(f"--out {out} holds something that is no demo report; name another folder")
    previous = out.with_name(out.name + ".previous")
    if previous.exists():
        if not (previous / FILE).exists():
            raise ValueError(f"{previous} is in the way; remove it or name another folder")
        shutil.rmtree(previous)
    out.rename(previous)


def command_of(args: argparse.Namespace) -> str:
    """What to type to get the same report."""
    words = ["vla-pruner", "demo", "--method", args.method, "--keep", *args.keep]
    words += ["--policy", str(args.policy), "--episodes", str(args.episodes)]
    return shlex.join([*words, "--seed", str(args.seed), "--out", str(args.out)])


def write_report(
    out: Path, summary: Summary, conditions: Sequence[Condition], suite: Suite, *, command: str
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
    )


def _recording(out: Path, condition: str, seed: int) -> Path:
    return out / RECORDINGS / f"{condition}-{seed}.json"


def table(summary: Summary) -> Table:
    """The rows for a terminal of 80 columns."""
    result = Table(show_lines=True)
    for column in ("", "success", "visual\ntokens", "prefill\nFLOPs", "latency, ms", "speed-up"):
        result.add_column(column, justify="right" if column else "left")
    for row in summary.rows:
        speed, success = pace(summary, row), row.success_interval
        latency, speedup = f"{speed.median_ms:.1f}\np95 {speed.p95_ms:.1f}", "-"
        if speed.speedup is not None and speed.interval is not None:
            speedup = f"{speed.speedup:.2f}\n{speed.interval.low:.2f} to {speed.interval.high:.2f}"
        if speed.pruned_ms is not None:
            latency += f"\npruned {speed.pruned_ms:.1f}"
        if speed.pruned_speedup is not None:
            speedup += f"\npruned {speed.pruned_speedup:.2f}"
        result.add_row(
            row.label.replace(", ", "\n"),
            f"{row.successes} of {row.episodes}\n{percent(success.low)} to {percent(success.high)}",
            f"{row.visual_kept}\nof {row.visual}",
            percent(row.prefill_ratio),
            latency,
            speedup,
        )
    return result
