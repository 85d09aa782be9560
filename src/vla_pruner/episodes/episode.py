"""One closed-loop episode: a policy acts in a scene, and subscribers follow what happens.

This is the only loop in which a policy acts in a scene. Whoever wants to record, trace, or collect
what a policy sees subscribes to it, so that cameras, gripper and chunks are the same for all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from vla_pruner._short import short
from vla_pruner.episodes.condition import ALL_TOKENS
from vla_pruner.episodes.control import Control
from vla_pruner.episodes.policy_runner import Answer, Call, PolicyRunner
from vla_pruner.models.pi0.chunking import Guide
from vla_pruner.scenes.clock import Clock
from vla_pruner.scenes.scene import Scene, hold


@dataclass
class Episode:
    """What happened in one episode.

    Args:
        condition: name of the condition, such as "none" or "vla-pruner@0.25".
        seed: of the scene.
        target: index of the object that was named.
        instruction: the sentence that named it.
        success: whether it was carried out within the step limit.
        steps: steps of the scene.
        calls: calls of the policy, in order.
        held: steps in which the robot held still, because nothing was there to carry out; None: the
            scene waited for the policy.
        motion: how the robot moved, the values of `motion.Motion`; None: not measured.
        recording: what the report page shows of the episode; None: not recorded.
    """

    condition: str
    seed: int
    target: int
    instruction: str
    success: bool
    steps: int
    calls: list[Call]
    held: int | None = None
    motion: dict[str, Any] | None = None
    recording: dict[str, Any] | None = field(default=None, repr=False)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without the recording; calls are columns, one list per field."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "recording"}
        values["calls"] = {
            f.name: [getattr(call, f.name) for call in self.calls] for f in fields(Call)
        }
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Episode:
        """The episode that `as_dict` described."""
        columns = values["calls"]
        known = [f.name for f in fields(Call) if f.name in columns]
        rows = zip(*(columns[name] for name in known), strict=True)
        calls = [Call(**dict(zip(known, row, strict=True))) for row in rows]
        return cls(**{**values, "calls": calls})


@dataclass(frozen=True)
class Moment:
    """What a policy was shown at one of its calls, and what it answered.

    Args:
        step: steps of the scene that had been taken before.
        images: uint8 `[H, W, 3]` by camera.
        instruction: what it was told.
        state: of the robot; None: the policy does not read it.
        answer: its actions, and what the call cost.
    """

    step: int
    images: Mapping[str, np.ndarray]
    instruction: str
    state: np.ndarray | None
    answer: Answer


class Subscriber:
    """Follows an episode; a subclass overrides what it wants to hear of.

    Args:
        wants_frames: `frame` is called; cameras are looked at for it after every step.
        wants_picture: answers hold what a recording shows of a call, see `recording.picture_of`.
    """

    wants_frames = False
    wants_picture = False

    def started(self, scene: Scene, control: Control, side: float) -> None:
        """The scene has been reset; the policy sees `side` of an image's height and width."""

    def called(self, moment: Moment) -> None:
        """The policy has answered; none of its actions has been carried out yet."""

    def stepped(self, command: np.ndarray) -> None:
        """The scene has taken a step, with this command."""

    def frame(self, images: Mapping[str, np.ndarray]) -> None:
        """A camera image of each step that lies between two calls, and of the end."""

    def ended(self) -> None:
        """The last step has been taken."""


def run_episode(
    policy: PolicyRunner,
    scene: Scene,
    seed: int,
    target: int,
    *,
    control: Control,
    step_limit: int,
    condition: str = ALL_TOKENS,
    clock: Clock | None = None,
    subscribers: Sequence[Subscriber] = (),
) -> Episode:
    """Act from the initial state of `seed` until success, or until the limit is reached.

    A method that decides by motion is told how far the hand got between two calls.

    Args:
        policy: who acts; it begins anew.
        scene: it is reset first.
        seed, target: the episode.
        control: how the policy is driven.
        step_limit: the episode fails after this many steps.
        condition: name of what is being done, kept with the result.
        clock: what goes on while the policy computes; None: the scene waits.
        subscribers: who follows.

    Raises:
        ValueError: the policy gave an action that is not finite, or the scene does not tell how
            the robot holds still.
    """
    instruction = str(scene.reset(seed, target)["instruction"])
    policy.begin(seed)
    watchers = [one for one in subscribers if one.wants_frames]
    picture = any(one.wants_picture for one in subscribers)
    calls: list[Call] = []
    steps, held, done = 0, 0, False
    last: np.ndarray | None = None
    running = Running(control.execute, clock)
    for one in subscribers:
        one.started(scene, control, policy.side)
    while not done and steps < step_limit:
        images = scene.observe(control.cameras)
        state = scene.proprio() if control.reads_state else None
        views = [images[camera] for camera in control.cameras]
        guide = running.guide()
        guided = {} if guide is None else {"guide": guide}
        answer = policy.act(views, instruction, state, picture=picture, **guided)
        delay = 0
        if clock is not None:
            call = answer.call
            delay = clock.delay(condition, warm_up=call.warm_up, measured_ms=call.latency_ms)
        calls.append(replace(answer.call, step=steps, delay=delay))
        for one in subscribers:
            one.called(Moment(steps, images, instruction, state, answer))
        before = scene.proprio()[:3] if policy.wants_motion else None
        chosen = running.next(np.atleast_2d(answer.actions), delay)
        if not all(np.isfinite(action).all() for action in chosen if action is not None):
            raise ValueError(
                f"call {len(calls)} of scene {seed} gave an action that is not finite: "
                f"{short(np.atleast_2d(answer.actions).tolist())}; look for NaN in the policy's "
                "weights or statistics"
            )
        for number, action in enumerate(chosen):
            if number > 0 and watchers:
                _show(scene, control, watchers)
            last = hold(scene, last) if action is None else control.command(action)
            held += action is None
            scene.step(last)
            for one in subscribers:
                one.stepped(last)
            steps += 1
            done = scene.success()
            if done or steps >= step_limit:
                break
        if before is not None:
            policy.moved(float(np.linalg.norm(scene.proprio()[:3] - before)))
    if watchers:
        _show(scene, control, watchers)
    for one in subscribers:
        one.ended()
    return Episode(
        condition,
        seed,
        target,
        instruction,
        done,
        steps,
        calls,
        held=None if clock is None else held,
    )


class Running:
    """Which actions are carried out until the next call, as chunks arrive.

    Args:
        execute: actions of a chunk that are carried out before the policy is asked again.
        clock: see `run_episode`.
    """

    def __init__(self, execute: int, clock: Clock | None) -> None:
        self._execute = execute
        self._pace = "wait" if clock is None else clock.pace
        self._delay = 0
        self._left: np.ndarray | None = None
        """Of the chunk that is being carried out, from the observation of the call on."""

    def guide(self) -> Guide | None:
        """What the next chunk is to continue; it is expected as late as the last one was."""
        if not self._pace.startswith("rtc") or self._left is None or not len(self._left):
            return None
        return Guide(self._left, self._delay, "full" if self._pace == "rtc-full" else "identity")

    def next(self, chunk: np.ndarray, delay: int) -> list[np.ndarray | None]:
        """Actions until the next call; None: nothing is there, the robot holds still.

        Args:
            chunk: `[chunk, dim]`, answered to an observation that was taken `delay` steps before.
            delay: steps until it is there.
        """
        self._delay = delay
        if (
            self._pace == "wait" or self._left is None
        ):  # The robot stands, and nothing is under way.
            self._left = chunk[self._execute :]
            return [*[None] * delay, *chunk[: self._execute]]
        taken = max(self._execute, delay)
        plan = [*_padded(self._left, delay), *_padded(chunk[delay:], taken - delay)]
        self._left = chunk[taken:]
        return plan


def _padded(actions: np.ndarray, count: int) -> list[np.ndarray | None]:
    """The first `count` actions; None where there are not so many."""
    found: list[np.ndarray | None] = [*actions[:count]]
    return found + [None] * (count - len(found))


def _show(scene: Scene, control: Control, watchers: Sequence[Subscriber]) -> None:
    images = scene.observe(control.cameras)
    for one in watchers:
        one.frame(images)
