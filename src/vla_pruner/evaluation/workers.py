"""Processes that run episodes; one that dies or hangs is replaced."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import traceback
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Protocol

import torch

from vla_pruner.evaluation.episode import Episode
from vla_pruner.evaluation.rollouts import Job, OpenPolicy, Runner
from vla_pruner.models.loading import load

ATTEMPTS = 3
"""How often an episode is begun before it is given up, where processes die or hang."""


class Crew(Protocol):
    """Whatever runs episodes: processes of this machine, or of many."""

    def run(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, Episode]]:
        """Each episode when it has finished, in any order.

        A job is taken from `jobs` when something is free to run it.

        Raises:
            EpisodesFailed: some could not be run; all others were.
        """


class EpisodesFailed(RuntimeError):
    """Episodes that were given up."""

    def __init__(self, failures: dict[Job, str]) -> None:
        lines = [f"{job}: {reason}" for job, reason in failures.items()]
        more = f"\n... and {len(lines) - 5} more" if len(lines) > 5 else ""
        super().__init__(
            f"{len(lines)} episodes could not be run; all others are kept, and the same command "
            "tries these again:\n" + "\n".join(lines[:5]) + more
        )
        self.failures = failures


@dataclass
class _Worker:
    process: SpawnProcess
    pipe: Connection
    job: Job | None = None
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
        time_limit: seconds that an episode may take, its process and simulator included.
        open_policy: a module's function that loads a policy by name.
    """

    workers: int = 2
    time_limit: float = 1800.0
    open_policy: OpenPolicy = load

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"workers={self.workers}: at least one process is needed")
        if self.time_limit <= 0:
            raise ValueError(f"time_limit={self.time_limit}: seconds, more than none")

    def run(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, Episode]]:
        """Each episode when it has finished; see `Crew.run`."""
        fresh, again = iter(jobs), deque[Job]()
        begun: dict[Job, int] = {}
        failures: dict[Job, str] = {}
        crew: list[_Worker] = []
        try:
            while True:
                while sum(worker.job is not None for worker in crew) < self.workers:
                    job = again.popleft() if again else next(fresh, None)
                    if job is None:
                        break
                    begun[job] = begun.get(job, 0) + 1
                    self._hand(crew, job)
                if not any(worker.job for worker in crew):
                    break
                for worker, answer in self._answers(crew):
                    job, worker.job = worker.job, None
                    assert job is not None
                    if isinstance(answer, Episode):
                        yield job, answer
                    elif isinstance(answer, Exception):
                        raise answer
                    else:
                        crew.remove(worker)
                        worker.stop()
                        if begun[job] < ATTEMPTS:
                            again.append(job)
                        else:
                            failures[job] = answer
        finally:
            for worker in crew:
                worker.stop() if worker.job else worker.dismiss()
        if failures:
            raise EpisodesFailed(failures)

    def _hire(self) -> _Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, self.open_policy), daemon=True)
        process.start()
        theirs.close()
        return _Worker(process, ours)

    def _hand(self, crew: list[_Worker], job: Job) -> None:
        """Give a job to a worker that waits for one, or to a new one."""
        worker = next((worker for worker in crew if worker.job is None), None)
        if worker is None:
            worker = self._hire()
            crew.append(worker)
        worker.job, worker.deadline = job, time.monotonic() + self.time_limit
        with suppress(BrokenPipeError):  # It died meanwhile; reading its answer will say so.
            worker.pipe.send(job)

    def _answers(self, crew: list[_Worker]) -> Iterator[tuple[_Worker, Episode | Exception | str]]:
        """Workers that have finished, failed, died or run out of time, with what became of it."""
        busy = {worker.pipe: worker for worker in crew if worker.job}
        patience = min(worker.deadline for worker in busy.values()) - time.monotonic()
        ready = set(wait(list(busy), max(0.0, patience)))
        for pipe, worker in busy.items():
            if pipe in ready:
                try:
                    yield worker, pipe.recv()
                except (EOFError, ConnectionResetError):
                    worker.process.join()
                    code = worker.process.exitcode or 0
                    how = f"signal {-code}" if code < 0 else f"exit code {code}"
                    yield worker, f"its process died ({how})"
            elif time.monotonic() >= worker.deadline:
                yield worker, f"it took longer than {self.time_limit:g} s"


def _work(pipe: Connection, open_policy: OpenPolicy) -> None:
    """A worker process: one thread; Ctrl-C is for the parent; the end of the pipe is the end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    runner = Runner(open_policy)
    try:
        while True:
            job = pipe.recv()
            try:
                answer: Episode | Exception = runner.run(job)
            except Exception as error:
                error.add_note(f"in {job}:\n{traceback.format_exc()}")
                answer = error
            pipe.send(answer)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass
    finally:
        runner.close()
