"""The greedy max-min search in C: compiled on first use, where this machine has a C compiler."""

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
_ARGUMENTS: list[Any] = [*[_POINTER] * 3, *[_LONG] * 4, _INT, _LONG, _INT, _INT, *[_POINTER] * 2]

# Words of memory that a thread keeps for its next search: fetching new pages can take longer than
# the search. Enough for 4,000 candidates, 64 MiB.
_KEPT = 1 << 24

_LONGEST_REASON = 300


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

    Raises:
        ValueError: tensors of another shape, dtype or device, k or an index out of range.
    """
    library, _ = _library()
    if library is None:
        return None
    return _search(library, features, index, k, nearest)


def _search(
    library: ctypes.CDLL, features: Tensor, index: Tensor, k: int, nearest: bool
) -> tuple[Tensor, Tensor]:
    """`max_min_search` by a library. Errors: ValueError for what would read or write elsewhere."""
    if features.ndim != 2 or features.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(
            f"features must be fp32 or bf16 [n, d]; got {features.dtype} {tuple(features.shape)}."
        )
    if index.ndim != 1 or index.dtype != torch.int64:
        raise ValueError(f"index must be int64 [m]; got {index.dtype} {tuple(index.shape)}.")
    if features.device.type != "cpu" or index.device.type != "cpu":
        raise ValueError(
            f"the compiled search reads tensors on the CPU; got features on {features.device} and "
            f"index on {index.device}."
        )
    if not 1 <= k <= len(index):
        raise ValueError(f"`k={k}` must lie in 1..{len(index)}, the number of candidates.")
    low, high = (int(bound) for bound in index.aminmax())
    if low < 0 or high >= len(features):
        raise ValueError(f"index names {low}..{high}; there are rows 0..{len(features) - 1}.")
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
    length = torch.empty(len(index), dtype=torch.float32) if pairs else lengths(features, index)
    words = 2 if pairs else 1
    memory = _memory.get(library.memory_words(len(index)))
    picks = torch.empty(k, dtype=torch.int64)
    done = library.max_min_search(
        features.data_ptr(),
        index.data_ptr(),
        length.data_ptr(),
        len(features),
        len(index),
        features.shape[1] // words,
        features.stride(0) // words,
        pairs,
        k,
        nearest,
        max(torch.get_num_threads(), 1),
        memory.data_ptr(),
        picks.data_ptr(),
    )
    assert done, "the search in C looks at the same bounds"
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
        return _load(path), f"compiled by {compiler}"
    except Exception as error:  # Whatever goes wrong with a compiler: the plain search is as right.
        said = str(error).strip() or type(error).__name__
        return None, f"not compiled ({said.splitlines()[0][:_LONGEST_REASON]})"


def _load(path: Path) -> ctypes.CDLL:
    """A library whose search has just given the right answer."""
    library = ctypes.CDLL(str(path))
    try:
        library.max_min_search.argtypes, library.max_min_search.restype = _ARGUMENTS, _INT
        library.memory_words.argtypes, library.memory_words.restype = (_LONG,), _LONG
        library.reads_bf16.argtypes, library.reads_bf16.restype = (), _INT
    except AttributeError as error:
        raise _Unavailable(f"the compiler made a library without the search: {error}") from None
    for dtype in (torch.float32, torch.bfloat16):
        # The last row is the first one once more, the third between the other two.
        rows = torch.tensor([[3, 0, 0, 0], [0, 1, 0, 0], [1, 1, 0, 0], [3, 0, 0, 0]], dtype=dtype)
        if library.memory_words(4) < 16 or _picks(library, rows) != [1, 0, 2]:
            raise _Unavailable("the compiled search gives wrong answers")
    return library


def _picks(library: ctypes.CDLL, rows: Tensor) -> list[int]:
    """Three of these rows, the one that is farthest from its nearest first."""
    return _search(library, rows, torch.arange(len(rows)), 3, True)[0].tolist()


def _compile() -> tuple[Path, str]:
    """Path of the shared library, built unless a run before has, and the compiler's name."""
    found = _compiler()
    # Its predefined macros tell the compiler's version and every instruction it would use.
    macros = _run([*found, *_FLAGS, "-dM", "-E", "-x", "c", os.devnull])
    version = re.search(r'^#define __VERSION__ "(.*)"', macros, re.MULTILINE)
    name = Path(found[0]).name
    title = f"{name} {version[1]}" if version else name
    text = "\0".join([macros, *found, *_FLAGS, _SOURCE.read_text(encoding="utf-8")])
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    folder = _folder()
    for path in sorted(folder.glob(f"max_min-{key}-*.so")):
        if _is_as_built(path):
            return path, title
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        built = Path(scratch) / "max_min.so"
        _run([*found, *_FLAGS, str(_SOURCE), "-o", str(built), "-lm"])
        built.chmod(0o600)
        path = folder / f"max_min-{key}-{_digest(built)}.so"
        built.replace(path)  # In one step: another process may be doing the same.
    return path, title


def _folder() -> Path:
    """Where libraries are kept: a folder that nobody else can write to."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vla-pruner"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if {folder.lstat().st_uid, folder.stat().st_uid} != {os.getuid()}:
        raise _Unavailable(f"{folder} belongs to another user; set XDG_CACHE_HOME to your own")
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
        raise _Unavailable(f"CC={os.environ['CC']!r} cannot be read: {error}") from None
    found = named or [path for path in map(shutil.which, ("gcc", "cc")) if path][:1]
    if not found:
        raise _Unavailable("no C compiler; on Debian: apt-get install gcc libc6-dev")
    return found


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=60, check=True
        )
    except subprocess.CalledProcessError as error:
        said = (error.stderr.strip() or "without a word").splitlines()[0]
        raise _Unavailable(f"{command[0]} failed: {said}") from None
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise _Unavailable(f"{command[0]}: {error}") from None
    return done.stdout
