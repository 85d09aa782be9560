"""The same observations replayed under every condition in turn: recording them, and timing them.

A *replay* is one pass of a policy under one condition over the recorded observations of an episode,
history and warm-up included. Every condition replays every episode in every round.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from vla_pruner.core.session import Session
from vla_pruner.episodes.condition import ALL_TOKENS, Condition
from vla_pruner.episodes.episode import run_episode
from vla_pruner.episodes.observations import (
    Observation,
    Watcher,
    episode_path,
    read_episode,
    write_episode,
)
from vla_pruner.episodes.policy_runner import LocalPolicyRunner, report_of
from vla_pruner.measure.counted import Flops, count_flops
from vla_pruner.measure.timing import time_ms
from vla_pruner.models.prune import prune
from vla_pruner.runs.job import Setup
from vla_pruner.runs.runner import first_calls
from vla_pruner.runs.video import folder_name
from vla_pruner.scenes.scene import Scene, Suite

FOLDER = "observations"
"""In the run folder."""


@dataclass(frozen=True)
class TimedReplay:
    """One pass over the observations of an episode.

    Args:
        condition: name.
        scene: number of the recorded episode.
        round: which repetition.
        latency_ms: of each call of the policy.
        warm_up: whether a call ran on all tokens under a pruning method.
        peak_mb: largest memory that was allocated during a call, weights included; None: unknown.
        flops: of each call, counted in a pass that was not timed; None: only once for all rounds.
        decoder_flops: of the decoder within it.
    """

    condition: str
    scene: int
    round: int
    latency_ms: tuple[float, ...]
    warm_up: tuple[bool, ...]
    peak_mb: tuple[float, ...] | None = None
    flops: tuple[int, ...] | None = None
    decoder_flops: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Recorded:
    """What a policy saw at each of its calls in one episode.

    Args:
        scene: number of the scene.
        observations: arguments of `predict_action`.
        motion: how far the hand got after each call, in m; None: unknown.
    """

    scene: int
    observations: tuple[Observation, ...]
    motion: tuple[float, ...] | None


# -- recording -----------------------------------------------------------------------------------


def record(
    policy: nn.Module, scene: Scene, seed: int, target: int, setup: Setup, path: Path
) -> None:
    """Write what a policy sees in one episode on all tokens, as docs/methods/fitprune.md describes.

    Args:
        policy: acts in the scene.
        scene: a scene of the suite.
        seed, target: the episode.
        setup: how the policy is driven.
        path: of the file; it also holds `motion` float32 `[n]`.
    """
    watcher = Watcher()
    run_episode(
        LocalPolicyRunner(policy, arguments=setup.control.arguments),
        scene,
        seed,
        target,
        control=setup.control,
        step_limit=setup.step_limit,
        subscribers=[watcher],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_episode(path, watcher.seen, seed, motion=watcher.motion)


def read_recorded(paths: Sequence[Path], calls: int) -> list[Recorded]:
    """Recorded episodes, the first `calls` moments of each.

    Raises:
        ValueError: a file that holds something else, or a scene that is there twice.
    """
    found: list[Recorded] = []
    for number, path in enumerate(paths):
        items, seed = read_episode(path)
        with np.load(path, allow_pickle=False) as file:
            motion = tuple(map(float, file["motion"][:calls])) if "motion" in file else None
        scene = number if seed is None else seed
        if any(one.scene == scene for one in found):
            raise ValueError(f"{path}: another file of this folder comes from scene {scene}, too")
        found.append(Recorded(scene, tuple(items[:calls]), motion))
    return found


# -- replaying -----------------------------------------------------------------------------------


def measure(
    policy: nn.Module,
    conditions: Sequence[Condition],
    recorded: Sequence[Recorded],
    rounds: int,
    tick: Callable[[], None] = lambda: None,
    *,
    captured: str = "",
) -> list[TimedReplay]:
    """Replay every recorded episode under every condition, `rounds` times, in turn.

    Before anything is timed, each condition makes the first calls of an episode, up to one that
    drops tokens.

    Args:
        policy: under all conditions the same one.
        conditions: in the order of the first round; every round begins with another.
        recorded: episodes.
        rounds: repetitions.
        tick: called after each replay.
        captured: by which backend whole steps are compiled; empty: they are not.
    """
    for condition in conditions:
        calls = first_calls(condition)
        replay_once(policy, condition, recorded[0], round_=-1, calls=calls, captured=captured)
    counted = {
        (episode.scene, condition.name): count(policy, condition, episode)
        for episode in recorded
        for condition in conditions
    }
    found = []
    for round_ in range(rounds):
        turn = round_ % len(conditions)
        for episode in recorded:
            for condition in [*conditions[turn:], *conditions[:turn]]:
                one = replay_once(policy, condition, episode, round_, captured=captured)
                if round_ == 0:
                    flops = counted[episode.scene, condition.name]
                    one = replace(
                        one,
                        flops=tuple(call.call for call in flops),
                        decoder_flops=tuple(call.decoder for call in flops),
                    )
                found.append(one)
                tick()
    return found


def count(policy: Any, condition: Condition, episode: Recorded) -> list[Flops]:
    """Floating-point operations of every call of a recorded episode, from its beginning."""
    found = []
    with ExitStack() as stack:
        session = condition.attach(policy)
        if session is None:  # Only to learn what the decoder is: it runs as it is.
            decoder = stack.enter_context(prune(policy, ALL_TOKENS)).decoder
        else:
            stack.callback(session.remove)
            session.episodes([episode.scene])
            decoder = session.decoder
        for number, observation in enumerate(episode.observations):
            found.append(count_flops(lambda: policy.predict_action(**observation), decoder))  # noqa: B023
            _report_motion(session, episode, number)
    return found


def replay_once(
    policy: Any,
    condition: Condition,
    episode: Recorded,
    round_: int,
    calls: int | None = None,
    *,
    captured: str = "",
) -> TimedReplay:
    """One pass over the observations of an episode, with a history of its own.

    Raises:
        ValueError: a method that decides by motion, and observations that do not tell it.
    """
    device = next(policy.parameters()).device
    latency_ms, warm_up, peak_mb = [], [], []
    with condition.attached(policy, captured=captured) as (own, session):
        if session is not None:
            session.episodes([episode.scene])
        for number, observation in enumerate(episode.observations[:calls]):
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            latency_ms.append(time_ms(lambda: own.predict_action(**observation), device))  # noqa: B023
            if device.type == "cuda":
                peak_mb.append(torch.cuda.max_memory_allocated(device) / 2**20)
            warm_up.append(session is not None and bool(report_of(session).warm_up[0]))
            _report_motion(session, episode, number)
    return TimedReplay(
        condition.name,
        episode.scene,
        round_,
        tuple(latency_ms),
        tuple(warm_up),
        tuple(peak_mb) if device.type == "cuda" else None,
    )


def _report_motion(session: Session | None, episode: Recorded, number: int) -> None:
    if session is None or "motion" not in session.method.needs:
        return
    if episode.motion is None:
        raise ValueError(
            f"method {session.method.name!r} decides by how far the hand moved, which the "
            "observations do not tell; leave out --observations to record some that do"
        )
    session.motion(episode.motion[number], episode.scene)


def recorded(
    run_folder: Path,
    policy: nn.Module,
    suite: Suite,
    setup: Setup,
    seeds: Sequence[int],
    calls: int,
) -> list[Recorded]:
    """What the policy sees in some episodes of a suite, recorded in the run folder where missing.

    Args:
        calls: at most so many of each episode.
    """
    folder = run_folder / FOLDER / folder_name(setup)
    missing = [seed for seed in seeds if not episode_path(folder, seed).exists()]
    if missing:
        with closing(suite.open_scene()) as scene:
            for seed in missing:
                record(policy, scene, seed, suite.task_of(seed), setup, episode_path(folder, seed))
    return read_recorded([episode_path(folder, seed) for seed in seeds], calls)
