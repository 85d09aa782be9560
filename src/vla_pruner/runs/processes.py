"""Processes that run episodes; one that dies or hangs is replaced."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

import torch

from vla_pruner._short import cut
from vla_pruner.episodes.episode import Episode
from vla_pruner.models.loading import load
from vla_pruner.runs.job import Job, Planned
from vla_pruner.runs.runner import EpisodeRunner

ATTEMPTS = 3
"""How often an episode is begun before it is given up, where processes die or hang."""


class Executor(Protocol):
    """Whatever runs episodes: processes of this machine, or of many."""

    workers: int
    device: str

    def run(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, Episode]]:
        """Each episode when it has finished, in any order.

        A job is taken from `jobs` when something is free to run it.

        An error in an episode ends its cell; those of other cells go on.

        Raises:
            EpisodesFailed: some could not be run; all others were.
        """


class EpisodesFailed(RuntimeError):
    """Episodes that were given up.

    Args:
        failures: why, by episode.
        left_out: cells of which no more episodes were begun, as one of theirs raised an error.
        notes: tracebacks, for `--debug`.
    """

    def __init__(
        self,
        failures: Mapping[Job, str],
        left_out: Iterable[Planned] = (),
        notes: Iterable[str] = (),
    ) -> None:
        ended = set(left_out)
        lines = [
            f"{job}: {cut(reason, 1000)}"
            + ("; no more episodes of this cell were begun" if job.planned in ended else "")
            for job, reason in failures.items()
        ]
        more = f"\n... and {len(lines) - 5} more" if len(lines) > 5 else ""
        super().__init__(
            f"{len(lines)} episodes could not be run; all others are kept, and the same command "
            "tries these again:\n" + "\n".join(lines[:5]) + more
        )
        self.failures = failures
        for note in notes:
            self.add_note(note)


class Queue:
    """Jobs to hand out, each again where the process that had it died.

    Args:
        jobs: taken one by one, when they are asked for.
    """

    def __init__(self, jobs: Iterable[Job]) -> None:
        self._fresh = iter(jobs)
        self._again: deque[Job] = deque()
        self._begun: Counter[Job] = Counter()
        self._failures: dict[Job, str] = {}
        self._ended: dict[Planned, None] = {}
        self._notes: list[str] = []

    def empty(self) -> bool:
        """Whether `take` has nothing to give."""
        while not self._again and (job := next(self._fresh, None)) is not None:
            if job.planned not in self._ended:
                self._again.append(job)
        return not self._again

    def peek(self) -> Job | None:
        """What `take` would give."""
        return None if self.empty() else self._again[0]

    def take(self) -> Job | None:
        """The next job; None: there is none now."""
        if self.empty():
            return None
        job = self._again.popleft()
        self._begun[job] += 1
        return job

    def died(self, job: Job, reason: str) -> None:
        """A job that was taken has no result."""
        if self._begun[job] < ATTEMPTS:
            self._again.append(job)
        else:
            self._failures[job] = reason

    def failed(self, job: Job, error: Exception) -> None:
        """A job that was taken raised an error: its cell would raise it again, others may not."""
        said = str(error) or type(error).__name__
        self._failures[job] = said if isinstance(error, ValueError) else f"{_kind(error)}{said}"
        self._ended[job.planned] = None
        self._again = deque(one for one in self._again if one.planned is not job.planned)
        self._notes += getattr(error, "__notes__", [])[:1]

    def finish(self) -> None:
        """Raise `EpisodesFailed` if jobs were given up."""
        if self._failures:
            raise EpisodesFailed(self._failures, self._ended, self._notes)


def _kind(error: Exception) -> str:
    return "" if type(error) is RuntimeError else f"{type(error).__name__}: "


def check_limits(workers: int, time_limit: float) -> None:
    """Raise ValueError for an executor that could not run anything."""
    if workers < 1:
        raise ValueError(f"workers={workers}: at least one is needed")
    if time_limit <= 0:
        raise ValueError(f"time_limit={time_limit}: an episode needs more than no seconds")


def attempt(runner: EpisodeRunner, job: Job) -> Episode | Exception:
    """The episode, or the error in it, with a note on where it happened."""
    try:
        return runner.run(job)
    except Exception as error:
        error.add_note(f"in {job}:\n{traceback.format_exc()}")
        return error


def one_thread() -> None:
    """Let this process compute with one thread: latencies then do not depend on its neighbours'."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    job: Job | None = None
    started: bool = False
    deadline: float = field(default=float("inf"))

    def dismiss(self) -> None:
        """Let it close its simulator; it waits for work that will not come."""
        self.pipe.close()
        self.process.join(10)
        self.stop()

    def stop(self) -> None:
        """End it, whatever it does."""
        self.process.kill()
        self.process.join()
        self.pipe.close()


@dataclass
class Processes:
    """Episodes in processes of this machine, with one thread each.

    A process that dies, or that is silent for longer than `time_limit`, is replaced, and its
    episode begun anew.

    Args:
        workers: number of processes.
        time_limit: seconds that an episode may take, with what has to be opened for it.
        device: where policies run.
    """

    workers: int = 2
    time_limit: float = 1800.0
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_limits(self.workers, self.time_limit)

    def run(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, Episode]]:
        """Each episode when it has finished; see `Executor.run`."""
        queue, workers = Queue(jobs), list[_Worker]()
        try:
            while True:
                while sum(worker.job is not None for worker in workers) < self.workers:
                    if (next_job := queue.take()) is None:
                        break
                    self._hand(workers, next_job)
                if not any(worker.job for worker in workers):
                    break
                for worker, answer in self._answers(workers):
                    job, worker.job = worker.job, None
                    assert job is not None
                    if isinstance(answer, Episode):
                        yield job, answer
                    elif isinstance(answer, Exception):
                        queue.failed(job, answer)
                    else:
                        workers.remove(worker)
                        worker.stop()
                        queue.died(job, answer)
        finally:
            for worker in workers:
                worker.stop() if worker.job else worker.dismiss()
        queue.finish()

    def _start(self) -> _Worker:
        context = _context()
        ours, theirs = context.Pipe()
        given = (theirs, self.device, dict(os.environ))
        process = context.Process(target=_work, args=given, daemon=True)
        process.start()
        theirs.close()
        return _Worker(process, ours)

    def _hand(self, workers: list[_Worker], job: Job) -> None:
        """Give a job to a worker that waits for one, or to a new one."""
        worker = next((worker for worker in workers if worker.job is None), None)
        if worker is None:
            worker = self._start()
            workers.append(worker)
        worker.job = job
        if worker.started:
            worker.deadline = time.monotonic() + self.time_limit
        with suppress(BrokenPipeError):  # It died meanwhile; reading its answer will say so.
            worker.pipe.send(job)

    def _answers(
        self, workers: list[_Worker]
    ) -> Iterator[tuple[_Worker, Episode | Exception | str]]:
        """Workers that have finished, failed, died or run out of time, with what became of it."""
        busy = {worker.pipe: worker for worker in workers if worker.job}
        deadline = min(worker.deadline for worker in busy.values())
        patience = None if deadline == float("inf") else max(0.0, deadline - time.monotonic())
        ready = set(wait(list(busy), patience))
        for pipe, worker in busy.items():
            if pipe in ready:
                try:
                    answer = pipe.recv()
                    if answer is None:
                        worker.started = True
                        worker.deadline = time.monotonic() + self.time_limit
                    else:
                        yield worker, answer
                except (EOFError, ConnectionResetError):
                    worker.process.join()
                    code = worker.process.exitcode or 0
                    how = f"signal {-code}" if code < 0 else f"exit code {code}"
                    yield worker, f"its process died ({how})"
            elif time.monotonic() >= worker.deadline:
                yield worker, f"it took longer than {self.time_limit:g} s"


def _context() -> Any:
    """How processes begin: on Linux as copies of one that has imported what they need."""
    if not sys.platform.startswith("linux"):
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _work(pipe: Connection, device: str, environment: Mapping[str, str]) -> None:
    """A worker process; Ctrl-C is for the parent, and the end of the pipe is the end.

    `environment` is the parent's, which may have changed since the process this is a copy of.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.clear()
    os.environ.update(environment)
    one_thread()
    runner = EpisodeRunner(partial(load, device=device))
    try:
        pipe.send(None)  # It has started.
        while True:
            pipe.send(attempt(runner, pipe.recv()))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass
    finally:
        runner.close()
