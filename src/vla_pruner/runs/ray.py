"""Ray actors that run episodes, on one machine or many; one that dies or hangs is replaced."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any
from uuid import uuid4

from vla_pruner._short import short
from vla_pruner.episodes.episode import Episode
from vla_pruner.models.loading import load
from vla_pruner.runs.job import Job
from vla_pruner.runs.processes import Queue, attempt, check_limits, one_thread
from vla_pruner.runs.ray_actors import PolicyActor, PolicyGone, SimulatorActor
from vla_pruner.runs.runner import EpisodeRunner

PATIENCE = 30.0
"""Seconds within which an actor with a policy has to give a sign of life."""


class _Actor:
    """A policy and a scene, in a process of Ray's."""

    def __init__(self, device: str) -> None:
        one_thread()
        self._runner = EpisodeRunner(partial(load, device=device))

    def ready(self) -> None:
        """Returns when the actor has been placed and started."""

    def run(self, job: Job) -> Episode | Exception:
        """The episode, or why there is none."""
        return attempt(self._runner, job)


@dataclass
class RayActors:
    """Episodes in actors of a Ray cluster: each with a policy and a scene, or policies apart.

    An actor that dies, with its process or its node, or that is silent for longer than
    `time_limit`, is replaced, and its episode begun anew. An actor that finds no free place in the
    cluster is waited for, but holds no episode. With `policies`, that many actors hold the policy
    and act for the scenes of the others; when one dies, the episodes that asked it are begun anew.

    Args:
        address: of a running cluster; "auto" is the one on this machine.
        workers: number of actors with a scene.
        time_limit: seconds that an episode may take.
        device: where policies run.
        gpus: that an actor with a policy reserves; a fraction shares one. Every actor also
            reserves one CPU, but for those that hold a policy alone, on a GPU.
        policies: number of actors that hold a policy alone; 0: each has one beside its scene.
    """

    address: str = "auto"
    workers: int = 2
    time_limit: float = 1800.0
    device: str = "cpu"
    gpus: float = 0
    policies: int = 0

    def __post_init__(self) -> None:
        check_limits(self.workers, self.time_limit)
        if self.policies < 0 or self.gpus < 0:
            raise ValueError(f"policies={self.policies}, gpus={self.gpus}: 0 or more are needed")

    def run(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, Episode]]:
        """Each episode when it has finished; see `processes.Executor.run`.

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
                    f"no Ray cluster answers at {short(self.address)} ({error}); start one with "
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


@dataclass(eq=False)
class _Policy:
    """An actor with a policy, and how many simulators it acts for."""

    actor: Any
    ready: bool = False
    busy: int = 0


@dataclass(eq=False)
class _Awaited:
    """What a result is awaited for: an episode, or (no job) an actor that starts."""

    actor: Any
    job: Job | None = None
    deadline: float = float("inf")
    policy: _Policy | None = None
    key: str = ""


class _Dispatch:
    """Which actor does what, as long as `RayActors.run` lasts."""

    def __init__(self, executor: RayActors) -> None:
        import ray

        self._ray, self._executor, self._split = ray, executor, executor.policies > 0
        if self._split:
            # Beside a GPU, a policy needs hardly any of a CPU.
            cpus = 0 if executor.gpus else 1
            self._policy_class = ray.remote(num_cpus=cpus, num_gpus=executor.gpus)(PolicyActor)
            self._class = ray.remote(num_cpus=1)(SimulatorActor)
        else:
            self._class = ray.remote(num_cpus=1, num_gpus=executor.gpus)(_Actor)
        self._policies: list[_Policy] = []
        self._idle: list[Any] = []
        self._waited: dict[Any, _Awaited] = {}
        """By reference to a result."""

    def run(self, queue: Queue) -> Iterator[tuple[Job, Episode]]:
        """Each episode when it has finished."""
        try:
            while self._hand_out(queue):
                now = time.monotonic()
                patience = min(one.deadline for one in self._waited.values()) - now
                ready, _ = self._ray.wait(
                    list(self._waited),
                    timeout=None if patience == float("inf") else max(0, patience),
                )
                for result in ready:
                    if (done := self._receive(result, queue)) is not None:
                        yield done
                self._replace_late(queue)
        finally:
            starting = [one.actor for one in self._waited.values()]
            for actor in [*self._idle, *starting, *(policy.actor for policy in self._policies)]:
                self._discard(actor)
        queue.finish()

    def _receive(self, result: Any, queue: Queue) -> tuple[Job, Episode] | None:
        """What became of an actor that was awaited; the episode, if it was one."""
        awaited = self._waited.pop(result)
        job, policy = awaited.job, awaited.policy
        try:
            answer = self._ray.get(result)
        except self._ray.exceptions.RayError as error:
            self._lose(awaited, f"its actor died ({type(error).__name__})", queue)
            return None
        if job is None and policy is not None:
            policy.ready = True
            return None
        self._idle.append(awaited.actor)
        if policy is not None:
            policy.busy -= 1
        if job is None:
            return None
        if isinstance(answer, PolicyGone):
            assert policy is not None
            self._close(policy)
            queue.died(job, "the actor with its policy died")
            return None
        if isinstance(answer, Exception):
            queue.failed(job, answer)
            return None
        return job, answer

    def _hand_out(self, queue: Queue) -> bool:
        """Give jobs to idle actors, and start actors for those left. False: all is done."""
        while self._idle and (job := queue.peek()) is not None and self._may_begin(job):
            queue.take()
            actor = self._idle.pop()
            deadline = time.monotonic() + self._executor.time_limit
            if not self._split:
                self._waited[actor.run.remote(job)] = _Awaited(actor, job, deadline)
                continue
            policy = min(self._open_policies(), key=lambda policy: policy.busy)
            policy.busy += 1
            key = uuid4().hex
            result = actor.run.remote(job, policy.actor, key)
            self._waited[result] = _Awaited(actor, job, deadline, policy, key)
        if queue.empty():
            return any(one.job is not None for one in self._waited.values())
        while len(self._policies) < self._executor.policies:
            policy = _Policy(self._policy_class.remote(self._executor.device))
            self._policies.append(policy)
            self._waited[policy.actor.ready.remote()] = _Awaited(policy.actor, policy=policy)
        if self._split and not self._open_policies():
            return True  # Simulators come later: they must not take a policy's place.
        while len(self._simulators()) + len(self._idle) < self._executor.workers:
            actor = self._class.remote(*(() if self._split else (self._executor.device,)))
            self._waited[actor.ready.remote()] = _Awaited(actor)
        return True

    def _may_begin(self, job: Job) -> bool:
        """Whether a policy can act in it: another one waits until that before is not needed."""
        if not self._split:
            return True
        busy = [one.job.setup.policy for one in self._waited.values() if one.job is not None]
        return bool(self._open_policies()) and all(name == job.setup.policy for name in busy)

    def _open_policies(self) -> list[_Policy]:
        return [policy for policy in self._policies if policy.ready]

    def _simulators(self) -> list[_Awaited]:
        """Those at work or starting."""
        return [one for one in self._waited.values() if one.job is not None or one.policy is None]

    def _replace_late(self, queue: Queue) -> None:
        now = time.monotonic()
        for result, awaited in list(self._waited.items()):
            if awaited.job is not None and now >= awaited.deadline:
                del self._waited[result]
                self._lose(awaited, f"it took longer than {self._executor.time_limit:g} s", queue)
                if awaited.policy is not None and not self._answers(awaited.policy):
                    self._close(awaited.policy)

    def _lose(self, awaited: _Awaited, reason: str, queue: Queue) -> None:
        """An actor is not there any more, and what it did has no result."""
        self._discard(awaited.actor)
        if awaited.job is None:
            if awaited.policy is not None:
                self._close(awaited.policy)
            return
        if awaited.policy is not None:
            awaited.policy.busy -= 1
            awaited.policy.actor.end.remote(awaited.key)
        queue.died(awaited.job, reason)

    def _answers(self, policy: _Policy) -> bool:
        ready, _ = self._ray.wait([policy.actor.ready.remote()], timeout=PATIENCE)
        return bool(ready)

    def _close(self, policy: _Policy) -> None:
        if policy in self._policies:
            self._policies.remove(policy)
            self._discard(policy.actor)

    def _discard(self, actor: Any) -> None:
        self._ray.kill(actor)
