"""What runs episodes: a policy and a scene, kept open in one process."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vla_pruner.evaluation.episode import Condition, Control, Episode, Scene, fly
from vla_pruner.evaluation.pilot import LocalPilot, Pilot
from vla_pruner.evaluation.suites import Suite
from vla_pruner.methods import build
from vla_pruner.models.loading import load, locate

OpenPolicy = Callable[[str], nn.Module]


@dataclass(frozen=True)
class Setup:
    """What must be the same for episodes to be comparable.

    Args:
        suite: name of the suite.
        policy: name or folder.
        weights: fingerprint of the policy's parameters.
        control: how the policy is driven.
        step_limit: an episode fails after this many steps.
        tasks: what is asked for, by target.
        stand_in_assets: whether some objects look other than in the published suite.
    """

    suite: str
    policy: str
    weights: str
    control: Control
    step_limit: int
    tasks: tuple[str, ...]
    stand_in_assets: bool = False

    @classmethod
    def of(cls, name: str, policy: nn.Module, suite: Suite, **control: Any) -> Setup:
        """The setup of a loaded policy; `control` overrides how it is driven, see `Control.of`."""
        return cls(
            suite=suite.name,
            policy=name,
            weights=fingerprint(policy),
            control=Control.of(policy, suite.cameras, folder=Path(locate(name)), **control),
            step_limit=suite.step_limit,
            tasks=suite.tasks,
            stand_in_assets=suite.stand_in_assets,
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Setup:
        """The setup that `as_dict` described."""
        control = Control(**{**values["control"], "cameras": tuple(values["control"]["cameras"])})
        return cls(**{**values, "control": control, "tasks": tuple(values["tasks"])})


def fingerprint(policy: nn.Module) -> str:
    """Twelve hexadecimal digits that change when any parameter or buffer does."""
    digest = hashlib.sha256()
    for name, tensor in sorted(policy.state_dict().items()):
        digest.update(name.encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


@dataclass(frozen=True, eq=False)
class Planned:
    """Scenes that a policy is to run in, under one condition.

    Args:
        setup: suite, policy and how it is driven.
        condition: what is done to the policy.
        settings: all options of the method, defaults included.
        recipe: digest of the calibration recipe; None: the method follows none.
        first: number of the first held-out scene.
        episodes: number of scenes.
    """

    setup: Setup
    condition: Condition
    settings: Mapping[str, Any]
    recipe: str | None
    first: int
    episodes: int


@dataclass(frozen=True, eq=False)
class Job:
    """One episode to be run.

    Args:
        planned: under which condition.
        suite: where the scene is.
        seed: number of the scene.
        record: also keep images, kept tokens and scores.
    """

    planned: Planned
    suite: Suite
    seed: int
    record: bool = False

    @property
    def setup(self) -> Setup:
        """Who acts, and how."""
        return self.planned.setup

    @property
    def condition(self) -> Condition:
        """What is done to the policy."""
        return self.planned.condition

    def __str__(self) -> str:
        setup = self.setup
        return f"{setup.policy} in {setup.suite}, {self.condition.name}, scene {self.seed}"


class Policies:
    """One policy, kept open until another one is needed.

    Args:
        open_policy: loads a policy by name.
    """

    def __init__(self, open_policy: OpenPolicy = load) -> None:
        self._open_policy = open_policy
        self._policy: nn.Module | None = None
        self._name: str | None = None

    def get(self, setup: Setup) -> nn.Module:
        """The policy of a setup.

        Raises:
            ValueError: its weights are not those of the setup.
        """
        if self._policy is None or self._name != setup.policy:
            self._policy = None  # Its memory is free before the next one is loaded.
            self._policy, self._name = self._open_policy(setup.policy), setup.policy
            if (found := fingerprint(self._policy)) != setup.weights:
                self._policy = None
                raise ValueError(
                    f"the weights of {setup.policy} are not those of the run ({found} instead of "
                    f"{setup.weights}); put the old ones back, or begin another run"
                )
        return self._policy


class Runner:
    """Runs episodes one after the other, and keeps the policy and the scene open between them.

    Before its first episode, every condition makes a few calls that are not counted, so that none
    pays for what a process does only once.

    Args:
        open_policy: loads a policy by name.
    """

    def __init__(self, open_policy: OpenPolicy = load) -> None:
        self._policies = Policies(open_policy)
        self._scene: Scene | None = None
        self._opened: tuple[str, str] | None = None
        self._warmed: set[str] = set()

    def run(self, job: Job) -> Episode:
        """One episode, from its beginning to its end.

        Raises:
            ValueError: the policy's weights are not those of the job.
        """
        scene = self._open(job)
        if job.condition.name not in self._warmed:
            self._fly(scene, job, warm_up=True)
            self._warmed.add(job.condition.name)
        return self._fly(scene, job)

    def close(self) -> None:
        """Free the simulator."""
        if self._scene is not None:
            self._scene.close()
        self._scene = self._opened = None
        self._warmed.clear()

    @contextmanager
    def pilot(self, job: Job) -> Iterator[Pilot]:
        """The policy of a job, under its condition."""
        policy = self._policies.get(job.setup)
        session = job.condition.attach(policy)
        try:
            yield LocalPilot(policy, session)
        finally:
            if session is not None:
                session.remove()

    def _open(self, job: Job) -> Scene:
        policy, suite = job.setup.policy, job.suite.name
        if self._opened is None or self._opened[1] != suite:
            self.close()
            self._scene = job.suite.open_scene()
        if self._opened != (policy, suite):
            self._warmed.clear()
            self._opened = policy, suite
        assert self._scene is not None
        return self._scene

    def _fly(self, scene: Scene, job: Job, *, warm_up: bool = False) -> Episode:
        """One episode; with `warm_up` only its first calls."""
        steps = job.setup.step_limit
        if warm_up:
            steps = min(steps, first_calls(job.condition) * job.setup.control.execute)
        with self.pilot(job) as pilot:
            return fly(
                pilot,
                scene,
                job.seed,
                job.suite.task_of(job.seed),
                control=job.setup.control,
                step_limit=steps,
                condition=job.condition.name,
                record=job.record and not warm_up,
            )


def first_calls(condition: Condition) -> int:
    """Calls of a new episode up to the second one that drops tokens."""
    if condition.keep is None:
        return 2
    return build(condition.method, keep=condition.keep, **dict(condition.options)).warmup + 2
