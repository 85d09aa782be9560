"""`vla-pruner latency`: time the conditions of a run apart, on recorded observations, in turn."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import nn

from vla_pruner.bench.environment import stamp
from vla_pruner.bench.measure import keep_freed_memory, recorded_calls, time_ms
from vla_pruner.calibration.observations import (
    Observation,
    episode_path,
    read_episode,
    write_episode,
)
from vla_pruner.core.session import Session
from vla_pruner.evaluation.episode import Condition, Scene, rollout
from vla_pruner.evaluation.pilot import report_of
from vla_pruner.evaluation.replay import Replay
from vla_pruner.evaluation.rollouts import Planned, Policies, Setup, first_calls
from vla_pruner.evaluation.store import Store
from vla_pruner.evaluation.suites import Suite, open_suite
from vla_pruner.evaluation.sweep import progress_bar, settings_of
from vla_pruner.evaluation.video import folder_name
from vla_pruner.models.loading import load

FOLDER = "observations"
"""In the run folder."""


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


class _Watched:
    """A scene that remembers where the hand was at each call of the policy."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self.hand: list[np.ndarray] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scene, name)

    def observe(self, cameras: tuple[str, ...]) -> dict[str, np.ndarray]:
        """Images of the cameras; `rollout` asks once per call."""
        self.hand.append(self._scene.proprio()[:3].copy())
        return self._scene.observe(cameras)


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
    watched: Any = _Watched(scene)
    with recorded_calls(policy, "predict_action") as calls:
        rollout(policy, watched, seed, target, control=setup.control, step_limit=setup.step_limit)
    seen = [
        {"images": images, "instruction": instruction, "proprio": options["proprio"]}
        for (images, instruction), options in calls[1:]  # The first one only counted tokens.
    ]
    hand = np.stack([*watched.hand, scene.proprio()[:3]])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_episode(path, seen, seed, motion=np.linalg.norm(np.diff(hand, axis=0), axis=1))


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
) -> list[Replay]:
    """Replay every recorded episode under every condition, `rounds` times, in turn.

    Before anything is timed, each condition makes the first calls of an episode, up to one that
    drops tokens.

    Args:
        policy: under all conditions the same one.
        conditions: in the order of the first round; every round begins with another.
        recorded: episodes.
        rounds: repetitions.
        tick: called after each replay.
    """
    for condition in conditions:
        replay_once(policy, condition, recorded[0], round_=-1, calls=first_calls(condition))
    found = []
    for round_ in range(rounds):
        turn = round_ % len(conditions)
        for episode in recorded:
            for condition in [*conditions[turn:], *conditions[:turn]]:
                found.append(replay_once(policy, condition, episode, round_))
                tick()
    return found


def replay_once(
    policy: Any, condition: Condition, episode: Recorded, round_: int, calls: int | None = None
) -> Replay:
    """One pass over the observations of an episode, with a history of its own.

    Raises:
        ValueError: a method that decides by motion, and observations that do not tell it.
    """
    device = next(policy.parameters()).device
    session = condition.attach(policy)
    latency_ms, warm_up, peak_mb = [], [], []
    try:
        if session is not None:
            session.episodes([episode.scene])
        for number, observation in enumerate(episode.observations[:calls]):
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            latency_ms.append(time_ms(lambda: policy.predict_action(**observation), device))  # noqa: B023
            if device.type == "cuda":
                peak_mb.append(torch.cuda.max_memory_allocated(device) / 2**20)
            warm_up.append(session is not None and bool(report_of(session).warm_up[0]))
            _report_motion(session, episode, number)
    finally:
        if session is not None:
            session.remove()
    return Replay(
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


# -- the command ---------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `vla-pruner latency`."""
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="what eval or sweep wrote to")
    parser.add_argument("--rounds", type=int, default=7, help="how often everything is replayed")
    parser.add_argument(
        "--scenes",
        type=int,
        default=2,
        help="episodes to record, on all tokens, of the first scenes of each suite; those that are "
        "in RUN/observations already are not recorded again",
    )
    parser.add_argument(
        "--calls", type=int, default=40, help="at most so many calls of each recorded episode"
    )
    parser.add_argument(
        "--observations",
        type=Path,
        help="replay the .npz files of this folder instead (format: docs/methods/fitprune.md); "
        "needs no simulator",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")


def run(args: argparse.Namespace) -> int:
    """Measure every policy and suite of a run, and keep the replays beside its episodes.

    Raises:
        ValueError: impossible arguments, no episodes, or other weights than those of the run.
        OSError: the disk is full.
    """
    for name in ("rounds", "scenes", "calls", "threads"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: must be at least 1")
    Store(args.run_folder).close()  # Raises: there is nothing to read.
    console = Console()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    with Store(args.run_folder, write=True) as store:
        groups: dict[Setup, list[Planned]] = {}
        for item in store.planned():
            groups.setdefault(item.setup, []).append(item)
        policies = Policies(partial(load, device=args.device))
        for setup in sorted(groups, key=lambda setup: setup.policy):
            policy = policies.get(setup)
            seen = _recorded(args, policy, setup, groups[setup], console)
            _measure_group(args, store, policy, setup, groups[setup], seen, console)
    console.print(f"Report: vla-pruner report {args.run_folder}", highlight=False, soft_wrap=True)
    return 0


def _recorded(
    args: argparse.Namespace,
    policy: nn.Module,
    setup: Setup,
    items: Sequence[Planned],
    console: Console,
) -> list[Recorded]:
    """The observations to replay, recorded first where they are missing."""
    if args.observations is not None:
        paths = sorted(args.observations.glob("*.npz"))
        if not paths:
            raise FileNotFoundError(f"no observations (*.npz) in {str(args.observations)!r}")
        return read_recorded(paths, args.calls)
    suite = open_suite(setup.suite)
    seeds = suite.held_out(args.scenes, items[0].first)
    return recorded(args.run_folder, policy, suite, setup, seeds, args.calls, console)


def recorded(
    run_folder: Path,
    policy: nn.Module,
    suite: Suite,
    setup: Setup,
    seeds: Sequence[int],
    calls: int,
    console: Console,
) -> list[Recorded]:
    """What the policy sees in some episodes of a suite, recorded in the run folder where missing.

    Args:
        calls: at most so many of each episode.
    """
    folder = run_folder / FOLDER / folder_name(setup)
    missing = [seed for seed in seeds if not episode_path(folder, seed).exists()]
    if missing:
        with (
            console.status(f"recording {len(missing)} episodes of {setup.suite}"),
            closing(suite.open_scene()) as scene,
        ):
            for seed in missing:
                record(policy, scene, seed, suite.task_of(seed), setup, episode_path(folder, seed))
    return read_recorded([episode_path(folder, seed) for seed in seeds], calls)


def _measure_group(
    args: argparse.Namespace,
    store: Store,
    policy: nn.Module,
    setup: Setup,
    items: Sequence[Planned],
    seen: Sequence[Recorded],
    console: Console,
) -> None:
    """Replay, then keep everything at once in place of what was measured before."""
    now = []
    for item in items:
        settings, recipe = settings_of(item.condition, policy)
        now.append(replace(item, settings=settings, recipe=recipe))
    store.begin(now, stamp(args.device))  # Raises: settings differ from those of the episodes.
    total = args.rounds * len(seen) * len(items)
    with progress_bar(console) as bar:
        line = bar.add_task(f"{setup.policy} in {setup.suite}", total=total)
        conditions = [item.condition for item in items]
        found = measure(policy, conditions, seen, args.rounds, lambda: bar.advance(line))
    store.keep_replays(setup, found)
