"""A policy in one actor of Ray, and the simulators that ask it in others."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
from torch import nn

from vla_pruner.core.session import Session
from vla_pruner.evaluation.episode import Condition, Episode
from vla_pruner.evaluation.pilot import Answer, LocalPilot, Pilot
from vla_pruner.evaluation.rollouts import Job, Policies, Runner, Setup
from vla_pruner.evaluation.workers import attempt, one_thread
from vla_pruner.models.loading import load


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
        self._pilots: dict[str, LocalPilot] = {}

    def ready(self) -> None:
        """Returns when the actor has been placed and started."""

    def open(self, key: str, setup: Setup, condition: Condition) -> tuple[float, bool]:
        """A pilot called `key`; what it says of itself (`side`, `wants_motion`)."""
        if setup.policy != self._name:
            self._shared.clear()
            self._pilots.clear()
            self._name = setup.policy
        policy = self._policies.get(setup)
        if condition.name not in self._shared:
            own = share(policy)
            self._shared[condition.name] = own, condition.attach(own)
        pilot = self._pilots[key] = LocalPilot(*self._shared[condition.name])
        return pilot.side, pilot.wants_motion

    def begin(self, key: str, seed: int) -> None:
        """See `Pilot.begin`."""
        self._pilots[key].begin(seed)

    def act(
        self, key: str, images: Sequence[np.ndarray], instruction: str, state: Any, draw: bool
    ) -> Answer:
        """See `Pilot.act`."""
        return self._pilots[key].act(images, instruction, state, draw=draw)

    def moved(self, key: str, distance: float) -> None:
        """See `Pilot.moved`."""
        self._pilots[key].moved(distance)

    def end(self, key: str) -> None:
        """Forget a pilot; one that is not known is no error."""
        if (pilot := self._pilots.pop(key, None)) is not None:
            pilot.end()


def share(policy: nn.Module) -> nn.Module:
    """The same modules once more, over the same weights: hooks of one do not touch the other."""
    kept = [*policy.parameters(), *policy.buffers(), getattr(policy, "tokenizer", None)]
    return copy.deepcopy(policy, {id(one): one for one in kept if one is not None})


class SimulatorActor:
    """A scene, kept open, for policies of other actors."""

    def __init__(self) -> None:
        one_thread()
        self._runner = _RemoteRunner()

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


class _RemoteRunner(Runner):
    """Runs episodes with the policy of an actor."""

    def ask(self, policy: Any, key: str) -> None:
        """Which actor the next episode asks, and what the episode is called there."""
        self._asked, self._key = policy, key

    @contextmanager
    def pilot(self, job: Job) -> Iterator[Pilot]:
        """The policy of a job, under its condition."""
        yield _RemotePilot(self._asked, self._key, job)
        self._asked.end.remote(self._key)


class _RemotePilot:
    """See `Pilot`; every question waits for its answer."""

    def __init__(self, policy: Any, key: str, job: Job) -> None:
        import ray

        self._policy, self._key, self._wait = policy, key, ray.get
        opened = policy.open.remote(key, job.setup, job.condition)
        self.side, self.wants_motion = self._wait(opened)

    def begin(self, seed: int) -> None:
        self._wait(self._policy.begin.remote(self._key, seed))

    def act(
        self, images: Sequence[np.ndarray], instruction: str, state: Any, *, draw: bool
    ) -> Answer:
        return self._wait(self._policy.act.remote(self._key, images, instruction, state, draw))

    def moved(self, distance: float) -> None:
        self._wait(self._policy.moved.remote(self._key, distance))
