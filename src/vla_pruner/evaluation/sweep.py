"""`vla-pruner sweep`: policies x methods x ratios x suites, into one store, resumable."""

from __future__ import annotations

import argparse
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from hashlib import sha256
from pathlib import Path
from types import FrameType
from typing import Any, get_args

import yaml
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import nn

from vla_pruner.bench.environment import stamp
from vla_pruner.evaluation.episode import Condition, Gripper
from vla_pruner.evaluation.rollouts import Job, OpenPolicy, Planned, Setup
from vla_pruner.evaluation.store import Store
from vla_pruner.evaluation.suites import Suite, open_suite
from vla_pruner.evaluation.video import encoder, video_path, write_video
from vla_pruner.evaluation.workers import Crew, Processes
from vla_pruner.models.loading import load

INTERRUPTED = 130


@dataclass(frozen=True)
class Cell:
    """One cell of the matrix.

    Args:
        policy: name or folder.
        suite: name.
        condition: what is done to the policy.
        episodes: number of scenes.
        first: number of the first held-out scene.
    """

    policy: str
    suite: str
    condition: Condition
    episodes: int
    first: int = 0


# -- the matrix ----------------------------------------------------------------------------------

_KEYS = ("policies", "suites", "keep", "methods", "conditions", "episodes", "seed")


def read_config(path: str | Path) -> list[Cell]:
    """The cells of a sweep's file; docs/evaluating.md describes it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not YAML, or says something that is not understood.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; docs/evaluating.md shows what it holds")
    try:
        found = yaml.safe_load(path.read_text("utf-8"))
        return read_matrix(found)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_matrix(values: Any) -> list[Cell]:
    """The cells that a sweep's file describes.

    Raises:
        ValueError: something is missing, unknown or impossible.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"expected the entries {', '.join(_KEYS)}; got {type(values).__name__}")
    if unknown := [str(key) for key in values if key not in _KEYS]:
        raise ValueError(f"unknown entry {', '.join(unknown)}; there are {', '.join(_KEYS)}")
    policies, suites = (_names(values, key) for key in ("policies", "suites"))
    default, first = _counts(values.get("episodes", 50), suites), values.get("seed", 0)
    wanted: dict[str, tuple[Condition, dict[str, int]]] = {}
    for text, episodes in [*_method_conditions(values), *_listed_conditions(values)]:
        condition = Condition.parse(text)
        if condition.name in wanted:
            raise ValueError(f"condition {condition.name} is asked for twice")
        counts = default if episodes is None else _counts(episodes, suites)
        wanted[condition.name] = condition, counts
    if not wanted:
        raise ValueError("nothing to run: name `methods` or `conditions`")
    if not isinstance(first, int) or first < 0:
        raise ValueError(f"seed: {first!r} must be the number of a held-out scene, from 0")
    return [
        Cell(policy, suite, condition, counts[suite], first)
        for suite in suites
        for policy in policies
        for condition, counts in wanted.values()
    ]


def _names(values: Mapping[str, Any], key: str) -> list[str]:
    found = values.get(key)
    names = [found] if isinstance(found, str) else found
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise ValueError(f"{key}: expected a list of names, got {found!r}")
    if len(set(names)) < len(names):
        raise ValueError(f"{key}: a name is there twice")
    return names


def _counts(value: Any, suites: Sequence[str]) -> dict[str, int]:
    """Scenes by suite, from one number for all or from one for each."""
    counts = dict(value) if isinstance(value, Mapping) else dict.fromkeys(suites, value)
    if set(counts) != set(suites):
        wanted = ", ".join(suites)
        raise ValueError(f"episodes: expected a number for each of {wanted}; got {value!r}")
    for count in counts.values():
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ValueError(f"episodes: {count!r} must be a number of scenes, at least 1")
    return counts


def _method_conditions(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """`methods`: each with every ratio of `keep`, unless it has its own."""
    methods = values.get("methods") or {}
    if isinstance(methods, list):
        methods = dict.fromkeys(methods)
    if not isinstance(methods, Mapping):
        raise ValueError(f"methods: expected names, got {methods!r}")
    for name, own in methods.items():
        own = own or {}
        if not isinstance(own, Mapping) or not set(own) <= {"keep", "episodes", "options"}:
            raise ValueError(f"methods: {name} may say keep, episodes and options; got {own!r}")
        options = own.get("options") or {}
        suffix = "".join(f":{key}={value}" for key, value in dict(options).items())
        keeps = own.get("keep", values.get("keep"))
        if name == "none":
            yield "none", own.get("episodes")
            continue
        if keeps is None or keeps == []:
            raise ValueError(f"methods: {name} has no `keep`, such as [0.5, 0.25]")
        for keep in keeps if isinstance(keeps, list) else [keeps]:
            yield f"{name}@{keep}{suffix}", own.get("episodes")


def _listed_conditions(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """`conditions`: names as everywhere, with their number of episodes if it is another."""
    for entry in values.get("conditions") or []:
        if isinstance(entry, str):
            yield entry, None
        elif isinstance(entry, Mapping) and len(entry) == 1:
            yield from ((str(name), episodes) for name, episodes in entry.items())
        else:
            raise ValueError(
                f"conditions: {entry!r} must be a name such as vla-pruner@0.25, or a name and its "
                "episodes such as `vla-pruner@0.25: 100`"
            )


# -- running it ----------------------------------------------------------------------------------


def run_cells(
    cells: Sequence[Cell],
    out: str | Path,
    crew: Crew,
    *,
    control: Mapping[str, Any] | None = None,
    videos: int = 0,
    console: Console | None = None,
) -> bool:
    """Run what is missing of the cells, and keep each episode as soon as it has finished.

    Everything is checked before the first episode: suites, policies, and that every method can
    prune every policy. After Ctrl-C the episodes in progress are finished; after a second one they
    are not.

    Args:
        cells: the matrix.
        out: run folder; run again with the same one, it continues.
        crew: what runs the episodes.
        control: overrides how policies are driven, see `Control.of`.
        videos: write a video of the first so many episodes of each cell.
        console: where the progress is shown.

    Returns:
        Whether everything was run; False after Ctrl-C.

    Raises:
        ValueError: impossible cells, or a folder with episodes that do not compare.
        RuntimeError: another process writes to the folder, or episodes could not be run.
        ModuleNotFoundError: videos are asked for, and nothing is installed to write them with.
        OSError: the disk is full.
    """
    if videos < 0:
        raise ValueError(f"--video {videos}: write the videos of 0 or more episodes of a condition")
    if videos:
        encoder()
    suites = {cell.suite: open_suite(cell.suite) for cell in cells}
    planned = plan(cells, suites, control=control)
    with Store(out, write=True) as store:
        store.begin(list(planned), {**stamp(crew.device), "threads": 1, "workers": crew.workers})
        missing = missing_jobs(planned, store, record=videos)
        total = sum(item.episodes for item in planned)
        with progress_bar(console) as bar, _Interruption() as interruption:
            line = bar.add_task("episodes", total=total, completed=total - len(missing))
            for job, episode in crew.run(interruption.until(missing)):
                if episode.recording is not None:
                    write_video(video_path(Path(out), job), episode.recording, job.suite.hz)
                store.add(job, episode)
                bar.advance(line)
        return not interruption.asked


def plan(
    cells: Sequence[Cell],
    suites: Mapping[str, Suite],
    open_policy: OpenPolicy = load,
    control: Mapping[str, Any] | None = None,
) -> dict[Planned, Suite]:
    """What the cells mean, after all that can be wrong with them has been checked.

    Args:
        cells: the matrix.
        suites: by the names that the cells use.
        open_policy: loads a policy by name; each is loaded once.
        control: overrides how policies are driven, see `Control.of`.

    Raises:
        ValueError: too many scenes, or a method that cannot prune a policy.
    """
    planned: dict[Planned, Suite] = {}
    for name in dict.fromkeys(cell.policy for cell in cells):
        policy = open_policy(name)
        setups = {
            suite: Setup.of(name, policy, suites[suite], **(control or {}))
            for suite in dict.fromkeys(cell.suite for cell in cells if cell.policy == name)
        }
        for cell in cells:
            if cell.policy == name:
                suite = suites[cell.suite]
                suite.held_out(cell.episodes, cell.first)  # Raises: there are not so many.
                settings, recipe = settings_of(cell.condition, policy)
                item = Planned(
                    setups[cell.suite], cell.condition, settings, recipe, cell.first, cell.episodes
                )
                planned[item] = suite
    return planned


def settings_of(condition: Condition, policy: nn.Module) -> tuple[dict[str, Any], str | None]:
    """All options of the method on this policy, and the digest of the recipe that it follows."""
    session = condition.attach(policy)
    if session is None:
        return {}, None
    method = session.method
    session.remove()
    settings = {f.name: getattr(method, f.name) for f in fields(method) if f.init}
    recipe = settings.pop("recipe", None)
    digest = None
    if recipe is not None:
        said = repr((recipe.method, recipe.keep, recipe.model, sorted(recipe.values.items())))
        digest = sha256(said.encode()).hexdigest()[:12]
    return settings, digest


def missing_jobs(planned: Mapping[Planned, Suite], store: Store, *, record: int = 0) -> list[Job]:
    """What is left to run: scene by scene, under all conditions, each scene in another order.

    Neighbours in time are thus the same scene, and no condition always comes first. The first
    `record` scenes of each are recorded.
    """
    groups: dict[tuple[str, str], list[Planned]] = {}
    for item in planned:
        groups.setdefault((item.setup.suite, item.setup.policy), []).append(item)
    jobs = []
    for items in groups.values():
        suite, setup = planned[items[0]], items[0].setup
        done = store.finished(setup)
        seeds = {item: suite.held_out(item.episodes, item.first) for item in items}
        for number, seed in enumerate(sorted(set().union(*seeds.values()))):
            present = [item for item in items if seed in seeds[item]]
            turn = number % len(present)
            jobs += [
                Job(item, suite, seed, record=seed in seeds[item][:record])
                for item in present[turn:] + present[:turn]
                if (item.condition.name, seed) not in done
            ]
    return jobs


class _Interruption:
    """Ctrl-C as a wish to stop: the first one is noted, the second one is raised."""

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    def until(self, jobs: Sequence[Job]) -> Iterator[Job]:
        """The jobs, up to the first Ctrl-C."""
        for job in jobs:
            if self.asked:
                return
            yield job

    def __enter__(self) -> _Interruption:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


def progress_bar(console: Console | None = None) -> Progress:
    """A bar for episodes, with the time that is left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("elapsed,"),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=console,
        transient=True,
    )


# -- the command ---------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `vla-pruner sweep`."""
    parser.add_argument("config", type=Path, help="YAML file; docs/evaluating.md describes it")
    add_run_arguments(parser)


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Where and how to run episodes, for `eval` and `sweep`."""
    parser.add_argument("--out", type=Path, required=True, help="run folder; resumed if it exists")
    parser.add_argument("--workers", type=int, default=2, help="processes, or actors of Ray")
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="run in this Ray cluster; `auto` is the one that this machine belongs to",
    )
    parser.add_argument(
        "--policy-actors",
        type=int,
        default=0,
        metavar="N",
        help="with --ray: N actors hold the policy, and the workers only simulators, which ask "
        "them; 0: every worker holds both",
    )
    parser.add_argument(
        "--gpus",
        type=float,
        help="with --ray: GPUs that an actor with a policy reserves, such as 0.5; default: 1 with "
        "--device cuda",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda: where policies run")
    parser.add_argument(
        "--time-limit",
        type=float,
        default=1800.0,
        help="seconds after which an episode's process is replaced and the episode begun anew",
    )
    parser.add_argument(
        "--video",
        type=int,
        default=0,
        metavar="N",
        help="write an mp4 of the first N episodes of each condition into OUT/videos, dropped "
        "patches dimmed; episodes that had finished before are not repeated for it",
    )
    parser.add_argument(
        "--execute", type=int, help="actions of a chunk to carry out before the policy is asked"
    )
    parser.add_argument(
        "--gripper",
        choices=get_args(Gripper),
        help="how the policy writes it: robosuite (+1 close, -1 open) or rlds (0 close, 1 open; "
        "published checkpoints); default: what its config.json says, else robosuite",
    )


def run(args: argparse.Namespace) -> int:
    """Run the matrix of a file."""
    return run_command(args, read_config(args.config))


def open_crew(args: argparse.Namespace) -> Crew:
    """What runs the episodes: processes of this machine, or actors of a Ray cluster."""
    if args.ray is None:
        if args.policy_actors or args.gpus is not None:
            raise ValueError("--policy-actors and --gpus are for a Ray cluster: add --ray auto")
        return Processes(args.workers, args.time_limit, args.device)
    from vla_pruner.evaluation.cluster import RayActors

    gpus = args.gpus
    if gpus is None:
        gpus = 0 if args.device == "cpu" else 1
    return RayActors(args.ray, args.workers, args.time_limit, args.device, gpus, args.policy_actors)


def run_command(args: argparse.Namespace, cells: Sequence[Cell]) -> int:
    """Run cells as the arguments say; print how to go on. Returns the exit code."""
    console = Console()
    control = {"execute": args.execute, "gripper": args.gripper}
    complete = run_cells(
        cells, args.out, open_crew(args), control=control, videos=args.video, console=console
    )
    if not complete:
        console.print("Interrupted. The same command continues.", highlight=False)
    console.print(f"Report: vla-pruner report {args.out}", highlight=False, soft_wrap=True)
    return 0 if complete else INTERRUPTED
