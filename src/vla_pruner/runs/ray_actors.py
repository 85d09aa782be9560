"""A policy in one actor of Ray, and the simulators that ask it in others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
from torch import nn

from vla_pruner.core.session import Session
from vla_pruner.episodes.condition import Condition
from vla_pruner.episodes.episode import Episode
from vla_pruner.episodes.policy_runner import Answer, LocalPolicyRunner, PolicyRunner
from vla_pruner.models.loading import load
from vla_pruner.models.pi0.chunking import Guide
from vla_pruner.models.port import share
from vla_pruner.runs.job import Job, Setup
from vla_pruner.runs.processes import attempt, one_thread
from vla_pruner.runs.runner import EpisodeRunner, Policies


class PolicyGone(Exception):
    """The actor with the policy died in mid-episode."""


class PolicyActor:
    """A policy that acts for the simulators of other actors.

    It answers one call at a time, of one episode: an episode is the same, to the bit, as in a
    process of its own. Every condition has a copy of the modules to attach to, over the same
    weights, so that simulators may be under different ones.

    Args:
        device: where the policy runs.
    """

    def __init__(self, device: str) -> None:
        one_thread()
        self._policies = Policies(partial(load, device=device))
        self._name: str | None = None
        self._shared: dict[str, tuple[nn.Module, Session | None]] = {}
        self._runners: dict[str, LocalPolicyRunner] = {}

    def ready(self) -> None:
        """Returns when the actor has been placed and started."""

    def open(self, key: str, setup: Setup, condition: Condition) -> tuple[float, bool]:
        """A runner called `key`; what it says of itself (`side`, `wants_motion`)."""
        if setup.policy != self._name:
            self._shared.clear()
            self._runners.clear()
            self._name = setup.policy
        if setup.captured:
            raise ValueError(
                "--capture: policies of their own actors (--policy-actors) are not captured; leave "
                "one of the two out"
            )
        policy = self._policies.get(setup)
        if condition.name not in self._shared:
            own = share(policy)
            self._shared[condition.name] = own, condition.attach(own)
        runner = self._runners[key] = LocalPolicyRunner(
            *self._shared[condition.name], setup.control.arguments
        )
        return runner.side, runner.wants_motion

    def begin(self, key: str, seed: int) -> None:
        """See `PolicyRunner.begin`."""
        self._runners[key].begin(seed)

    def act(
        self,
        key: str,
        images: Sequence[np.ndarray],
        instruction: str,
        state: Any,
        picture: bool,
        guide: Guide | None = None,
    ) -> Answer:
        """See `PolicyRunner.act`."""
        return self._runners[key].act(images, instruction, state, picture=picture, guide=guide)

    def moved(self, key: str, distance: float) -> None:
        """See `PolicyRunner.moved`."""
        self._runners[key].moved(distance)

    def end(self, key: str) -> None:
        """Forget a runner; one that is not known is no error."""
        if (runner := self._runners.pop(key, None)) is not None:
            runner.end()


class SimulatorActor:
    """A scene, kept open, for policies of other actors."""

    def __init__(self) -> None:
        one_thread()
        self._runner = _RemoteEpisodeRunner()

    def ready(self) -> None:
        """Returns when the actor has been placed and started."""

    def run(self, job: Job, policy: Any, key: str) -> Episode | Exception:
        """The episode, or why there is none; `PolicyGone` if the policy's actor died.

        Args:
            job: the episode.
            policy: handle of a `PolicyActor`.
            key: name of the episode there.
        """
        from ray.exceptions import RayActorError, RayTaskError

        self._runner.ask(policy, key)
        found = attempt(self._runner, job)
        if isinstance(found, RayActorError):
            return PolicyGone(str(found))
        if isinstance(found, RayTaskError):
            for note in found.__notes__:
                found.cause.add_note(note)
            return found.cause
        return found


class _RemoteEpisodeRunner(EpisodeRunner):
    """Runs episodes with the policy of an actor."""

    def ask(self, policy: Any, key: str) -> None:
        """Which actor the next episode asks, and what the episode is called there."""
        self._asked, self._key = policy, key

    @contextmanager
    def policy_of(self, job: Job) -> Iterator[PolicyRunner]:
        """The policy of a job, under its condition."""
        yield _RemotePolicyRunner(self._asked, self._key, job)
        self._asked.end.remote(self._key)


class _RemotePolicyRunner:
    """See `PolicyRunner`; every question waits for its answer."""

    def __init__(self, policy: Any, key: str, job: Job) -> None:
        import ray

        self._policy, self._key, self._wait = policy, key, ray.get
        opened = policy.open.remote(key, job.setup, job.condition)
        self.side, self.wants_motion = self._wait(opened)

    def begin(self, seed: int) -> None:
        self._wait(self._policy.begin.remote(self._key, seed))

    def act(
        self,
        images: Sequence[np.ndarray],
        instruction: str,
        state: Any,
        *,
        picture: bool,
        guide: Guide | None = None,
    ) -> Answer:
        seen = images, instruction, state, picture, guide
        return self._wait(self._policy.act.remote(self._key, *seen))

    def moved(self, distance: float) -> None:
        self._wait(self._policy.moved.remote(self._key, distance))
