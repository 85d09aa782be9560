"""The stamp on every measurement: which versions, which machine, which commit, when."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import vla_pruner
from vla_pruner.kernels import native


def version_of(package: str) -> str | None:
    """Installed version of a distribution, None when it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The processor's model name and the widest instructions that torch uses on it.

    The name alone may stand for several generations ("AMD EPYC"). Where the system does not tell
    it, the architecture takes its place.
    """
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def commit() -> str | None:
    """Commit of the source tree this package runs from, with `+` if it was changed since.

    None when the package does not run from a git checkout of its own (an installed wheel).
    """
    here = Path(__file__).resolve().parents[3]
    if not (here / ".git").exists():
        return None

    def git(*words: str) -> str:
        command = ["git", "-C", str(here), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = "+" if git("status", "--porcelain") else ""
        return git("rev-parse", "--short=12", "HEAD") + changed
    except (OSError, subprocess.CalledProcessError):
        return None


def stamp(device: str | torch.device = "cpu") -> dict[str, Any]:
    """Everything needed to know what a measurement on `device` compares with."""
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "vla-pruner": vla_pruner.__version__,
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version_of("transformers"),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "search": None if on_gpu else native.state(),
        "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
        "cuda": torch.version.cuda if on_gpu else None,
    }
