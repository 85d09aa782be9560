"""Benchmark classes of vla-eval, the field's harness, as scenes and suites of this package.

Non-obvious behaviours
----------------------
* Scene number `seed` is official initial state `seed // tasks` of task `seed % tasks`. LIBERO draws
  the poses of fixtures anew at every reset, from the number of the scene: without that, the same
  initial state would look different from run to run.
* Observations, actions, waiting steps and step limits are those of vla-eval's class. It draws every
  camera at every step, also when nobody looks; here LIBERO is drawn when somebody does.
* LIBERO's initial states are pickles. They are read from the installed package alone.
"""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import os
import random
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vla_pruner.scenes import rendering
from vla_pruner.scenes.late_cameras import LateCameras
from vla_pruner.scenes.scene import Suite, hold_delta

INITIAL_STATES = 50
"""Official ones of each LIBERO task."""

_ORIGINALS = "lerobot/libero-assets"
_CAMERAS = ("agentview", "wrist")
_PREPARE = (
    "run `make libero` in a checkout of vla-pruner, and set LIBERO_CONFIG_PATH as it says "
    "(docs/serving.md)"
)


class HarnessScene:
    """A `Scene` that a vla-eval benchmark simulates.

    Args:
        benchmark: an instance of a vla-eval `Benchmark` class that sends `images`,
            `task_description` and, for policies that read it, `states`.
    """

    def __init__(self, benchmark: Any) -> None:
        self._benchmark = benchmark
        self._loop = asyncio.new_event_loop()
        self._tasks = benchmark.get_tasks()
        self._seen: Mapping[str, Any] | None = None

    def reset(self, seed: int, target: int) -> dict[str, Any]:
        """Start the episode of `seed`; the result has the `instruction`."""
        random.seed(seed)
        np.random.seed(seed)
        self._benchmark.env_seed = seed  # LIBERO seeds a simulator that it has just built itself
        task = {**self._tasks[target], "episode_idx": seed // len(self._tasks)}
        self._wait(self._benchmark.start_episode(task))
        self._seen = None
        return {"instruction": self._look()["task_description"]}

    def observe(self, cameras: tuple[str, ...]) -> dict[str, np.ndarray]:
        """Images uint8 `[H, W, 3]` by camera."""
        images = self._look()["images"]
        return {camera: images[camera] for camera in cameras}

    def proprio(self) -> np.ndarray:
        """State of the robot, float32 `[P]`."""
        return np.asarray(self._look()["states"], dtype=np.float32)

    def pose(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Hand `[3]` (m) and joints `[J]` (rad), where the benchmark's class has a `pose`."""
        pose = getattr(self._benchmark, "pose", None)
        return (self.proprio()[:3], None) if pose is None else pose()

    def hold(self, last: np.ndarray | None) -> np.ndarray:
        """The command that leaves the arm where it is, where the benchmark's class has a `hold`.

        Raises:
            ValueError: it has none.
        """
        own = getattr(self._benchmark, "hold", None)
        if own is None:
            raise ValueError(
                f"--live: {type(self._benchmark).__name__} does not say how the robot holds still; "
                "give it a method `hold(last)` that returns the command"
            )
        return own(last)

    def step(self, action: np.ndarray) -> None:
        """Apply one action `[dim]`."""
        self._wait(self._benchmark.apply_action({"actions": np.asarray(action)}))
        self._seen = None

    def success(self) -> bool:
        """Whether the episode has ended with success."""
        done = self._wait(self._benchmark.is_done())
        return bool(done and self._wait(self._benchmark.get_result())["success"])

    def close(self) -> None:
        """Free the simulator."""
        self._benchmark.cleanup()
        self._loop.close()

    def _look(self) -> Mapping[str, Any]:
        """What the benchmark shows now; it is asked once for each state."""
        if self._seen is None:
            self._seen = self._wait(self._benchmark.get_observation())
        return self._seen

    def _wait(self, what: Any) -> Any:
        return self._loop.run_until_complete(what)


# -- LIBERO --------------------------------------------------------------------------------------


def libero(name: str) -> Suite:
    """One of the four LIBERO suites, by vla-eval's class: official initial states and step limits.

    Raises:
        ImportError: vla-eval is not installed.
        FileNotFoundError: LIBERO, or its meshes and textures, are not there.
        ValueError: its initial states are not those of the installed package.
    """
    assets = _find_libero() / "assets"
    benchmark = _open_benchmark(name)
    origin = assets / "ORIGIN"
    return Suite(
        name=name,
        open_scene=partial(_open_scene, name),
        cameras=_CAMERAS,
        seeds=range(INITIAL_STATES * len(benchmark.get_tasks())),
        tasks=tuple(task["name"] for task in benchmark.get_tasks()),
        step_limit=benchmark.get_metadata()["max_steps"],
        hz=20,
        stand_in_assets=not (origin.is_file() and _ORIGINALS in origin.read_text("utf-8")),
    )


def _open_scene(name: str) -> HarnessScene:
    scene = HarnessScene(_open_benchmark(name))
    importlib.import_module("libero.libero.envs")
    gc.freeze()  # robosuite collects at every reset, through all that torch and it have loaded
    return scene


def _open_benchmark(name: str) -> Any:
    """vla-eval's class, with everything that our policies may read."""
    rendering.settle()
    _find_libero()
    benchmark = _late_libero()(
        suite=name, send_wrist_image=True, send_state=True, quat_no_antipodal=True
    )
    load = torch.load
    try:
        benchmark.get_tasks()  # It lets torch.load unpickle anything from then on; undone here.
    finally:
        torch.load = load
    return benchmark


def _late_libero() -> type:
    """vla-eval's class for LIBERO, with cameras that are drawn when it is asked what it shows."""
    from vla_eval.benchmarks.libero.benchmark import LIBEROBenchmark

    class LateLIBERO(LIBEROBenchmark):
        _cameras: LateCameras

        def __setattr__(self, name: str, value: Any) -> None:
            if name == "_env" and value is not None:  # it keeps its simulator there
                self._cameras = LateCameras(value.env)
            super().__setattr__(name, value)

        def pose(self) -> tuple[np.ndarray, np.ndarray]:
            """Hand and joints as the simulator has them: nothing is drawn."""
            robot = self._env.robots[0]
            hand = robot.sim.data.site_xpos[robot.eef_site_id]
            return np.array(hand), np.array(robot._joint_positions)

        def hold(self, last: np.ndarray | None) -> np.ndarray:
            """Commands are differences of poses here."""
            return hold_delta(last)

        def make_obs(self, raw_obs: Any, task: Any) -> Any:
            return super().make_obs(self._cameras.drawn(raw_obs), task)

    return LateLIBERO


def _find_libero() -> Path:
    """The installed package, after a check of everything that it would ask for or fail on."""
    found = importlib.util.find_spec("libero")
    if found is None or not found.submodule_search_locations:
        raise FileNotFoundError(f"LIBERO is not installed; {_PREPARE}")
    package = Path(found.submodule_search_locations[0], "libero").resolve()
    folder = Path(os.environ.get("LIBERO_CONFIG_PATH", Path.home() / ".libero"))
    if not (folder / "config.yaml").is_file():
        raise FileNotFoundError(f"LIBERO has no {folder / 'config.yaml'}; {_PREPARE}")
    from libero.libero import get_libero_path

    if not (package / "assets" / "scenes").is_dir():
        raise FileNotFoundError(
            f"LIBERO's meshes and textures are not in {package / 'assets'}; {_PREPARE}"
        )
    states = Path(get_libero_path("init_states")).resolve()
    if not states.is_relative_to(package):
        raise ValueError(
            f"LIBERO's initial states are pickles, and {folder / 'config.yaml'} takes them from "
            f"{states}, outside the installed package {package}; {_PREPARE}"
        )
    return package
