"""A policy whose passes take as long, and end as, its observations say; for engines under test."""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np

from vla_pruner.serving.policy import EpisodeKey, ServedPolicy, Step

WARM_UP = 3
HORIZON, DIM = 4, 2


class Scripted(ServedPolicy):
    """Row actions are `[marker + history / 1000, step]`, so that every mix-up shows by value.

    An instruction may say `sleep S`, `hang`, `die`, `nan`, `raise` or `refuse`.
    """

    def __init__(self, seconds: float = 0.0, warm_up: int = WARM_UP) -> None:
        self.seconds, self.first = seconds, warm_up
        self.memory: dict[EpisodeKey, list[float]] = {}
        self.passes: list[list[bool]] = []
        self.budgets: list[tuple[str, float]] = []

    @property
    def name(self) -> str:
        return "scripted"

    def warm_up(self, episode: EpisodeKey) -> bool:
        return len(self.memory.get(episode, ())) < self.first

    def blank(self) -> dict[str, Any] | None:
        return seen(0.0)

    def change(self, method: str, keep: float, options: Any = None) -> None:
        if not self.budgets or self.budgets[-1] != (method, keep):
            self.budgets.append((method, keep))

    def step(self, episodes: Any, observations: Any) -> list[Step]:
        for row in observations:
            self._obey(row["instruction"])
        time.sleep(self.seconds)
        self.passes.append([self.warm_up(episode) for episode in episodes])
        done = []
        for episode, row in zip(episodes, observations, strict=True):
            warm_up = self.warm_up(episode)
            past = self.memory.setdefault(episode, [])
            marker = float(row["proprio"][0])
            past.append(marker)
            value = np.nan if row["instruction"] == "nan" else sum(past)
            actions = np.array([[value, step] for step in range(HORIZON)], np.float32)
            keep = 1.0 if warm_up else 0.25
            tokens = 100 if warm_up else 25
            done.append(
                Step(actions, keep, tokens, warm_up, self.warm_up(episode), 0.001, "scripted")
            )
        return done

    def end(self, episode: EpisodeKey) -> None:
        self.memory.pop(episode, None)

    def close(self) -> None:
        self.memory.clear()

    def _obey(self, text: str) -> None:
        word, _, value = text.partition(" ")
        if word == "sleep":
            time.sleep(float(value))
        elif word == "hang":
            time.sleep(3600)
        elif word == "die":
            os._exit(3)
        elif word == "raise":
            raise RuntimeError("the kernel failed " + "x" * 10_000)
        elif word == "refuse":
            raise ValueError("this policy does not do that")


def seen(marker: float, text: str = "go") -> dict[str, Any]:
    """An observation that leaves its mark in all later actions of its episode."""
    image = np.zeros((8, 8, 3), np.uint8)
    return {"images": [image], "instruction": text, "proprio": np.array([marker])}


def stops_in_its_answer(pipe: Any, *_: Any) -> None:
    """A worker's process: the length of an answer, a few bytes of it, and no more."""
    os.write(pipe.fileno(), (100).to_bytes(4, "big") + b"abc")
    time.sleep(3600)
