"""Which library MuJoCo draws with: settled before it is imported, explained where it fails."""

from __future__ import annotations

import os
import sys
from ctypes.util import find_library
from typing import Any

_OFF = ("disable", "disabled", "off", "false", "0")
_ON_A_DISPLAY = ("glfw", "glx", "enable", "enabled", "on", "true", "1")
# What each is called by the linker, and in Debian.
_LIBRARIES = {"egl": "EGL", "osmesa": "OSMesa"}
_CONTEXT = "mujoco.rendering.classic.gl_context"
_PACKAGES = {"egl": "libegl1 libgl1-mesa-dri", "osmesa": "libosmesa6"}

_settled: dict[str, str] = {}  # robosuite overwrites MUJOCO_GL


def settle() -> None:
    """Choose what MuJoCo draws with, EGL unless the environment says otherwise.

    To be called before `mujoco` or `robosuite` is imported: they read the environment once.

    Raises:
        RuntimeError: it cannot draw like this; the sentence says what to change.
    """
    os.environ.setdefault("LP_NUM_THREADS", "1")
    if sys.platform != "linux":
        return
    asked = os.environ.get("MUJOCO_GL", "").strip().lower()
    opengl = os.environ.get("PYOPENGL_PLATFORM", "").strip().lower()
    chosen = asked or (opengl if opengl in _LIBRARIES else "egl")
    os.environ["MUJOCO_GL"] = _settled["by"] = chosen
    if chosen in _OFF:
        raise RuntimeError(
            f"MUJOCO_GL={asked!r} switches drawing off, but a policy looks at images; unset it"
        )
    if chosen in _ON_A_DISPLAY:
        if not os.environ.get("DISPLAY") and not os.environ.get("WAYLAND_DISPLAY"):
            raise RuntimeError(
                f"MUJOCO_GL={asked!r} draws on a display, and there is none (DISPLAY is not set); "
                "unset MUJOCO_GL to draw without one"
            )
        return
    if chosen not in _LIBRARIES:
        raise RuntimeError(
            f"MUJOCO_GL={asked!r} is unknown here; unset it to draw with EGL, or set it to osmesa"
        )
    if opengl and opengl != chosen:
        raise RuntimeError(
            f"PYOPENGL_PLATFORM={opengl!r} and MUJOCO_GL={chosen!r} contradict one another; unset "
            "PYOPENGL_PLATFORM"
        )
    if find_library(_LIBRARIES[chosen]) is None:
        other = "egl" if chosen == "osmesa" else "osmesa"
        instead = ""
        if find_library(_LIBRARIES[other]) is not None:
            instead = f", or set MUJOCO_GL={other}, whose library is here"
        raise RuntimeError(
            f"MuJoCo is to draw with {_LIBRARIES[chosen]} (MUJOCO_GL={chosen}), and that library "
            f"is missing; on Debian: apt-get install {_PACKAGES[chosen]}{instead}"
        )


def check_device() -> None:
    """Look for the EGL device that is to be drawn on, if EGL draws.

    Raises:
        RuntimeError: there is none, or `MUJOCO_EGL_DEVICE_ID` names none.
    """
    devices = _egl_devices()
    if devices is None:
        return
    if devices == 0:
        raise RuntimeError(
            "EGL finds no device to draw on. On Debian: apt-get install libgl1-mesa-dri (draws on "
            "the CPU), or install the driver of the GPU"
            + _hidden_by("__EGL_VENDOR_LIBRARY_FILENAMES", "__EGL_VENDOR_LIBRARY_DIRS")
        )
    asked = os.environ.get("MUJOCO_EGL_DEVICE_ID")
    if asked is not None and not (asked.isdecimal() and int(asked) < devices):
        known = "one EGL device, 0" if devices == 1 else f"EGL devices 0 to {devices - 1}"
        raise RuntimeError(
            f"MUJOCO_EGL_DEVICE_ID={asked!r} names no device: this machine has {known}; unset it, "
            "or choose one of these"
        )


def explain(error: BaseException) -> str:
    """Why MuJoCo could not be imported, or not draw, and what helps."""
    chosen = _settled.get("by", "egl")
    said = str(error).strip().split("\n")[0] or type(error).__name__
    loaded = _loaded()
    if loaded is not None and loaded != chosen and chosen in _LIBRARIES:
        return (
            f"MuJoCo could not draw ({said}): it was imported before this package, to draw with "
            f"{loaded}; set MUJOCO_GL={chosen} before Python starts, or import "
            "vla_pruner.reference.scene first"
        )
    try:
        check_device()
    except RuntimeError as better:
        return f"MuJoCo could not draw ({said}). {better}"
    if chosen == "egl":
        count = _egl_devices() or 0
        others = ", or on another device: MUJOCO_EGL_DEVICE_ID=1" if count > 1 else ""
        return (
            f"MuJoCo could not draw with EGL ({said}), though its library and {count} device(s) "
            f"are here. Look at the rights to /dev/dri and the driver's version{others}; "
            f"MUJOCO_GL=osmesa draws without a driver (apt-get install {_PACKAGES['osmesa']})"
        )
    return (
        f"MuJoCo could not draw with {chosen} ({said}); unset MUJOCO_GL to draw with EGL, which "
        f"needs {_PACKAGES['egl']}"
    )


def open_renderer(model: Any, width: int, height: int) -> Any:
    """`mujoco.Renderer`, or a sentence why there is none. Errors: RuntimeError."""
    import mujoco

    check_device()
    context: Any = getattr(sys.modules.get(_CONTEXT), "GLContext", None)
    if context is not None and not hasattr(context, "_context"):
        context._context = None  # Its finaliser looks there even if nothing was made.
    try:
        return mujoco.Renderer(model, height, width)
    except Exception as error:
        raise RuntimeError(explain(error)) from error


def _loaded() -> str | None:
    """What an imported MuJoCo draws with: "egl", "osmesa", "glfw"; None if it is not imported."""
    if _CONTEXT not in sys.modules:
        return None
    context = getattr(sys.modules[_CONTEXT], "GLContext", None)
    return "nothing" if context is None else str(context.__module__).rpartition(".")[2]


def _egl_devices() -> int | None:
    """EGL devices of this machine; None if MuJoCo does not draw with EGL, or cannot say."""
    if _loaded() != "egl":
        return None
    try:
        from mujoco.egl import egl_ext

        return len(egl_ext.eglQueryDevicesEXT())
    except Exception:  # PyOpenGL raises errors of its own when the library is broken
        return None


def _hidden_by(*names: str) -> str:
    """A reminder of variables that hide devices."""
    found = [f"{name}={os.environ[name]!r}" for name in names if name in os.environ]
    return f"; {' and '.join(found)} may hide one" if found else ""
