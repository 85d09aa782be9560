"""The greedy max-min search in C: compiled on first use, where this machine has a C compiler."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import tempfile
import threading
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_SOURCE = Path(__file__).with_name("max_min.c")

# -fopenmp: PyTorch brings the same OpenMP runtime, whose threads are then shared.
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fPIC", "-shared")

_POINTER, _INT, _LONG = ctypes.c_void_p, ctypes.c_int, ctypes.c_long
_ARGUMENTS: list[Any] = [*[_POINTER] * 3, *[_LONG] * 3, _INT, _LONG, _INT, _INT, *[_POINTER] * 2]

# Words of memory that a thread keeps for its next search: fetching new pages can take longer than
# the search. Enough for 4,000 candidates, 64 MiB.
_KEPT = 1 << 24


class _Unavailable(Exception):
    """Why the search cannot be compiled here."""


class _Memory(threading.local):
    """What one thread computes in."""

    words = torch.empty(0, dtype=torch.int32)

    def get(self, count: int) -> Tensor:
        if count > _KEPT:
            return torch.empty(count, dtype=torch.int32)
        if count > len(self.words):
            self.words = torch.empty(count, dtype=torch.int32)
        return self.words


_memory = _Memory()


def lengths(features: Tensor, index: Tensor) -> Tensor:
    """Length of some features `[n, d]`, fp32 `[m]`: what a cosine divides by, never zero."""
    length = torch.linalg.vector_norm(features, dim=1, dtype=torch.float32)
    return length.index_select(0, index).clamp_min_(1e-12)


def max_min_search(
    features: Tensor, index: Tensor, k: int, nearest: bool
) -> tuple[Tensor, Tensor] | None:
    """The search of `selection.max_min_filter` over some rows of a CPU tensor.

    Args:
        features: `[n, d]`, fp32 or bf16.
        index: `[m]` int64, the rows to choose from, each within 0..n-1.
        k: how many, 1 <= k <= m.
        nearest: which token starts.

    Returns:
        Positions in `index` in the order picked, `[k]` int64, which mean nothing where a length is
        not finite; and the lengths of all rows to choose from, `[m]` fp32. None where the search is
        not compiled.
    """
    library, _ = _library()
    if library is None:
        return None
    pairs = (
        features.dtype == torch.bfloat16
        and bool(library.reads_bf16())
        and features.shape[1] % 2 == features.stride(0) % 2 == 0
    )
    if not pairs:
        features = features.float()
    if features.stride(1) != 1:
        features = features.contiguous()
    index = index.contiguous()
    length = torch.empty(len(index)) if pairs else lengths(features, index)
    words = 2 if pairs else 1
    memory = _memory.get(library.memory_words(len(index)))
    picks = torch.empty(k, dtype=torch.int64)
    library.max_min_search(
        features.data_ptr(),
        index.data_ptr(),
        length.data_ptr(),
        len(index),
        features.shape[1] // words,
        features.stride(0) // words,
        pairs,
        k,
        nearest,
        torch.get_num_threads(),
        memory.data_ptr(),
        picks.data_ptr(),
    )
    return picks, length


def state() -> str:
    """Whether the search is compiled on this machine, for people."""
    return _library()[1]


@cache
def _library() -> tuple[ctypes.CDLL | None, str]:
    """The compiled search, or None, and the sentence of `state`."""
    if os.environ.get("VLA_PRUNER_COMPILE", "1") == "0":
        return None, "not compiled (VLA_PRUNER_COMPILE=0)"
    try:
        path, compiler = _compile()
        library = ctypes.CDLL(str(path))
    except (_Unavailable, OSError, RuntimeError) as error:
        return None, f"not compiled ({error})"
    library.max_min_search.argtypes, library.max_min_search.restype = _ARGUMENTS, None
    library.memory_words.argtypes, library.memory_words.restype = (_LONG,), _LONG
    return library, f"compiled by {compiler}"


def _compile() -> tuple[Path, str]:
    """Path of the shared library, built unless a run before has, and the compiler's name."""
    found = _compiler()
    # Its predefined macros tell the compiler's version and every instruction it would use.
    macros = _run([*found, *_FLAGS, "-dM", "-E", "-x", "c", os.devnull])
    version = re.search(r'^#define __VERSION__ "(.*)"', macros, re.MULTILINE)
    text = "\0".join([macros, *found, *_FLAGS, _SOURCE.read_text(encoding="utf-8")])
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vla-pruner"
    path = folder / f"max_min-{hashlib.sha256(text.encode()).hexdigest()[:16]}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            built = Path(scratch) / path.name
            _run([*found, *_FLAGS, str(_SOURCE), "-o", str(built), "-lm"])
            built.replace(path)  # In one step: another process may be doing the same.
    name = Path(found[0]).name
    return path, f"{name} {version[1]}" if version else name


def _compiler() -> list[str]:
    """The words that start the C compiler."""
    named = shlex.split(os.environ.get("CC", ""))
    found = named or [path for path in map(shutil.which, ("gcc", "cc")) if path][:1]
    if not found:
        raise _Unavailable("no C compiler; on Debian: apt-get install gcc libc6-dev")
    return found


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except subprocess.CalledProcessError as error:
        said = (error.stderr.strip() or "without a word").splitlines()[0]
        raise _Unavailable(f"{command[0]} failed: {said}") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _Unavailable(f"{command[0]}: {error}") from None
    return done.stdout
