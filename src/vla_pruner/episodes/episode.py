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
from vla_pruner.scenes.scene import Scene


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
        recording: what the report page shows of the episode; None: not recorded.
    """

    condition: str
    seed: int
    target: int
    instruction: str
    success: bool
    steps: int
    calls: list[Call]
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
        subscribers: who follows.

    Raises:
        ValueError: the policy gave an action that is not finite.
    """
    instruction = str(scene.reset(seed, target)["instruction"])
    policy.begin(seed)
    watchers = [one for one in subscribers if one.wants_frames]
    picture = any(one.wants_picture for one in subscribers)
    calls: list[Call] = []
    steps, done = 0, False
    for one in subscribers:
        one.started(scene, control, policy.side)
    while not done and steps < step_limit:
        images = scene.observe(control.cameras)
        state = scene.proprio() if control.reads_state else None
        views = [images[camera] for camera in control.cameras]
        answer = policy.act(views, instruction, state, picture=picture)
        calls.append(replace(answer.call, step=steps))
        for one in subscribers:
            one.called(Moment(steps, images, instruction, state, answer))
        before = scene.proprio()[:3] if policy.wants_motion else None
        chosen = np.atleast_2d(answer.actions)[: control.execute]
        if not np.isfinite(chosen).all():
            raise ValueError(
                f"call {len(calls)} of scene {seed} gave an action that is not finite: "
                f"{short(chosen.tolist())}; look for NaN in the policy's weights or statistics"
            )
        for number, action in enumerate(chosen):
            if number > 0 and watchers:
                _show(scene, control, watchers)
            scene.step(control.command(action))
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
    return Episode(condition, seed, target, instruction, done, steps, calls)


def _show(scene: Scene, control: Control, watchers: Sequence[Subscriber]) -> None:
    images = scene.observe(control.cameras)
    for one in watchers:
        one.frame(images)
