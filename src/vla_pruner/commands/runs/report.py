"""`vla-pruner report`: tables and curves from the episodes of one or more runs."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from vla_pruner._arguments import a_path
from vla_pruner.commands.shared.options import words_of
from vla_pruner.episodes.condition import Condition
from vla_pruner.pages.films import recordings_of, write_films
from vla_pruner.pages.report_page import report_page
from vla_pruner.reports import identical
from vla_pruner.reports.compare import Group, read_runs, replay_rows
from vla_pruner.reports.document import to_markdown
from vla_pruner.reports.export import exporters, to_parquet, to_rerun, to_tracker
from vla_pruner.reports.files import to_csv, write_text
from vla_pruner.reports.latex import to_latex
from vla_pruner.reports.report import blocks_of, episode_rows_of, rows_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `vla-pruner report`."""
    parser.add_argument("runs", nargs="+", type=a_path, help="folders that eval or sweep wrote to")
    parser.add_argument(
        "--without",
        nargs="+",
        default=[],
        metavar="CONDITION",
        help="leave these conditions out; their episodes stay in the run",
    )
    parser.add_argument("--against", help="also compare with this condition: vla-pruner@0.25")
    parser.add_argument(
        "--identical",
        action="store_true",
        help="instead of a report: say whether other runs gave the same episodes as the first, one "
        "for one; exit code 1 if not",
    )
    parser.add_argument(
        "--export",
        nargs="+",
        default=[],
        metavar="TOOL",
        help="also hand the numbers to parquet (files beside the report), wandb or trackio (a run "
        "for each condition, in the project behind a colon: wandb:my-project), or the recorded "
        "episodes to rerun (.rrd files beside their films)",
    )
    parser.add_argument("--out", type=a_path, help="folder for the report; default: the first run")


def run(args: argparse.Namespace) -> int:
    """Write report.md, .html, .tex and .csv and episodes.csv, and print the first."""
    if args.identical:
        return _identical(args.runs)
    tools = exporters(words_of("--export", args.export) if args.export else [])
    against = Condition.parse(args.against).name if args.against else None
    without = words_of("--without", args.without) if args.without else []
    groups = read_runs(args.runs, without=[Condition.parse(word).name for word in without])
    names = dict.fromkeys(condition.name for group in groups for condition in group.conditions)
    if against and against not in names:
        raise ValueError(f"--against {against}: the runs hold {', '.join(names)}")
    blocks = blocks_of(groups, against)
    out = args.out or args.runs[0]
    files = {
        "report.md": to_markdown(blocks),
        "report.tex": to_latex(groups, blocks),
        "report.csv": to_csv(rows_of(groups)),
        "episodes.csv": to_csv(episode_rows_of(groups)),
    }
    if replays := replay_rows(args.runs):
        files["replays.csv"] = to_csv(replays)
    for name, text in files.items():
        write_text(out / name, text)
    films = {group: write_films(group, args.runs, out) for group in groups}
    watch = f"vla-pruner watch {shlex.quote(str(args.runs[0]))}"
    small = {name: text for name, text in files.items() if name.startswith("report.")}
    page = report_page(groups, blocks, films=films, files=small, watch=watch)
    write_text(out / "report.html", page)
    for tool, project in tools:
        _export(tool, project, groups, args.runs, out)
    print(to_markdown(blocks))
    print(f"Report: {out / 'report.html'} (also .md, .tex, .csv; episodes.csv)")
    return 0


def _export(
    tool: str, project: str, groups: Sequence[Group], runs: Sequence[Path], out: Path
) -> None:
    """Hand a report to one tool."""
    if tool == "parquet":
        to_parquet(out / "report.parquet", rows_of(groups))
        to_parquet(out / "episodes.parquet", episode_rows_of(groups))
    elif tool == "rerun":
        for group in groups:
            for (condition, seed), (path, recording) in recordings_of(group, runs).items():
                name = f"{group.title}, {condition}, scene {seed}"
                to_rerun(path.with_suffix(".rrd"), recording, name)
    else:
        to_tracker(tool, project, rows_of(groups))


def _identical(runs: Sequence[Path]) -> int:
    """Print whether the runs gave the same episodes as the first; 1 if not."""
    if len(runs) < 2:
        raise ValueError("--identical: name two runs or more")
    found = [pairs for run in runs[1:] for pairs in identical.compare_runs(runs[0], run)]
    print(to_markdown(identical.blocks_of(found)))
    return int(any(pairs.differences for pairs in found))
