"""Suites whose scenes misbehave once: a file beside them remembers that it happened."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from pathlib import Path
from typing import Any

from toy_task import ToyScene, toy_task
from vla_pruner.scenes.scene import Suite

FOLDER = "TOY_FOLDER"
"""Environment variable: where the files are that scenes write."""


def _first(name: str) -> bool:
    """Whether this is the first process that asks."""
    try:
        (Path(os.environ[FOLDER]) / name).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


class LoggingScene(ToyScene):
    """Writes down every reset, and the process that it happens in."""

    def reset(self, seed: int, target: int) -> dict[str, Any]:
        with (Path(os.environ[FOLDER]) / "resets").open("a") as file:
            file.write(f"{seed}:{os.getpid()}\n")
        return super().reset(seed, target)


class FaultyScene(LoggingScene):
    """The first time, the process is killed in the middle of scene 101, and scene 102 hangs."""

    def step(self, action: Any) -> None:
        super().step(action)
        if self.seed == 101 and len(self.actions) == 3 and _first("killed"):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.seed == 102 and len(self.actions) == 3 and _first("hung"):
            time.sleep(3600)


class DeadlyScene(LoggingScene):
    """The process is killed in scene 101, every time."""

    def step(self, action: Any) -> None:
        super().step(action)
        if self.seed == 101:
            os.kill(os.getpid(), signal.SIGKILL)


class BrokenScene(LoggingScene):
    """Scene 101 raises."""

    def step(self, action: Any) -> None:
        super().step(action)
        if self.seed == 101:
            raise ValueError("joint 3 is out of range")


class SlowScene(LoggingScene):
    """A step takes a while."""

    def step(self, action: Any) -> None:
        time.sleep(0.05)
        super().step(action)


class MeetingScene(SlowScene):
    """The first step waits until scenes of two processes have begun."""

    def step(self, action: Any) -> None:
        deadline = time.monotonic() + 600
        while not self.actions and time.monotonic() < deadline:
            lines = (Path(os.environ[FOLDER]) / "resets").read_text().split()
            if len({line.partition(":")[2] for line in lines}) >= 2:
                break
            time.sleep(0.05)
        super().step(action)


def _suite(name: str, scene: type[ToyScene]) -> Suite:
    return dataclasses.replace(toy_task(), name=f"faulty:{name}", open_scene=scene)


def logging() -> Suite:
    return _suite("logging", LoggingScene)


def once() -> Suite:
    return _suite("once", FaultyScene)


def deadly() -> Suite:
    return _suite("deadly", DeadlyScene)


def broken() -> Suite:
    return _suite("broken", BrokenScene)


def slow() -> Suite:
    return _suite("slow", SlowScene)


def meeting() -> Suite:
    return _suite("meeting", MeetingScene)
