"""Full-token rollouts, and what other methods would have kept of the same observations."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from vla_pruner.analysis.oracle import Oracle, OracleSession
from vla_pruner.core.session import Session, StepReport
from vla_pruner.episodes.control import Control
from vla_pruner.episodes.episode import Moment, run_episode
from vla_pruner.episodes.observations import Watcher
from vla_pruner.episodes.policy_runner import LocalPolicyRunner, report_of, seed_call
from vla_pruner.episodes.recording import crop
from vla_pruner.methods.base import Evidence, Method, OneCut, SemanticRows, StepContext
from vla_pruner.models.prune import prune
from vla_pruner.pruning.history import HistorySpec
from vla_pruner.runs.job import Setup
from vla_pruner.scenes.scene import Scene

FRAME = 112
"""Side of a recorded frame in pixels."""

Way = Method | Oracle
"""How visual tokens are chosen in a replay."""


@dataclass(frozen=True, kw_only=True)
class Watch(OneCut):
    """Asks for both scores of the paper and keeps every token, at every step."""

    name: ClassVar[str] = "watch"
    summary: ClassVar[str] = "looks at both scores and drops nothing"

    @property
    def semantic_rows(self) -> SemanticRows:
        """Every prefill query votes (Eq. 2)."""
        return "all"

    @property
    def history(self) -> HistorySpec:
        """The action score of the latter half of the layers."""
        return HistorySpec(window=1)

    def full_step(self, context: StepContext) -> bool:
        """Always."""
        return True

    def choose(self, evidence: Evidence, k: int) -> Tensor:
        """Never asked: all steps are full."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class MethodReplay:
    """What one method did on recorded observations. T calls, M visual tokens.

    Args:
        kept: `[T, M]` bool.
        full: `[T]` bool, calls that ran on all tokens because the method asked for it.
        forecast: `[T, M]` fp32 action score that it predicted; None: it predicts none.
    """

    kept: np.ndarray
    full: np.ndarray
    forecast: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Trace:
    """One episode on all tokens. T calls, M visual tokens, V cameras.

    Args:
        seed, instruction, success: of the episode.
        views: visual tokens of each camera.
        steps: `[T]` int, steps of the scene before each call.
        semantic: `[T, M]` fp32, mean attention of the prefill's queries at layer K-1.
        action: `[T, M]` fp32, mean attention of the action queries in the latter half of layers.
        frames: `[T, V, FRAME, FRAME, 3]` uint8, what the policy sees of each camera.
        replays: by name.
    """

    seed: int
    instruction: str
    success: bool
    views: tuple[int, ...]
    steps: np.ndarray
    semantic: np.ndarray
    action: np.ndarray
    frames: np.ndarray
    replays: Mapping[str, MethodReplay] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write the trace at once: an interruption never leaves half of it."""
        values: dict[str, Any] = {
            name: getattr(self, name) for name in ("steps", "semantic", "action", "frames")
        }
        for number, replay in enumerate(self.replays.values()):
            values[f"kept{number}"], values[f"full{number}"] = replay.kept, replay.full
            if replay.forecast is not None:
                values[f"forecast{number}"] = replay.forecast
        about = {
            "seed": self.seed,
            "instruction": self.instruction,
            "success": self.success,
            "views": self.views,
            "replays": list(self.replays),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        with partial.open("wb") as file:
            np.savez_compressed(file, about=np.array(json.dumps(about)), **values)
        os.replace(partial, path)

    @classmethod
    def load(cls, path: Path) -> Trace:
        """The trace that `save` wrote.

        Raises:
            ValueError: the file is damaged.
        """
        try:
            with np.load(path, allow_pickle=False) as stored:
                values = dict(stored)
            about = json.loads(str(values["about"]))
            replays = {
                name: MethodReplay(
                    values[f"kept{n}"], values[f"full{n}"], values.get(f"forecast{n}")
                )
                for n, name in enumerate(about["replays"])
            }
            return cls(
                about["seed"],
                about["instruction"],
                about["success"],
                tuple(about["views"]),
                values["steps"],
                values["semantic"],
                values["action"],
                values["frames"],
                replays,
            )
        except Exception as error:  # zip, zlib, JSON and NumPy each have their own
            raise ValueError(
                f"{path} is damaged ({type(error).__name__}: {error}); remove it and run again"
            ) from error


def trace(
    policy: Any,
    scene: Scene,
    seed: int,
    target: int,
    *,
    setup: Setup,
    layer: int,
    ways: Mapping[str, Way],
) -> Trace:
    """Let the policy act on all tokens, then show each method what it saw, in order.

    Args:
        policy: without a session.
        scene: reset first.
        seed, target: the episode.
        setup: how the policy is driven.
        layer: K; the prefill score is read in layer K-1.
        ways: methods to replay, by name.

    Raises:
        RuntimeError: no image reached the language model.
    """
    control = setup.control
    with prune(policy, Watch(layer=layer)) as session:
        watcher = _TraceWatcher(session)
        episode = run_episode(
            LocalPolicyRunner(policy, session, control.arguments),
            scene,
            seed,
            target,
            control=control,
            step_limit=setup.step_limit,
            subscribers=[watcher],
        )
    replays = {name: _replay(policy, way, seed, watcher.seen) for name, way in ways.items()}
    reports = watcher.reports
    return Trace(
        seed,
        episode.instruction,
        episode.success,
        tuple(reports[0].views),
        np.array([call.step for call in episode.calls]),
        _rows([report.semantic for report in reports]),
        _rows([report.action for report in reports]),
        np.array(watcher.frames, dtype=np.uint8),
        replays,
    )


class _TraceWatcher(Watcher):
    """What a policy is shown, cropped as it sees it, and what the session reports of each call."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        self._session = session
        self.reports: list[StepReport] = []
        self.frames: list[list[np.ndarray]] = []

    def started(self, scene: Scene, control: Control, side: float) -> None:
        """Nothing has been seen yet."""
        super().started(scene, control, side)
        self._side, self.reports, self.frames = side, [], []

    def called(self, moment: Moment) -> None:
        """Keep small frames, and the report."""
        super().called(moment)
        views = self.seen[-1]["images"]
        self.frames.append(
            [np.asarray(crop(view, self._side).resize((FRAME, FRAME))) for view in views]
        )
        self.reports.append(report_of(self._session))


def _replay(policy: nn.Module, way: Way, seed: int, seen: list[dict[str, Any]]) -> MethodReplay:
    reports = []
    session = OracleSession(policy, way) if isinstance(way, Oracle) else prune(policy, way)
    act: Any = policy
    with session:
        session.episodes([seed])
        for number, observation in enumerate(seen):
            seed_call(seed, number)
            act.predict_action(**observation)
            reports.append(report_of(session))
    forecast = [report.forecast for report in reports]
    return MethodReplay(
        torch.cat([report.kept_mask for report in reports]).cpu().numpy(),
        torch.cat([report.warm_up for report in reports]).cpu().numpy(),
        None if forecast[0] is None else _rows(forecast),
    )


def _rows(scores: list[Tensor | None]) -> np.ndarray:
    """Scores `[1, M]` of each call as `[T, M]` fp32."""
    known = [score for score in scores if score is not None]
    if len(known) < len(scores):
        raise RuntimeError(
            "a call gave no attention scores; run `vla-pruner doctor` on this policy"
        )
    return torch.cat(known).float().cpu().numpy()
