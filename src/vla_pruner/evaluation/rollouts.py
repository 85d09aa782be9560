"""Many episodes, in pairs: the same scenes under several conditions, resumable, in processes."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import torch
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
from vla_pruner.evaluation.episode import Condition, Control, Episode, Scene, rollout
from vla_pruner.evaluation.summary import Summary, summarise, write_summary
from vla_pruner.models.loading import load, locate

RESULTS = "results.jsonl"
FORMAT = 1

OpenPolicy = Callable[[str], nn.Module]


@dataclass(frozen=True)
class Task:
    """A task to be solved, and the scenes kept for evaluation.

    Args:
        open_scene: makes the scene; must be a module's function or class if processes are used.
        cameras: cameras of the scene.
        seeds: scenes that no policy was trained on.
        objects: what an instruction may name; a seed asks for number `seed % len(objects)`.
        step_limit: an episode fails after this many steps.
        hz: steps in a second of simulated time.
    """

    open_scene: Callable[[], Scene]
    cameras: tuple[str, ...]
    seeds: Sequence[int]
    objects: tuple[str, ...]
    step_limit: int
    hz: float

    def held_out(self, episodes: int, first: int = 0) -> list[int]:
        """Seeds of `episodes` scenes, from number `first` of the held-out ones.

        Raises:
            ValueError: fewer than one, or more than there are.
        """
        if episodes < 1 or first < 0 or first + episodes > len(self.seeds):
            raise ValueError(
                f"{episodes} episodes from held-out scene {first}: there are {len(self.seeds)} "
                f"scenes, number 0 to {len(self.seeds) - 1}"
            )
        return list(self.seeds[first : first + episodes])


def reference_task() -> Task:
    """Pick and place by language, the task of the policies that ship with the package.

    Raises:
        ImportError: the simulator is not installed.
    """
    from vla_pruner.reference import scene

    return Task(
        open_scene=scene.PickPlaceScene,
        cameras=scene.CAMERAS,
        seeds=scene.EVALUATION_SEEDS,
        objects=scene.OBJECT_NAMES,
        step_limit=scene.STEP_LIMIT,
        hz=scene.CONTROL_HZ,
    )


@dataclass(frozen=True)
class Setup:
    """What must be the same for episodes to be comparable.

    Args:
        policy: name or folder.
        weights: fingerprint of the policy's parameters.
        control: how the policy is driven.
        step_limit: an episode fails after this many steps.
        objects: what an instruction may name.
    """

    policy: str
    weights: str
    control: Control
    step_limit: int
    objects: tuple[str, ...]

    @classmethod
    def of(cls, name: str, policy: nn.Module, task: Task, execute: int | None = None) -> Setup:
        """The setup of a loaded policy; `execute` overrides the actions per call."""
        control = Control.of(policy, task.cameras, folder=Path(locate(name)), execute=execute)
        return cls(name, fingerprint(policy), control, task.step_limit, task.objects)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return json.loads(json.dumps({"format": FORMAT, **asdict(self)}))


def fingerprint(policy: nn.Module) -> str:
    """Twelve hexadecimal digits that change when any parameter or buffer does."""
    digest = hashlib.sha256()
    for name, tensor in sorted(policy.state_dict().items()):
        digest.update(name.encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


class EpisodeLog:
    """Finished episodes in a file, one JSON line each, after a line that holds the setup.

    What is in the file when a process dies is kept: a last line that was cut off is dropped.
    """

    def __init__(self, path: Path, setup: Setup) -> None:
        """Open a log, or start one.

        Raises:
            ValueError: the file belongs to another setup, or is damaged.
        """
        self.path = path
        self.episodes: dict[tuple[str, int], Episode] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        complete = self._read(setup) if path.exists() else 0
        with path.open("ab") as file:
            file.truncate(complete)
        if complete == 0:
            self._write(setup.as_dict())

    def append(self, episode: Episode) -> None:
        """Keep a finished episode."""
        self._write(episode.as_dict())
        self.episodes[episode.condition, episode.seed] = episode

    def of(self, conditions: Sequence[Condition], seeds: Sequence[int]) -> list[Episode]:
        """The finished episodes among these, scene by scene."""
        names = [(condition.name, seed) for seed in seeds for condition in conditions]
        return [self.episodes[name] for name in names if name in self.episodes]

    def missing(
        self, conditions: Sequence[Condition], seeds: Sequence[int]
    ) -> list[tuple[Condition, int]]:
        """What is left to run: scene by scene, under all conditions, each scene in another order.

        Neighbours in time are thus the same scene, and no condition always comes first.
        """
        turns = len(conditions)
        ordered = [
            (conditions[(number + turn) % turns], seed)
            for number, seed in enumerate(seeds)
            for turn in range(turns)
        ]
        return [(c, seed) for c, seed in ordered if (c.name, seed) not in self.episodes]

    def _write(self, values: dict[str, Any]) -> None:
        line = json.dumps(values, separators=(",", ":")).encode() + b"\n"
        with self.path.open("ab", buffering=0) as file:  # one call: all of the line or none of it
            file.write(line)

    def _read(self, setup: Setup) -> int:
        """Take over what the file holds; returns the length of its complete lines in bytes."""
        complete, _, _ = self.path.read_bytes().rpartition(b"\n")
        lines = complete.splitlines()
        if not lines:
            return 0
        try:
            found, *episodes = [json.loads(line) for line in lines]
            for values in episodes:
                episode = Episode.from_dict(values)
                self.episodes[episode.condition, episode.seed] = episode
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.path} is damaged ({type(error).__name__}: {error}); remove it and run again"
            ) from error
        wanted = setup.as_dict()
        if found != wanted:
            differing = [name for name in wanted if found.get(name) != wanted[name]]
            raise ValueError(
                f"{self.path} holds episodes of another {', '.join(differing)} "
                f"({found.get(differing[0])!r} instead of {wanted[differing[0]]!r}); continue with "
                "the same one, or choose another folder with --out"
                if differing
                else f"{self.path} is no log of episodes; choose another folder with --out"
            )
        return len(complete) + 1


def run_paired(
    policy: nn.Module,
    scene: Scene,
    work: Iterable[tuple[Condition, int]],
    setup: Setup,
    *,
    record: Callable[[int], bool] = lambda seed: False,
) -> Iterator[Episode]:
    """Run episodes one after the other in this process.

    Before the first, every condition makes a few calls that are not counted, so that none pays for
    what a process does only once.

    Args:
        policy: the policy, without a session.
        scene: where it acts.
        work: conditions and seeds in the order to run them, see `EpisodeLog.missing`.
        setup: how.
        record: whether to record the episode of a seed.

    Yields:
        Each episode when it has finished.
    """
    work = list(work)
    warmed: set[str] = set()
    for condition, seed in work:
        if condition.name not in warmed:
            warmed.add(condition.name)
            _run(policy, scene, condition, seed, setup, warm_up=True)
    for condition, seed in work:
        yield _run(policy, scene, condition, seed, setup, record=record(seed))


def _run(
    policy: nn.Module,
    scene: Scene,
    condition: Condition,
    seed: int,
    setup: Setup,
    *,
    record: bool = False,
    warm_up: bool = False,
) -> Episode:
    """One episode under one condition; with `warm_up` only its first calls."""
    session = condition.attach(policy)
    steps = setup.step_limit
    if warm_up:
        calls = 2 if session is None else session.method.warmup + 2
        steps = min(steps, calls * setup.control.execute)
    try:
        return rollout(
            policy,
            scene,
            seed,
            seed % len(setup.objects),
            control=setup.control,
            step_limit=steps,
            session=session,
            condition=condition.name,
            record=record,
        )
    finally:
        if session is not None:
            session.remove()


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


# -- several processes ---------------------------------------------------------------------------

# Of a worker process: the policy, its scene and how to run; conditions whose first calls are over.
_worker: tuple[nn.Module, Scene, Setup] | None = None
_worker_warmed: set[str] = set()


def evaluate(
    policy: str,
    *,
    conditions: Sequence[str | Condition],
    episodes: int,
    out: str | Path,
    workers: int = 2,
    first: int = 0,
    execute: int | None = None,
    task: Task | None = None,
    open_policy: OpenPolicy | None = None,
) -> Summary:
    """Success and cost of a policy under several conditions, over held-out scenes.

    Writes `results.jsonl` (grows with every episode), `summary.json` and `summary.md` to `out`. Run
    again with the same folder, it continues; more episodes or conditions may be asked for then.
    After Ctrl-C the episodes in progress are finished and summarised.

    Args:
        policy: name of a policy that ships with the package, or a folder.
        conditions: such as "none", "vla-pruner@0.5"; differences are taken to "none".
        episodes: scenes; each is run under every condition.
        out: folder for the results.
        workers: processes, one thread each. Latencies are comparable within one evaluation.
        first: number of the first held-out scene.
        execute: overrides how many actions of a chunk are carried out.
        task: None: the reference task.
        open_policy: a module's function; None: `vla_pruner.models.loading.load`.

    Returns:
        The summary that was written.

    Raises:
        ValueError: impossible arguments, or results of another setup in `out`.
        RuntimeError: a worker process died.
    """
    chosen = [c if isinstance(c, Condition) else Condition.parse(c) for c in conditions]
    if not chosen or len({c.name for c in chosen}) < len(chosen):
        raise ValueError(f"need different conditions, got {[c.name for c in chosen]}")
    if workers < 1:
        raise ValueError(f"workers={workers}: at least one process is needed")
    task, open_policy, out = task or reference_task(), open_policy or load, Path(out)
    seeds = task.held_out(episodes, first)
    setup = Setup.of(policy, open_policy(policy), task, execute)
    log = EpisodeLog(out / RESULTS, setup)
    work = log.missing(chosen, seeds)
    total = len(chosen) * len(seeds)
    with progress_bar() as bar:
        line = bar.add_task(policy, total=total, completed=total - len(work))
        for episode in _run_in_processes(work, workers, policy, setup, open_policy, task):
            log.append(episode)
            bar.advance(line)
    result = summarise(
        log.of(chosen, seeds),
        chosen,
        planned=total,
        settings={**setup.as_dict(), "seeds": [seeds[0], seeds[-1]], "workers": workers},
        environment={**stamp(), "threads": 1},
    )
    write_summary(result, out)
    return result


def _run_in_processes(
    work: Sequence[tuple[Condition, int]],
    workers: int,
    policy: str,
    setup: Setup,
    open_policy: OpenPolicy,
    task: Task,
) -> Iterator[Episode]:
    """`run_paired` in several processes, without recordings."""
    if not work:
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    pool = ProcessPoolExecutor(
        workers,
        multiprocessing.get_context("spawn"),
        _open_worker,
        (policy, setup, open_policy, task.open_scene),
    )
    try:
        yield from _finished(pool, work)
    finally:
        pool.shutdown(cancel_futures=True)


def _finished(
    pool: ProcessPoolExecutor, work: Iterable[tuple[Condition, int]]
) -> Iterator[Episode]:
    """Episodes as they finish; after Ctrl-C those in progress, after a second one none."""
    waiting = {pool.submit(_run_in_worker, *item) for item in work}
    interrupted = False
    while waiting:
        try:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
        except KeyboardInterrupt:
            if interrupted:
                raise
            interrupted = True
            waiting = {future for future in waiting if not future.cancel()}
            continue
        for future in done:
            yield future.result()


def _open_worker(
    policy: str, setup: Setup, open_policy: OpenPolicy, open_scene: Callable[[], Scene]
) -> None:
    """Prepare a process: one thread, its own policy and scene; Ctrl-C is for the parent."""
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    scene = open_scene()
    Finalize(None, scene.close, exitpriority=0)  # before atexit, where MuJoCo ends its contexts
    _worker = open_policy(policy), scene, setup


def _run_in_worker(condition: Condition, seed: int) -> Episode:
    assert _worker is not None
    policy, scene, setup = _worker
    if condition.name not in _worker_warmed:
        _worker_warmed.add(condition.name)
        _run(policy, scene, condition, seed, setup, warm_up=True)
    return _run(policy, scene, condition, seed, setup)
