"""One closed-loop episode: a policy acts in a scene; every call of it is timed and counted."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
from torch import nn

from vla_pruner.core.session import Session
from vla_pruner.evaluation.pilot import ALL_TOKENS, Call, LocalPilot, Pilot
from vla_pruner.evaluation.recording import Recorder
from vla_pruner.methods import build
from vla_pruner.models.prune import prune

Gripper = Literal["robosuite", "rlds"]
"""How a policy writes the gripper: +1 close and -1 open, or 0 close and 1 open."""


class Scene(Protocol):
    """What is acted in; `vla_pruner.reference.scene.PickPlaceScene` is one."""

    def reset(self, seed: int, target: int) -> Mapping[str, Any]:
        """Start the episode of `seed`; the result has the `instruction`."""

    def observe(self, cameras: tuple[str, ...]) -> dict[str, np.ndarray]:
        """Images uint8 `[H, W, 3]` by camera."""

    def proprio(self) -> np.ndarray:
        """State of the robot, float32 `[P]`; the first three are its hand's position (m)."""

    def step(self, action: np.ndarray) -> None:
        """Apply one action `[dim]`."""

    def success(self) -> bool:
        """Whether the instruction has been carried out."""

    def close(self) -> None:
        """Free the simulator."""


@dataclass(frozen=True)
class Control:
    """How a policy is driven in a scene.

    Args:
        cameras: the scene's cameras, in the order that the policy expects.
        execute: actions of a chunk that are carried out before the policy is asked again.
        reads_state: whether the policy is given the state of the robot.
        gripper: how the policy writes the last entry of an action; scenes take "robosuite".
            Checkpoints trained on RLDS data, such as all published OpenVLA ones, write "rlds".
    """

    cameras: tuple[str, ...]
    execute: int
    reads_state: bool
    gripper: Gripper = "robosuite"

    def __post_init__(self) -> None:
        if not self.cameras or self.execute < 1:
            raise ValueError(
                f"a policy needs at least one camera and one action per call; got "
                f"cameras={self.cameras}, execute={self.execute}"
            )
        if self.gripper not in get_args(Gripper):
            raise ValueError(
                f"gripper={self.gripper!r} is unknown; use {' or '.join(get_args(Gripper))}"
            )

    @classmethod
    def of(
        cls,
        policy: Any,
        available: Sequence[str],
        *,
        folder: Path | None = None,
        execute: int | None = None,
        gripper: Gripper | None = None,
    ) -> Control:
        """How a policy wants to be driven.

        What is said under `control` in the config.json of its folder comes first. Otherwise it sees
        the first cameras of the scene, and carries out two actions of a chunk.

        Args:
            policy: its `config` says how many images it reads, whether it gives a chunk of actions
                and whether it reads the state of the robot.
            available: cameras of the scene.
            folder: where the policy was loaded from, if from a folder.
            execute: overrides the number of actions.
            gripper: overrides how the gripper is written.

        Raises:
            ValueError: a camera that the scene does not have.
        """
        config = getattr(policy, "config", None)
        said: Mapping[str, Any] = {}
        if folder is not None and (folder / "config.json").exists():
            said = json.loads((folder / "config.json").read_text("utf-8")).get("control", {})
        chunk = getattr(config, "chunk", 1)
        cameras = tuple(said.get("cameras", available[: getattr(config, "num_images", 1)]))
        if unknown := [camera for camera in cameras if camera not in available]:
            raise ValueError(
                f"the policy asks for the cameras {', '.join(unknown)}; "
                f"the scene has {', '.join(available)}"
            )
        return cls(
            cameras=cameras,
            execute=execute or int(said.get("execute", min(2, chunk))),
            reads_state=getattr(config, "proprio_dim", None) is not None,
            gripper=gripper or said.get("gripper", "robosuite"),
        )

    def command(self, action: np.ndarray) -> np.ndarray:
        """An action `[dim]` of the policy as the scene takes it."""
        if self.gripper == "robosuite":
            return action
        return np.concatenate([action[:-1], 1 - 2 * action[-1:]])


@dataclass(frozen=True)
class Condition:
    """One way of running a policy.

    Args:
        method: name of a pruning method; "none" leaves the model untouched.
        keep: fraction of the visual tokens in (0, 1], or their number; None with "none".
        options: further options of the method, as names and values.
    """

    method: str = ALL_TOKENS
    keep: float | int | None = None
    options: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        if (self.method == ALL_TOKENS) != (self.keep is None):
            raise ValueError(
                f"condition {self.name!r}: write 'none', or a method with what it keeps, such as "
                "'vla-pruner@0.25'"
            )

    @classmethod
    def parse(cls, text: str) -> Condition:
        """The condition called "none", "vla-pruner@0.25" (a fraction) or "fastv@64" (a number).

        Options of the method follow after colons: "vla-pruner@0.25:window=1:first=nearest".

        Raises:
            ValueError: anything else, an unknown method or option, or an impossible budget.
        """
        method, _, rest = text.strip().partition("@")
        keep, *options = rest.split(":")
        try:
            value = None if not keep else int(keep) if keep.isdecimal() else float(keep)
        except ValueError:
            raise ValueError(
                f"condition {text!r}: after '@' comes a fraction such as 0.25 or a number of "
                "visual tokens such as 64"
            ) from None
        pairs = [option.partition("=") for option in options]
        if not all(name and sign and said for name, sign, said in pairs):
            raise ValueError(
                f"condition {text!r}: options come after a colon as name=value, such as ':window=1'"
            )
        condition = cls(method, value, tuple((name, _read(said)) for name, _, said in pairs))
        build(method, keep=value, **dict(condition.options))  # Raises: no such method or option.
        return condition

    @property
    def name(self) -> str:
        """The condition as `parse` reads it."""
        options = "".join(f":{name}={value}" for name, value in self.options)
        return self.method if self.keep is None else f"{self.method}@{self.keep}{options}"

    @property
    def label(self) -> str:
        """The condition for people."""
        if self.keep is None:
            return "all tokens"
        amount = f"{100 * self.keep:g} %" if isinstance(self.keep, float) else f"{self.keep} tokens"
        options = "".join(f", {name} {value}" for name, value in self.options)
        return f"{self.method}, {amount}{options}"

    def attach(self, policy: nn.Module) -> Session | None:
        """The session that brings the condition about; None leaves the model untouched."""
        if self.keep is None:
            return None
        return prune(policy, build(self.method, keep=self.keep, **dict(self.options)))


def _read(text: str) -> Any:
    """A number, true or false where the text is one, the text otherwise."""
    try:
        return json.loads(text.lower() if text in ("True", "False") else text)
    except ValueError:
        return text


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


def rollout(
    policy: Any,
    scene: Scene,
    seed: int,
    target: int,
    *,
    control: Control,
    step_limit: int,
    session: Session | None = None,
    condition: str = ALL_TOKENS,
    record: bool = False,
) -> Episode:
    """Let a policy of this process act in an episode; see `fly`.

    Args:
        policy, session: see `pilot.LocalPilot`.
        scene, seed, target, control, step_limit, condition, record: see `fly`.
    """
    pilot = LocalPilot(policy, session)
    return fly(
        pilot,
        scene,
        seed,
        target,
        control=control,
        step_limit=step_limit,
        condition=condition,
        record=record,
    )


def fly(
    pilot: Pilot,
    scene: Scene,
    seed: int,
    target: int,
    *,
    control: Control,
    step_limit: int,
    condition: str = ALL_TOKENS,
    record: bool = False,
) -> Episode:
    """Act from the initial state of `seed` until success, or until the limit is reached.

    A method that decides by motion is told how far the hand got between two calls.

    Args:
        pilot: who acts; it begins anew.
        scene: a `Scene`; it is reset first.
        seed, target: the episode.
        control: how the policy is driven.
        step_limit: the episode fails after this many steps.
        condition: name of what is being done, kept with the result.
        record: also keep images, kept tokens and scores.
    """
    instruction = str(scene.reset(seed, target)["instruction"])
    pilot.begin(seed)
    calls: list[Call] = []
    recorder = Recorder(pilot.side, control.cameras) if record else None
    steps, done = 0, False
    while not done and steps < step_limit:
        images = scene.observe(control.cameras)
        if recorder is not None:
            recorder.frame(images)
        state = scene.proprio() if control.reads_state else None
        views = [images[camera] for camera in control.cameras]
        answer = pilot.act(views, instruction, state, draw=record)
        calls.append(replace(answer.call, step=steps))
        if recorder is not None and answer.drawn is not None:
            recorder.call(steps, answer.drawn)
        before = scene.proprio()[:3] if pilot.wants_motion else None
        for number, action in enumerate(np.atleast_2d(answer.actions)[: control.execute]):
            if number > 0 and recorder is not None:
                recorder.frame(scene.observe(control.cameras))
            scene.step(control.command(action))
            steps += 1
            done = scene.success()
            if done or steps >= step_limit:
                break
        if before is not None:
            pilot.moved(float(np.linalg.norm(scene.proprio()[:3] - before)))
    recording = None
    if recorder is not None:
        recorder.frame(scene.observe(control.cameras))
        recording = recorder.finish()
    return Episode(condition, seed, target, instruction, done, steps, calls, recording)
