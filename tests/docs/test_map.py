"""The map's reading list is as long as it says, and a pruned step runs through no more lines."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
MOST_LINES, MOST_FILES = 2200, 10


def test_the_reading_list_is_as_long_as_it_says() -> None:
    text = (ROOT / "docs" / "map.md").read_text("utf-8")
    rows = re.findall(r"^\| \d+ \| `([\w./]+)` \| (\d+) \|", text, flags=re.MULTILINE)
    (total,) = re.findall(r"^\| \| sum \| (\d+) \|", text, flags=re.MULTILINE)
    lengths = {}
    for name, _ in rows:
        path = ROOT / name if name.startswith("docs/") else ROOT / "src" / "vla_pruner" / name
        lengths[name] = len(path.read_text("utf-8").splitlines())
    for name, lines in rows:
        assert abs(int(lines) - lengths[name]) <= max(5, 0.05 * lengths[name]), name
    assert int(total) == sum(int(lines) for _, lines in rows)
    assert sum(lengths.values()) <= MOST_LINES
    assert 5 <= len(rows) <= MOST_FILES


def test_a_pruned_step_is_no_longer_than_the_map_promises() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "core_walk.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = re.search(r"(\d+) moves, (\d+) lines", done.stdout)
    text = (ROOT / "docs" / "map.md").read_text("utf-8")
    promised = re.search(
        r"at most (\d+) lines of functions, docstrings included, and (\d+) moves", text
    )
    assert lines is not None and promised is not None
    assert int(lines[2]) <= int(promised[1]) and int(lines[1]) <= int(promised[2])
