"""What MuJoCo draws with is settled early, and what stands in the way is said in a sentence."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from vla_pruner.scenes import rendering

VARIABLES = ("MUJOCO_GL", "PYOPENGL_PLATFORM", "MUJOCO_EGL_DEVICE_ID", "DISPLAY", "WAYLAND_DISPLAY")
linux = pytest.mark.skipif(sys.platform != "linux", reason="EGL and OSMesa are Linux's")
simulator = pytest.mark.skipif(find_spec("robosuite") is None, reason="robosuite is missing")


@pytest.fixture
def environment(monkeypatch):
    """`settle()` in another environment, on a machine with these libraries."""

    def settle(*libraries: str, **variables: str) -> str:
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        found = dict.fromkeys(libraries, "lib.so")
        monkeypatch.setattr(rendering, "find_library", found.get)
        monkeypatch.setattr(rendering, "_settled", {})
        rendering.settle()
        return os.environ["MUJOCO_GL"]

    return settle


@linux
def test_egl_unless_said_otherwise(environment):
    assert environment("EGL") == "egl"
    assert environment("EGL", MUJOCO_GL="") == "egl"
    assert environment("EGL", MUJOCO_GL=" EGL ") == "egl"
    assert environment("EGL", PYOPENGL_PLATFORM="egl") == "egl"
    assert environment("OSMesa", MUJOCO_GL="osmesa") == "osmesa"
    assert environment("OSMesa", "EGL", PYOPENGL_PLATFORM="osmesa") == "osmesa"
    assert environment(MUJOCO_GL="glfw", DISPLAY=":0") == "glfw"


@linux
@pytest.mark.parametrize(
    ("libraries", "variables", "said"),
    [
        (["EGL"], {"MUJOCO_GL": "osmesa"}, r"apt-get install libosmesa6, or set MUJOCO_GL=egl"),
        (["EGL"], {"PYOPENGL_PLATFORM": "osmesa"}, "apt-get install libosmesa6"),
        ([], {"MUJOCO_GL": "osmesa"}, "apt-get install libosmesa6$"),
        ([], {}, "apt-get install libegl1 libgl1-mesa-dri$"),
        (["OSMesa"], {}, "install libegl1 libgl1-mesa-dri, or set MUJOCO_GL=osmesa"),
        (["EGL"], {"MUJOCO_GL": "egl", "PYOPENGL_PLATFORM": "osmesa"}, "unset PYOPENGL_PLATFORM"),
        (["OSMesa"], {"MUJOCO_GL": "osmesa", "PYOPENGL_PLATFORM": "egl"}, "unset PYOPENGL"),
        (["EGL"], {"PYOPENGL_PLATFORM": "glx"}, "unset PYOPENGL_PLATFORM"),
        (["EGL"], {"MUJOCO_GL": "disable"}, "switches drawing off"),
        (["EGL"], {"MUJOCO_GL": "0"}, "switches drawing off"),
        (["EGL"], {"MUJOCO_GL": "glfw"}, "there is none"),
        (["EGL"], {"MUJOCO_GL": "glx"}, "there is none"),
        (["EGL"], {"MUJOCO_GL": "wgl"}, "'wgl' is unknown"),
        (["EGL"], {"MUJOCO_GL": "vulkan"}, "'vulkan' is unknown"),
    ],
)
def test_what_stands_in_the_way(environment, libraries, variables, said):
    with pytest.raises(RuntimeError, match=said) as error:
        environment(*libraries, **variables)
    # Nothing is advised that is so already.
    for name, value in variables.items():
        assert f"set {name}={value}" not in str(error.value)
    for library, package in (("EGL", "libegl1"), ("OSMesa", "libosmesa6")):
        assert library not in libraries or package not in str(error.value)


@pytest.mark.parametrize(
    ("devices", "asked", "said"),
    [
        (1, "7", "one EGL device, 0"),
        (3, "3", "EGL devices 0 to 2"),
        (3, "-1", "EGL devices 0 to 2"),
        (1, "abc", "'abc' names no device"),
        (1, "", "'' names no device"),
        (0, None, "libgl1-mesa-dri"),
    ],
)
def test_devices_that_are_not_there(monkeypatch, devices, asked, said):
    monkeypatch.setattr(rendering, "_egl_devices", lambda: devices)
    monkeypatch.delenv("MUJOCO_EGL_DEVICE_ID", raising=False)
    if asked is not None:
        monkeypatch.setenv("MUJOCO_EGL_DEVICE_ID", asked)
    with pytest.raises(RuntimeError, match=said):
        rendering.check_device()
    assert said.split(" names")[0] in rendering.explain(ValueError("no display"))


def test_devices_that_are_there(monkeypatch):
    monkeypatch.setattr(rendering, "_egl_devices", lambda: 3)
    for asked in ("0", "2"):
        monkeypatch.setenv("MUJOCO_EGL_DEVICE_ID", asked)
        rendering.check_device()
    monkeypatch.setattr(rendering, "_egl_devices", lambda: None)
    monkeypatch.setenv("MUJOCO_EGL_DEVICE_ID", "7")
    rendering.check_device()  # something else draws


def test_an_import_before_ours_is_named(monkeypatch):
    monkeypatch.setattr(rendering, "_loaded", lambda: "glfw")
    monkeypatch.setitem(rendering._settled, "by", "egl")
    said = rendering.explain(RuntimeError("gladLoadGL error"))
    assert "gladLoadGL error" in said and "imported before" in said and "MUJOCO_GL=egl" in said


def test_a_display_that_does_not_work(monkeypatch, environment):
    environment(MUJOCO_GL="glfw", DISPLAY=":99")
    monkeypatch.setenv("MUJOCO_GL", "egl")  # as robosuite does
    monkeypatch.setattr(rendering, "_loaded", lambda: "glfw")
    said = rendering.explain(RuntimeError("gladLoadGL error"))
    assert "with glfw (gladLoadGL error); unset MUJOCO_GL" in said


DRAW = """
from vla_pruner.reference.scene import CAMERAS, PickPlaceScene
with PickPlaceScene() as scene:
    scene.reset(1, target=0)
    print(sorted(scene.observe(CAMERAS)))
"""


@linux
@simulator
@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"MUJOCO_EGL_DEVICE_ID": "77"}, "MUJOCO_EGL_DEVICE_ID='77' names no device"),
        ({"MUJOCO_GL": "wgl"}, "MUJOCO_GL='wgl' is unknown"),
        ({"MUJOCO_GL": "egl", "PYOPENGL_PLATFORM": "osmesa"}, "unset PYOPENGL_PLATFORM"),
    ],
)
def test_a_process_of_its_own_says_it_too(variables, said):
    """The last line is ours, and no finaliser complains behind it."""
    done = draw(DRAW, variables)
    assert done.returncode == 1 and done.stdout == ""
    last = done.stderr.strip().split("\n")[-1]
    assert last.startswith("RuntimeError: ") and said in last
    assert "Exception ignored" not in done.stderr


@linux
@simulator
def test_mujoco_imported_before_with_another_library(tmp_path):
    done = draw("import mujoco\n" + DRAW, {"MUJOCO_GL": "disable"}, before="MUJOCO_GL")
    assert done.returncode == 1 and "RuntimeError: " in done.stderr
    assert "AttributeError" not in done.stderr.strip().split("\n")[-1]


def draw(code: str, variables: dict[str, str], before: str = "") -> subprocess.CompletedProcess:
    """A new process; a variable named by `before` is taken away once MuJoCo is imported."""
    if before:
        lines = f"import os\nos.environ.pop({before!r})\n"
        code = code.replace("import mujoco\n", f"import mujoco\n{lines}")
    kept = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=kept | variables, capture_output=True, text=True)
