"""Timing several ways to do one thing fairly: in turn, after a warm-up, with quartiles."""

from __future__ import annotations

import ctypes
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of repeated measurements, in the unit of the samples."""

    median: float
    lower: float
    upper: float
    count: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """Summarise at least one sample."""
        if not samples:
            raise ValueError("a spread needs at least one sample")
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0], 1)
        lower, median, upper = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, lower, upper, len(samples))

    def __str__(self) -> str:
        digits = 0 if self.median >= 1000 else 1 if self.median >= 10 else 2
        return f"{self.median:.{digits}f} [{self.lower:.{digits}f}, {self.upper:.{digits}f}]"


# Parameters of glibc's mallopt, and values beyond what one call of a policy frees.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = (-1, 1 << 30), (-3, 32 << 20)


def keep_freed_memory() -> bool:
    """Let freed memory stay with this process from now on; False where the C library is not glibc.

    glibc gives freed memory back to the system or keeps it, depending on what ran before. Fetching
    it again, page by page, slows one variant and not the other by chance.
    """
    mallopt = _glibc("mallopt")
    if mallopt is None:
        return False
    return all([mallopt(*_MMAP_THRESHOLD) == 1, mallopt(*_TRIM_THRESHOLD) == 1])


def _glibc(name: str) -> Callable[..., int] | None:
    if sys.platform != "linux":
        return None
    function: Callable[..., int] | None = getattr(ctypes.CDLL(None), name, None)
    return function


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was asked to (a CPU always has)."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class PassClock:
    """Times each forward pass of some decoders, hooks of a pruning session included.

    Create it after the session is attached: its own hooks then lie outside of the session's.
    """

    def __init__(self, decoders: Sequence[nn.Module], device: torch.device) -> None:
        self._device = device
        self._started = 0.0
        self._passes_ms: list[float] = []
        self._handles = [
            handle
            for decoder in decoders
            for handle in (
                decoder.register_forward_pre_hook(self._start, prepend=True),
                decoder.register_forward_hook(self._stop),
            )
        ]

    def _start(self, *_: object) -> None:
        synchronize(self._device)
        self._started = time.perf_counter()

    def _stop(self, *_: object) -> None:
        synchronize(self._device)
        self._passes_ms.append(1e3 * (time.perf_counter() - self._started))

    def take(self) -> list[float]:
        """Durations in ms of the passes since the last call, in order."""
        taken, self._passes_ms = self._passes_ms, []
        return taken

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()


def time_ms(run: Callable[[], object], device: torch.device) -> float:
    """Duration of one call in ms."""
    synchronize(device)
    started = time.perf_counter()
    run()
    synchronize(device)
    return 1e3 * (time.perf_counter() - started)


def in_turn(names: Sequence[str], rounds: int) -> Iterator[str]:
    """a, b, c, a, b, c, ...: drift of the machine then hits all variants alike."""
    return itertools.chain.from_iterable(itertools.repeat(tuple(names), rounds))


def peak_memory_mb(run: Callable[[], object], device: torch.device) -> float | None:
    """Largest memory in MB that one call held on top of what was held before it.

    Device memory on CUDA; resident memory of the process on Linux; None where neither is known.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    trim = _glibc("malloc_trim")
    if trim is not None:
        trim(0)  # What was freed before would hide what is fetched now.
    try:
        Path("/proc/self/clear_refs").write_text("5")  # "peak so far" starts anew from here
        before_kb = _status_kb("VmRSS")
        run()
        return (_status_kb("VmHWM") - before_kb) / 2**10
    except OSError:
        run()
        return None


def _status_kb(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}")
