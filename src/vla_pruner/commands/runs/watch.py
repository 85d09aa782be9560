"""`vla-pruner watch`: films of episodes that a run has finished, played again to be recorded."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from vla_pruner.commands.shared.options import add_device, device_of, words_of
from vla_pruner.commands.shared.progress import progress_bar
from vla_pruner.episodes.condition import Condition
from vla_pruner.episodes.episode import Episode
from vla_pruner.models.loading import load
from vla_pruner.pages.films import write_films
from vla_pruner.reports.compare import Group, read_runs
from vla_pruner.reports.identical import parting
from vla_pruner.runs.job import Job, Planned
from vla_pruner.runs.runner import EpisodeRunner
from vla_pruner.runs.store import Store
from vla_pruner.runs.video import keep_recording, video_path
from vla_pruner.scenes.suites import open_suite


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `vla-pruner watch`."""
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="what eval or sweep wrote to")
    parser.add_argument(
        "--scenes",
        nargs="+",
        required=True,
        metavar="SCENE",
        help="numbers of scenes, as the report's squares name them",
    )
    parser.add_argument(
        "--conditions",
        nargs="+",
        metavar="CONDITION",
        help="such as none,vla-pruner@0.25; default: every condition that has run in the scene",
    )
    parser.add_argument("--policy", help="of a run with several policies: only this one")
    parser.add_argument("--suite", help="of a run with several suites: only this one")
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    """Play the episodes again, keep what a page shows of them, and write their pages.

    Raises:
        ValueError: episodes that the run has not finished, or other weights than those of the run.
    """
    device_of(args.device)
    console = Console()
    seeds = [_scene(word) for word in words_of("--scenes", args.scenes)]
    words = words_of("--conditions", args.conditions) if args.conditions else []
    wanted = [Condition.parse(word).name for word in words]
    groups = [
        group
        for group in read_runs([args.run_folder])
        if args.policy in (None, group.setup.policy) and args.suite in (None, group.setup.suite)
    ]
    found = [
        (group, episode)
        for group in groups
        for episode in group.episodes
        if episode.seed in seeds and (not wanted or episode.condition in wanted)
    ]
    _check(args.run_folder, groups, [one for _, one in found], seeds, wanted)
    pages = _play(args, found, console)
    for page in pages:
        console.print(f"Film: {page.resolve().as_uri()}", highlight=False, soft_wrap=True)
    again = f"vla-pruner report {shlex.quote(str(args.run_folder))}"
    console.print(f"In the report: {again}", highlight=False, markup=False, soft_wrap=True)
    return 0


def _scene(word: str) -> int:
    try:
        return int(word)
    except ValueError:
        raise ValueError(f"--scenes {word}: name scenes by number, such as 1000003") from None


def _check(
    run_folder: Path,
    groups: Sequence[Group],
    found: Sequence[Episode],
    seeds: Sequence[int],
    wanted: Sequence[str],
) -> None:
    """Refuse what has not run, by name (ValueError)."""
    if not groups:
        raise ValueError(f"{run_folder} holds nothing of this --policy and --suite")
    names = {condition.name for group in groups for condition in group.conditions}
    if unknown := [name for name in wanted if name not in names]:
        raise ValueError(
            f"--conditions {', '.join(unknown)}: {run_folder} holds {', '.join(sorted(names))}"
        )
    there = {episode.seed for episode in found}
    if missing := [seed for seed in seeds if seed not in there]:
        known = sorted({episode.seed for group in groups for episode in group.episodes})
        raise ValueError(
            f"--scenes {', '.join(map(str, missing))}: no such episode has finished in "
            f"{run_folder}; its scenes are {known[0]} to {known[-1]}"
        )


def _play(
    args: argparse.Namespace, found: Sequence[tuple[Group, Episode]], console: Console
) -> list[Path]:
    """Run the episodes, and return the pages on which they are."""
    with Store(args.run_folder) as store:
        planned = {(item.setup, item.condition.name): item for item in store.planned()}
    with (
        closing(EpisodeRunner(partial(load, device=args.device))) as runner,
        progress_bar(console) as bar,
    ):
        line = bar.add_task("episodes", total=len(found))
        for group, episode in found:
            item: Planned = planned[group.setup, episode.condition]
            suite = open_suite(group.setup.suite)
            played = runner.run(Job(item, suite, episode.seed, record=True))
            path = video_path(args.run_folder, group.setup, episode.condition, episode.seed)
            keep_recording(path, {**_told(episode, played), **(played.recording or {})}, suite.hz)
            bar.advance(line)
    pages: dict[Path, None] = {}
    for group in dict.fromkeys(group for group, _ in found):
        films = write_films(group, [args.run_folder], args.run_folder)
        for owner, episode in found:
            if owner is group:
                address = films[episode.condition, episode.seed].partition("#")[0]
                pages[args.run_folder / address] = None
    return list(pages)


def _told(before: Episode, now: Episode) -> dict[str, Any]:
    """How this playing ended, and where it parts from the run's own; machines round differently."""
    try:
        apart = parting(before, now)
    except ValueError:  # The run is older than the digests that tell.
        apart = None if before.success == now.success else "another end"
    return {"success": now.success, "steps": now.steps, "differs": apart}
