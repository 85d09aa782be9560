"""What runs episodes: a policy and a scene, kept open in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

from vla_pruner.episodes.condition import Condition
from vla_pruner.episodes.episode import Episode, run_episode
from vla_pruner.episodes.motion import MotionMeter
from vla_pruner.episodes.policy_runner import LocalPolicyRunner, PolicyRunner
from vla_pruner.episodes.recording import Recorder
from vla_pruner.models.loading import load
from vla_pruner.runs.job import Job, Setup, fingerprint
from vla_pruner.scenes.scene import Scene

OpenPolicy = Callable[[str], nn.Module]


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
                    f"{setup.weights}): other weights, or another precision, as a CPU without "
                    "AVX-512 loads bf16 as float32. Put the old ones back, or begin another run"
                )
        return self._policy


class EpisodeRunner:
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
            self._run(scene, job, warm_up=True)
            self._warmed.add(job.condition.name)
        return self._run(scene, job)

    def close(self) -> None:
        """Free the simulator."""
        if self._scene is not None:
            self._scene.close()
        self._scene = self._opened = None
        self._warmed.clear()

    @contextmanager
    def policy_of(self, job: Job) -> Iterator[PolicyRunner]:
        """The policy of a job, under its condition."""
        policy = self._policies.get(job.setup)
        with job.condition.attached(policy, captured=job.setup.captured) as (own, session):
            yield LocalPolicyRunner(own, session, job.setup.control.arguments)

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

    def _run(self, scene: Scene, job: Job, *, warm_up: bool = False) -> Episode:
        """One episode; with `warm_up` only its first calls."""
        steps = job.setup.step_limit
        if warm_up:
            steps = min(steps, first_calls(job.condition) * job.setup.control.execute)
        recorder = Recorder() if job.record and not warm_up else None
        meter = MotionMeter(job.suite.hz)
        with self.policy_of(job) as policy:
            episode = run_episode(
                policy,
                scene,
                job.seed,
                job.suite.task_of(job.seed),
                control=job.setup.control,
                step_limit=steps,
                condition=job.condition.name,
                clock=None if warm_up else job.suite.clock,
                subscribers=[meter] if recorder is None else [meter, recorder],
            )
        episode.motion = meter.finish().as_dict()
        if recorder is not None:
            episode.recording = recorder.finish()
        return episode


def first_calls(condition: Condition) -> int:
    """Calls of a new episode up to the second one that drops tokens."""
    if condition.keep is None:
        return 2
    return condition.build().warmup + 2
