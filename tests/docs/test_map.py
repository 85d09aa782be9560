"""A pruned step runs through no more of the package than the map says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_pruned_step_is_no_longer_than_the_map_promises() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "core_walk.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = re.search(r"(\d+) moves, (\d+) lines", done.stdout)
    text = (ROOT / "docs" / "map.md").read_text("utf-8")
    promised = re.search(
        r"at\s+most (\d+) lines of functions, docstrings included, and (\d+) moves", text
    )
    assert lines is not None and promised is not None
    assert int(lines[2]) <= int(promised[1]) and int(lines[1]) <= int(promised[2])
