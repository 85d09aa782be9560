"""What is run: a policy in a suite, a condition, a scene; and what makes episodes comparable."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vla_pruner.episodes.condition import Condition
from vla_pruner.episodes.control import Control, said_by
from vla_pruner.models.loading import locate
from vla_pruner.scenes.clock import Clock
from vla_pruner.scenes.scene import Suite
from vla_pruner.scenes.suites import SUITES


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
        clock: what goes on while the policy computes; None: the scene waits.
        captured: by which backend whole steps of the policy are compiled; empty: they are not.
    """

    suite: str
    policy: str
    weights: str
    control: Control
    step_limit: int
    tasks: tuple[str, ...]
    stand_in_assets: bool = False
    clock: Clock | None = None
    captured: str = ""

    @classmethod
    def of(
        cls, name: str, policy: nn.Module, suite: Suite, *, captured: str = "", **control: Any
    ) -> Setup:
        """The setup of a loaded policy; `control` overrides how it is driven, see `Control.of`.

        Raises:
            ValueError: the policy was made for other suites, or cannot be driven in this one.
        """
        folder = Path(locate(name))
        _check_suite(name, said_by(folder).get("suites"), suite.base)
        return cls(
            suite=suite.name,
            policy=name,
            weights=fingerprint(policy),
            control=Control.of(policy, suite.cameras, folder=folder, **control),
            step_limit=suite.step_limit,
            tasks=suite.tasks,
            stand_in_assets=suite.stand_in_assets,
            clock=suite.clock,
            captured=captured,
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Setup:
        """The setup that `as_dict` described."""
        control = Control(**{**values["control"], "cameras": tuple(values["control"]["cameras"])})
        tasks, clock = tuple(values["tasks"]), values.get("clock")
        clock = None if clock is None else Clock.from_dict(clock)
        return cls(**{**values, "control": control, "tasks": tasks, "clock": clock})


def _check_suite(policy: str, made_for: Any, suite: str) -> None:
    """Refuse a known suite that is none of those that a policy was made for."""
    if made_for is None or suite in made_for or suite not in SUITES:
        return
    raise ValueError(
        f"{policy} was trained for {', '.join(made_for)}, not for {suite}; name one of these with "
        "--suite, or another policy with --policy"
    )


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
