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

from vla_pruner.core.session import Session, StepReport
from vla_pruner.evaluation.episode import Scene
from vla_pruner.evaluation.oracle import Oracle, OracleSession
from vla_pruner.evaluation.recording import crop, visible_side
from vla_pruner.evaluation.rollouts import Setup
from vla_pruner.methods.base import Evidence, Method, OneCut, SemanticRows, StepContext
from vla_pruner.models.prune import prune
from vla_pruner.pruning.history import HistorySpec

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
class Replay:
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
    replays: Mapping[str, Replay] = field(default_factory=dict)

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
                name: Replay(values[f"kept{n}"], values[f"full{n}"], values.get(f"forecast{n}"))
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
    control, side = setup.control, visible_side(policy)
    instruction = str(scene.reset(seed, target)["instruction"])
    seen: list[dict[str, Any]] = []
    steps, reports, frames, done, taken = [], [], [], False, 0
    with prune(policy, Watch(layer=layer)) as session:
        session.episodes([seed])
        while not done and taken < setup.step_limit:
            images = scene.observe(control.cameras)
            state = scene.proprio() if control.reads_state else None
            views = [images[camera] for camera in control.cameras]
            seen.append({"images": views, "proprio": state})
            frames.append([np.asarray(crop(view, side).resize((FRAME, FRAME))) for view in views])
            steps.append(taken)
            actions = policy.predict_action(views, instruction, proprio=state)
            reports.append(_report(session))
            for action in np.atleast_2d(actions)[: control.execute]:
                scene.step(action)
                taken += 1
                done = scene.success()
                if done or taken >= setup.step_limit:
                    break
    replays = {name: _replay(policy, way, seed, instruction, seen) for name, way in ways.items()}
    return Trace(
        seed,
        instruction,
        bool(done),
        tuple(reports[0].views),
        np.array(steps),
        _rows([report.semantic for report in reports]),
        _rows([report.action for report in reports]),
        np.array(frames, dtype=np.uint8),
        replays,
    )


def _replay(
    policy: nn.Module, way: Way, seed: int, instruction: str, seen: list[dict[str, Any]]
) -> Replay:
    reports = []
    session = OracleSession(policy, way) if isinstance(way, Oracle) else prune(policy, way)
    act: Any = policy
    with session:
        session.episodes([seed])
        for view in seen:
            act.predict_action(view["images"], instruction, proprio=view["proprio"])
            reports.append(_report(session))
    forecast = [report.forecast for report in reports]
    return Replay(
        torch.cat([report.kept_mask for report in reports]).cpu().numpy(),
        torch.cat([report.warm_up for report in reports]).cpu().numpy(),
        None if forecast[0] is None else _rows(forecast),
    )


def _report(session: Session | OracleSession) -> StepReport:
    if session.last is None:
        raise RuntimeError(
            "no image reached the language model in a call of `predict_action`; run "
            "`vla-pruner doctor` on this policy"
        )
    return session.last


def _rows(scores: list[Tensor | None]) -> np.ndarray:
    """Scores `[1, M]` of each call as `[T, M]` fp32."""
    known = [score for score in scores if score is not None]
    if len(known) < len(scores):
        raise RuntimeError(
            "a call gave no attention scores; run `vla-pruner doctor` on this policy"
        )
    return torch.cat(known).float().cpu().numpy()
