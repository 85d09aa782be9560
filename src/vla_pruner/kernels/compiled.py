"""Compiles the C sources beside this file on first use, where this machine has a C compiler."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = (HERE / "max_min.c", HERE / "column_mean.c", HERE / "determinant.c")
HEADERS = (HERE / "lanes.h",)

# -fopenmp: PyTorch brings the same OpenMP runtime, whose threads are then shared.
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fPIC", "-shared")

_LONGEST_REASON = 300


class Unavailable(Exception):
    """Why nothing can be compiled here."""


def library(check: Callable[[ctypes.CDLL], None]) -> tuple[ctypes.CDLL | None, str]:
    """What was compiled, or None, and a sentence for people.

    Args:
        check: declares the functions of a library and tries them.

    Raises:
        Nothing: without a library there is always another way.
    """
    if os.environ.get("VLA_PRUNER_COMPILE", "1") == "0":
        return None, "not compiled (VLA_PRUNER_COMPILE=0)"
    try:
        path, compiler = _compile()
        found = ctypes.CDLL(str(path))
        check(found)
        return found, f"compiled by {compiler}"
    except Exception as error:  # Whatever goes wrong with a compiler: the plain way is as right.
        said = str(error).strip() or type(error).__name__
        return None, f"not compiled ({said.splitlines()[0][:_LONGEST_REASON]})"


def _compile() -> tuple[Path, str]:
    """Path of the shared library, built unless a run before has, and the compiler's name."""
    found = _compiler()
    # Its predefined macros tell the compiler's version and every instruction it would use.
    macros = _run([*found, *FLAGS, "-dM", "-E", "-x", "c", os.devnull])
    version = re.search(r'^#define __VERSION__ "(.*)"', macros, re.MULTILINE)
    name = Path(found[0]).name
    title = f"{name} {version[1]}" if version else name
    sources = [path.read_text(encoding="utf-8") for path in (*SOURCES, *HEADERS)]
    text = "\0".join([macros, *found, *FLAGS, *sources])
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    folder = _folder()
    for path in sorted(folder.glob(f"pruning-{key}-*.so")):
        if _is_as_built(path):
            return path, title
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        built = Path(scratch) / "pruning.so"
        _run([*found, *FLAGS, *map(str, SOURCES), "-o", str(built), "-lm"])
        built.chmod(0o600)
        path = folder / f"pruning-{key}-{_digest(built)}.so"
        built.replace(path)  # In one step: another process may be doing the same.
    return path, title


def _folder() -> Path:
    """Where libraries are kept: a folder that nobody else can write to."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vla-pruner"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if {folder.lstat().st_uid, folder.stat().st_uid} != {os.getuid()}:
        raise Unavailable(f"{folder} belongs to another user; set XDG_CACHE_HOME to your own")
    if folder.stat().st_mode & 0o022:
        folder.chmod(0o700)
    return folder


def _is_as_built(path: Path) -> bool:
    """Whether a library is ours, writable by us alone, and holds what its name says."""
    found = path.lstat()
    ours = found.st_uid == os.getuid() and stat.S_ISREG(found.st_mode)
    return ours and not found.st_mode & 0o022 and path.stem.endswith(f"-{_digest(path)}")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]


def _compiler() -> list[str]:
    """The words that start the C compiler."""
    try:
        named = shlex.split(os.environ.get("CC", ""))
    except ValueError as error:
        raise Unavailable(f"CC={os.environ['CC']!r} cannot be read: {error}") from None
    found = named or [path for path in map(shutil.which, ("gcc", "cc")) if path][:1]
    if not found:
        raise Unavailable("no C compiler; on Debian: apt-get install gcc libc6-dev")
    return found


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=60, check=True
        )
    except subprocess.CalledProcessError as error:
        said = (error.stderr.strip() or "without a word").splitlines()[0]
        raise Unavailable(f"{command[0]} failed: {said}") from None
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{command[0]}: {error}") from None
    return done.stdout
