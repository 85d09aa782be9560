"""Whoever lets a policy act in a scene drives the gripper as the policy writes it.

Published checkpoints write 0 close and 1 open ("rlds"); scenes take +1 close and -1 open.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from toy_task import ToyScene, save_policy, toy_task
from vla_pruner.analysis.record import trace
from vla_pruner.commands import analyze, calibrate, demo
from vla_pruner.episodes.condition import Condition
from vla_pruner.models.loading import load
from vla_pruner.runs.job import Job, Planned, Setup
from vla_pruner.runs.replay import record
from vla_pruner.runs.runner import EpisodeRunner

SOURCE = Path(__file__).parents[2] / "src" / "vla_pruner"
WRITTEN = 0.25
"""Last entry of every action: three quarters closed, as "rlds" has it."""


@pytest.fixture
def policy_folder(tmp_path: Path) -> Callable[[str], str]:
    """A policy whose config.json says how it writes the gripper."""

    def make(gripper: str) -> str:
        name = save_policy(tmp_path / gripper)
        file = Path(name) / "config.json"
        config = json.loads(file.read_text("utf-8"))
        config["control"] = {"gripper": gripper, "execute": 2}
        file.write_text(json.dumps(config), "utf-8")
        return name

    return make


def loaded(name: str) -> Any:
    """The policy, with a known last entry in every action."""
    policy: Any = load(name)
    act = policy.predict_action

    def predict_action(*args: Any, **kwargs: Any) -> np.ndarray:
        actions = np.array(act(*args, **kwargs))
        actions[..., -1] = WRITTEN
        return actions

    policy.predict_action = predict_action
    return policy


class Scene(ToyScene):
    """Notes every command of the gripper."""

    def __init__(self) -> None:
        super().__init__()
        self.gripper: list[float] = []

    def step(self, action: np.ndarray) -> None:
        self.gripper.append(float(action[-1]))
        super().step(action)


def in_an_evaluation(name: str, scene: Scene, out: Path) -> None:
    suite = toy_task(scene)
    setup = Setup.of(name, load(name), suite)
    runner = EpisodeRunner(loaded)
    for condition in (Condition(), Condition("fastv", 0.5)):
        runner.run(Job(Planned(setup, condition, {}, None, 0, 1), suite, 100, record=True))


def in_a_recording_for_latency(name: str, scene: Scene, out: Path) -> None:
    policy = loaded(name)
    record(policy, scene, 100, 0, Setup.of(name, policy, toy_task(scene)), out / "scene.npz")


def in_a_trace(name: str, scene: Scene, out: Path) -> None:
    policy = loaded(name)
    setup = Setup.of(name, policy, toy_task(scene))
    trace(policy, scene, 100, 0, setup=setup, layer=1, ways={})


def arguments(command: Any, *words: str) -> Any:
    parser = ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args([*words])


def in_the_demo(name: str, scene: Scene, out: Path) -> None:
    words = ["--policy", name, "--keep", "0.5", "--episodes", "1", "--out", str(out / "demo")]
    demo.demo(arguments(demo, *words), toy_task(scene), Console(file=StringIO()))


def in_analyze(name: str, scene: Scene, out: Path) -> None:
    words = ["--policy", name, "--methods", "fastv", "--layer", "1", "--episodes", "1"]
    args = arguments(analyze, *words, "--out", str(out / "analysis"))
    analyze.analyze(args, toy_task(scene), Console(file=StringIO()))


def in_calibrate(name: str, scene: Scene, out: Path) -> None:
    words = ["efficientvla", "--policy", name, "--episodes", "1", "--first-seed", "10"]
    args = arguments(calibrate, *words, "--out", str(out / "recipe.json"))
    console = Console(file=StringIO())
    suite = toy_task(scene)
    calibrate.calibrate_command(args, console=console, open_suite=lambda: suite, open_policy=loaded)


USERS = (
    in_an_evaluation,
    in_a_recording_for_latency,
    in_a_trace,
    in_the_demo,
    in_analyze,
    in_calibrate,
)


@pytest.mark.parametrize(
    ("gripper", "expected"), [("rlds", 1 - 2 * WRITTEN), ("robosuite", WRITTEN)]
)
@pytest.mark.parametrize("user", USERS)
def test_the_gripper_is_driven_as_the_policy_writes_it(
    user: Callable[[str, Scene, Path], None],
    gripper: str,
    expected: float,
    policy_folder: Callable[[str], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(demo, "load", lambda name, device: loaded(name))
    monkeypatch.setattr(analyze, "load", lambda name, device: loaded(name))
    scene = Scene()
    user(policy_folder(gripper), scene, tmp_path)
    assert len(scene.gripper) >= 7
    assert scene.gripper == pytest.approx([expected] * len(scene.gripper))


def test_a_scene_is_stepped_in_one_place() -> None:
    """Besides the loop: the benchmark class for vla-eval, and what made the reference policies."""
    found = {
        str(path.relative_to(SOURCE))
        for path in SOURCE.rglob("*.py")
        if "scene.step(" in path.read_text("utf-8") and "reference" not in path.parts
    }
    assert found == {"episodes/episode.py", "serving/pickplace.py"}
