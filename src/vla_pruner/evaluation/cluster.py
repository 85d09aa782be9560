"""Ray actors that run episodes, on one machine or many; one that dies or hangs is replaced."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from vla_pruner.evaluation.episode import Episode
from vla_pruner.evaluation.rollouts import Job, Runner
from vla_pruner.evaluation.workers import Queue, attempt, check_limits, one_thread
from vla_pruner.models.loading import load


class _Actor:
    """A policy and a scene, in a process of Ray's."""

    def __init__(self, device: str) -> None:
        one_thread()
        self._runner = Runner(partial(load, device=device))

    def ready(self) -> None:
        """Returns when the actor has been placed and started."""

    def run(self, job: Job) -> Episode | Exception:
        """The episode, or why there is none."""
        return attempt(self._runner, job)


@dataclass
class RayActors:
    """Episodes in actors of a Ray cluster, each with its own policy and scene.

    An actor that dies, with its process or its node, or that is silent for longer than
    `time_limit`, is replaced, and its episode begun anew. An actor that finds no free place in the
    cluster is waited for, but holds no episode.

    Args:
        address: of a running cluster; "auto" is the one on this machine.
        workers: number of actors.
        time_limit: seconds that an episode may take.
        gpus: that an actor reserves, besides one CPU; a fraction shares one.
        device: where policies run.
    """

    address: str = "auto"
    workers: int = 2
    time_limit: float = 1800.0
    device: str = "cpu"
    gpus: float = 0

    def __post_init__(self) -> None:
        check_limits(self.workers, self.time_limit)

    def run(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, Episode]]:
        """Each episode when it has finished; see `workers.Crew.run`.

        Raises:
            ModuleNotFoundError: Ray is not installed.
            RuntimeError: no cluster answers.
        """
        import ray

        began = not ray.is_initialized()
        if began:
            try:
                _reach(self.address)
                ray.init(address=self.address, log_to_driver=False)
            except OSError as error:
                raise RuntimeError(
                    f"no Ray cluster answers at {self.address!r} ({error}); start one with "
                    "`ray start --head`, or give the address of its head"
                ) from error
        try:
            yield from _Dispatch(self).run(Queue(jobs))
        finally:
            if began:
                ray.shutdown()


def _reach(address: str) -> None:
    """Raise OSError at once where nothing listens; Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdecimal():
        socket.create_connection((host, int(port)), timeout=10).close()


class _Dispatch:
    """Which actor does what, as long as `RayActors.run` lasts."""

    def __init__(self, crew: RayActors) -> None:
        import ray

        self._ray, self._crew = ray, crew
        self._class = ray.remote(num_cpus=1, num_gpus=crew.gpus)(_Actor)
        self._idle: list[Any] = []
        self._waited: dict[Any, tuple[Any, Job | None, float]] = {}
        """By reference to a result: the actor, its job (None: it is starting) and its deadline."""

    def run(self, queue: Queue) -> Iterator[tuple[Job, Episode]]:
        """Each episode when it has finished."""
        try:
            while self._hand_out(queue):
                now = time.monotonic()
                patience = min(deadline for _, _, deadline in self._waited.values()) - now
                ready, _ = self._ray.wait(
                    list(self._waited),
                    timeout=None if patience == float("inf") else max(0, patience),
                )
                for result in ready:
                    actor, job, _ = self._waited.pop(result)
                    try:
                        answer = self._ray.get(result)
                    except self._ray.exceptions.RayError as error:
                        self._discard(actor)
                        if job is not None:
                            queue.died(job, f"its actor died ({type(error).__name__})")
                        continue
                    self._idle.append(actor)
                    if job is not None:
                        if isinstance(answer, Exception):
                            raise answer
                        yield job, answer
                self._replace_late(queue)
        finally:
            for actor in [*self._idle, *(actor for actor, _, _ in self._waited.values())]:
                self._discard(actor)
        queue.finish()

    def _hand_out(self, queue: Queue) -> bool:
        """Give jobs to idle actors, and start actors for those left. False: all is done."""
        while self._idle and (job := queue.take()) is not None:
            actor = self._idle.pop()
            deadline = time.monotonic() + self._crew.time_limit
            self._waited[actor.run.remote(job)] = actor, job, deadline
        busy = sum(job is not None for _, job, _ in self._waited.values())
        if queue.empty():
            return busy > 0
        while len(self._waited) + len(self._idle) < self._crew.workers:
            actor = self._class.remote(self._crew.device)
            self._waited[actor.ready.remote()] = actor, None, float("inf")
        return True

    def _replace_late(self, queue: Queue) -> None:
        now = time.monotonic()
        for result, (actor, job, deadline) in list(self._waited.items()):
            if job is not None and now >= deadline:
                del self._waited[result]
                self._discard(actor)
                queue.died(job, f"it took longer than {self._crew.time_limit:g} s")

    def _discard(self, actor: Any) -> None:
        self._ray.kill(actor)
