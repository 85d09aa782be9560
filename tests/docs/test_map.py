"""A pruned step runs through no more of the package than the map says."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
WALK = ROOT / "scripts" / "core_walk.py"


def test_a_pruned_step_is_no_longer_than_the_map_promises() -> None:
    done = subprocess.run([sys.executable, str(WALK), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d+ moves, \d+ lines", done.stdout)
    text = (ROOT / "docs" / "map.md").read_text("utf-8")
    promised = re.search(
        r"at\s+most (\d+) lines .* and (\d+) moves .* (\d+) and (\d+) where", text, re.DOTALL
    )
    assert promised is not None
    compiled = int(promised[2]), int(promised[1])
    assert {True: compiled, False: (int(promised[4]), int(promised[3]))} == runpy.run_path(
        str(WALK)
    )["MOST"]
