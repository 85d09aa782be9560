"""A benchmark class of vla-eval as a scene, and what is said where LIBERO or SIMPLER cannot run."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from vla_pruner.scenes.suites import SUITES, open_suite
from vla_pruner.scenes.vla_eval import HarnessScene, libero


class Benchmark:
    """Three tasks; solved by the second action; draws a number when it starts."""

    env_seed = 7

    def __init__(self) -> None:
        self.started: list[dict] = []
        self.closed = False

    def get_tasks(self):
        return [{"name": f"task {number}", "task_id": number} for number in range(3)]

    async def start_episode(self, task, recorder=None):
        self.started.append(task)
        self.actions: list[np.ndarray] = []
        self.drawn = float(np.random.random())
        self.name = task["name"]

    async def apply_action(self, action):
        self.actions.append(action["actions"])

    async def get_observation(self):
        image = np.full((4, 4, 3), len(self.actions), dtype=np.uint8)
        return {
            "images": {"agentview": image, "wrist": image + 100},
            "states": [self.drawn] * 8,
            "task_description": self.name,
        }

    async def is_done(self):
        return len(self.actions) == 2

    async def get_result(self):
        return {"success": self.actions[-1][-1] > 0}

    def cleanup(self):
        self.closed = True


def test_a_scene_number_is_an_initial_state_of_a_task():
    benchmark = Benchmark()
    scene = HarnessScene(benchmark)
    assert scene.reset(7, 1) == {"instruction": "task 1"}
    assert (benchmark.started[0]["task_id"], benchmark.started[0]["episode_idx"]) == (1, 2)
    assert benchmark.env_seed == 7


def test_what_is_drawn_at_reset_depends_on_the_scene_alone():
    scene = HarnessScene(Benchmark())

    def drawn(seed: int) -> float:
        scene.reset(seed, seed % 3)
        return float(scene.proprio()[0])

    first = drawn(4)
    assert drawn(5) != first
    assert drawn(4) == first


def test_a_scene_acts_looks_and_ends_with_success_alone():
    scene = HarnessScene(Benchmark())
    for last, success in ((1.0, True), (-1.0, False)):
        scene.reset(0, 0)
        for number in range(2):
            assert scene.observe(("wrist",))["wrist"][0, 0, 0] == 100 + number
            assert not scene.success()
            scene.step(np.array([0.0, last]))
        assert scene.success() is success
    scene.close()
    assert scene._benchmark.closed


def test_every_suite_has_a_name():
    assert list(SUITES)[:5] == [
        "robosuite_pickplace",
        *(f"libero_{which}" for which in ("spatial", "object", "goal", "10")),
    ]


@pytest.mark.parametrize("name", ["simpler", "simpler_pick_coke_can", "simpler_open_drawer"])
def test_simpler_says_how_it_is_run(name):
    assert name not in SUITES
    with pytest.raises(ValueError, match=rf"{name}. does not run.*vla-pruner serve"):
        open_suite(name)


# -- LIBERO --------------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package `libero` that holds nothing, and a folder for its configuration."""
    root = tmp_path / "site" / "libero" / "libero"
    root.mkdir(parents=True)
    (root.parent / "__init__.py").write_text("")
    (root / "__init__.py").write_text(
        "import json, os\n"
        "def get_libero_path(key):\n"
        "    with open(os.environ['LIBERO_CONFIG_PATH'] + '/config.yaml') as file:\n"
        "        return json.load(file)[key]\n"
    )
    for name in [name for name in sys.modules if name.partition(".")[0] == "libero"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("LIBERO_CONFIG_PATH", str(tmp_path))
    yield root
    for name in [name for name in sys.modules if name.partition(".")[0] == "libero"]:
        del sys.modules[name]


def test_what_libero_lacks_is_named_with_the_command_that_gets_it(package, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no .*config\.yaml; run `make libero`"):
        libero("libero_object")
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({"init_states": str(tmp_path / "downloaded")}))
    with pytest.raises(FileNotFoundError, match=r"meshes and textures are not in .*`make libero`"):
        libero("libero_object")


def test_initial_states_from_elsewhere_are_never_unpickled(package, tmp_path):
    (package / "assets" / "scenes").mkdir(parents=True)
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({"init_states": str(tmp_path / "downloaded")}))
    with pytest.raises(ValueError, match=r"pickles, and .* outside the installed package"):
        libero("libero_object")


def test_no_libero_is_an_error_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="not installed; run `make libero`"):
        libero("libero_object")


ROLLOUT = """
import numpy as np, torch
from vla_pruner.scenes.suites import open_suite
load = torch.load
suite = open_suite("libero_object")
assert torch.load is load
assert (len(suite.tasks), len(suite.seeds), suite.step_limit) == (10, 500, 280)
seen = []
for _ in range(2):
    scene = suite.open_scene()
    print(scene.reset(13, 3))
    scene.step(np.array([0, 0, 0, 0, 0, 0, -1.0]))
    seen.append((scene.observe(suite.cameras), scene.proprio()))
    assert not scene.success()
    scene.close()
(first, state), (second, again) = seen
assert state.shape == (8,)
assert np.array_equal(state, again)
for camera in suite.cameras:
    assert first[camera].shape == (256, 256, 3) and first[camera].std() > 10
    assert np.array_equal(first[camera], second[camera])
"""


_NEEDS_LIBERO = pytest.mark.skipif(
    "LIBERO_CONFIG_PATH" not in os.environ,
    reason="LIBERO is not prepared: run `make libero`, and set LIBERO_CONFIG_PATH as it says",
)


@_NEEDS_LIBERO
def test_libero_starts_the_same_twice():
    found = subprocess.run([sys.executable, "-c", ROLLOUT], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert "pick up the" in found.stdout


LATE = """
import numpy as np
from vla_eval.benchmarks.libero.benchmark import LIBEROBenchmark
from vla_pruner.scenes.vla_eval import HarnessScene
from vla_pruner.scenes.suites import open_suite
suite = open_suite("libero_goal")
task = suite.tasks.index("turn on the stove")
options = {"send_wrist_image": True, "send_state": True, "quat_no_antipodal": True}
every_step = HarnessScene(LIBEROBenchmark(suite="libero_goal", **options))
late = suite.open_scene()
moves = np.random.default_rng(0).uniform(-1, 1, (10, 7))

def seen(scene, seed):
    scene.reset(seed, task)
    for number, move in enumerate(moves):
        if number % 4 == 0:
            yield scene.observe(suite.cameras), scene.proprio()
        simulation = scene._benchmark._env.sim
        if number in (5, 9):  # the burner goes on, and off: seen later, and at once
            (knob,) = (name for name in simulation.model.joint_names if "stove" in name)
            burner = simulation.model.site_rgba.copy()
            simulation.data.set_joint_qpos(knob, 1.0 if number == 5 else 0.0)
            scene.step(0 * move)
            assert (simulation.model.site_rgba != burner).any()
        else:
            scene.step(move)
    yield scene.observe(suite.cameras), scene.proprio()

for seed in (task, 10 + task):
    pairs = list(zip(seen(every_step, seed), seen(late, seed), strict=True))
    assert len(pairs) == 4
    for (wanted, state), (found, again) in pairs:
        assert np.array_equal(state, again)
        for camera in suite.cameras:
            assert wanted[camera].std() > 10
            assert np.array_equal(wanted[camera], found[camera])
late.close()
every_step.close()
"""


@_NEEDS_LIBERO
def test_images_drawn_late_are_those_that_vla_eval_draws_at_every_step():
    found = subprocess.run([sys.executable, "-c", LATE], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
