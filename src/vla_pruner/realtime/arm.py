"""One episode in real time: the scene ticks by the clock on the wall, whatever the policy does.

The scene, its cameras and the loop belong to one thread; the client asks in another. What comes too
late is not waited for: the arm stops, as the client's executor says.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from vla_pruner_client import Answer, Client, Executor, Lost

from vla_pruner.episodes.control import Control
from vla_pruner.episodes.motion import MotionMeter
from vla_pruner.scenes.scene import hold_delta

CAMERA_S = 5.0
"""How long the client waits for an image before it takes the camera for broken."""


@dataclass(frozen=True)
class Pace:
    """How time goes on.

    Args:
        hz: ticks of the arm in a second.
        actions_hz: actions of the policy in a second; a step of the scene lasts 0.2 s, so that 5 is
            the scene's own time and 20 four times as fast.

    Raises:
        ValueError: an action does not last a whole number of ticks, or a tick of physics steps.
    """

    hz: float = 25.0
    actions_hz: float = 5.0

    def __post_init__(self) -> None:
        from vla_pruner.scenes.pick_place import SUBSTEPS

        if not 0 < self.actions_hz <= self.hz or self.hz % self.actions_hz:
            raise ValueError(
                f"--hz {self.hz:g} --actions-hz {self.actions_hz:g}: an action must last one or "
                "more whole ticks"
            )
        if SUBSTEPS % self.ticks:
            raise ValueError(
                f"--hz {self.hz:g} --actions-hz {self.actions_hz:g}: {self.ticks} ticks an action; "
                f"expected a divisor of {SUBSTEPS}, the physics steps of one"
            )

    @property
    def ticks(self) -> int:
        """Ticks of an action."""
        return round(self.hz / self.actions_hz)

    @property
    def speed(self) -> float:
        """Seconds of the scene in a second."""
        from vla_pruner.scenes.pick_place import CONTROL_HZ

        return self.actions_hz / CONTROL_HZ


@dataclass
class Asked:
    """One answer of the server, as the client saw it.

    Args:
        seconds: from the question to the answer.
        late: the server says that its deadline passed.
        stood: the arm had stopped for want of it.
        warm_up, tokens, infer_ms: as the server says; None: it does not.
    """

    seconds: float
    late: bool
    stood: bool
    warm_up: bool | None = None
    tokens: int | None = None
    infer_ms: float | None = None


@dataclass
class Trial:
    """What happened in one episode.

    Args:
        seed, condition, success: of the episode.
        hz: ticks in a second.
        ticks: of the arm, and of those: `held`, in which it stood for want of an action after the
            first one; `before`, until the first one; `slipped`, that began more than a tick late
            because the simulator was too slow (time on the wall went on, the arm did not).
        ages_ms: of each action when it began: since its observation was asked for.
        answers: of the server.
        lost: questions without an answer.
        motion: values of `motion.Motion`, in the scene's time.
        states: of the simulator after each tick, and whether the arm stood; for a film.
    """

    seed: int
    condition: str
    hz: float
    success: bool = False
    ticks: int = 0
    held: int = 0
    before: int = 0
    slipped: int = 0
    lost: int = 0
    ages_ms: list[float] = field(default_factory=list)
    answers: list[Asked] = field(default_factory=list)
    motion: dict[str, Any] | None = None
    states: list[tuple[np.ndarray, bool]] = field(default_factory=list, repr=False)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without the states."""
        values = {name: value for name, value in vars(self).items() if name != "states"}
        return values | {"answers": [vars(one) for one in self.answers]}

    def as_row(self) -> dict[str, Any]:
        """A row of episodes.csv: counts, and medians over the episode (ms)."""
        counted = ("condition", "seed", "success", "ticks", "before", "held", "slipped", "lost")
        pruned = [one.seconds for one in self.answers if not one.warm_up]
        medians = {"age_ms": self.ages_ms, "answer_ms": [1000 * seconds for seconds in pruned]}
        return (
            {name: getattr(self, name) for name in counted}
            | {"answers": len(self.answers)}
            | {"late": sum(one.late or one.stood for one in self.answers[1:])}
            | {name: f"{np.median(found):.0f}" if found else "" for name, found in medians.items()}
        )


class Camera:
    """What one thread draws, when another asks for it: a drawing context belongs to one thread."""

    def __init__(self) -> None:
        self._lock = threading.Condition()
        self._wanted = self._closed = False
        self._seen: list[Mapping[str, Any]] = []

    def look(self) -> Mapping[str, Any]:
        """The next observation. Raises ConnectionError: nobody draws."""
        with self._lock:
            self._seen.clear()
            self._wanted = True
            if not self._lock.wait_for(lambda: self._closed or bool(self._seen), CAMERA_S):
                raise ConnectionError(f"the camera gave no image in {CAMERA_S:g} s")
            if not self._seen:
                raise ConnectionError("the camera is closed")
            return self._seen.pop()

    def serve(self, draw: Callable[[], Mapping[str, Any]]) -> None:
        """Draw, if somebody waits for it."""
        with self._lock:
            if self._wanted:
                self._seen, self._wanted = [draw()], False
                self._lock.notify_all()

    def close(self) -> None:
        """Nobody draws any more."""
        with self._lock:
            self._closed = True
            self._lock.notify_all()


class WatchedClient(Client):
    """A client that keeps what it was answered."""

    def __init__(self, url: str, **options: Any) -> None:
        super().__init__(url, **options)
        self.answers: list[Asked] = []
        self.lost = 0
        self.standing = False
        """Whether the arm stands for want of an action; set by its loop."""

    def infer(self, observation: Mapping[str, Any], *, deadline_s: float | None = None) -> Answer:
        began = time.monotonic()
        try:
            answer = super().infer(observation, deadline_s=deadline_s)
        except Lost:
            self.lost += 1
            raise
        took, about = time.monotonic() - began, answer.about
        told = [about.get(name) for name in ("warm_up", "tokens", "infer_ms")]
        self.answers.append(Asked(took, answer.late, self.standing, *told))
        return answer


def run_trial(
    scene: Any,
    client: WatchedClient,
    seed: int,
    target: int,
    *,
    control: Control,
    pace: Pace,
    step_limit: int,
    condition: str = "",
    ask_at: int = 0,
    max_age_s: float = 2.0,
    film: bool = False,
    ticked: Callable[[Trial], bool | None] | None = None,
) -> Trial:
    """Act in a scene until success, or until the scene's time for it is over.

    Args:
        scene: a `PickPlaceScene`; it is reset first, outside of time.
        client: of a server whose policy this is; every trial is an episode of its own there.
        seed, target: the episode.
        control: cameras, and whether the state is sent.
        pace: ticks and actions in a second.
        step_limit: actions' time after which the episode has failed.
        condition: name of what is served, kept with the result.
        ask_at: the next chunk is asked for when so many actions are left.
        max_age_s: older actions are not carried out.
        film: keep the states of the simulator.
        ticked: called after each tick; True ends the trial.
    """
    from vla_pruner.scenes.pick_place import SUBSTEPS

    instruction = str(scene.reset(seed, target)["instruction"])
    trial, camera = Trial(seed, condition, pace.hz), Camera()
    meter = MotionMeter(pace.hz / pace.speed)
    meter.started(scene, control, 1.0)
    client.answers, client.lost, client.standing = [], 0, True

    def draw() -> Mapping[str, Any]:
        return observation(scene, control, instruction)

    executor = Executor(client, camera.look, stop="zero", ask_at=ask_at, max_age_s=max_age_s)
    with executor:
        due, left = time.monotonic(), 0
        action = hold_delta(None)
        while not trial.success and trial.ticks < step_limit * pace.ticks:
            began = left == 0
            if began:
                # What is seen between two actions is where a chunk begins; in the middle of one,
                # the rest of it would be carried out twice.
                camera.serve(draw)
                command = executor.step()
                client.standing = command.stopped
                action = hold_delta(None) if command.action is None else command.action
                left = 1 if command.stopped else pace.ticks
                if not command.stopped:
                    trial.ages_ms.append(1000 * command.age_s)
            left -= 1
            scene.advance(action, SUBSTEPS // pace.ticks, again=not began)
            meter.stepped(action)
            trial.ticks += 1
            stood = client.standing
            trial.before += stood and not trial.ages_ms
            trial.held += stood and bool(trial.ages_ms)
            trial.success = scene.success()
            if film:
                trial.states.append((scene.simulator_state(), stood))
            if ticked is not None and ticked(trial):
                break
            due += 1 / pace.hz
            behind = time.monotonic() - due
            if behind > 1 / pace.hz:
                trial.slipped += 1
                due += behind
            elif behind < 0:
                time.sleep(-behind)
        camera.close()
    trial.answers, trial.lost = client.answers, client.lost
    trial.motion = meter.finish().as_dict()
    return trial


def observation(scene: Any, control: Control, instruction: str) -> dict[str, Any]:
    """What the arm says in openpi's keys of LIBERO: the first two cameras, the state, the task."""
    images = scene.observe(control.cameras)
    names: Sequence[str] = ("observation/image", "observation/wrist_image")
    seen: dict[str, Any] = {
        name: images[camera] for name, camera in zip(names, control.cameras, strict=False)
    }
    state = np.asarray(scene.proprio(), np.float64)
    return seen | {"observation/state": state, "prompt": instruction}
