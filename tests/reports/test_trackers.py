"""Reports in the real Trackio and in W&B's offline mode (`make test-trackers`); nothing is sent."""

import json
import sqlite3
from pathlib import Path

import pytest

from vla_pruner.reports.export import exporters, to_tracker

ROWS = [
    {"suite": "s", "policy": "p", "name": "none", "label": "all tokens", "success": 1.0, "ms": 3.5},
    {"suite": "s", "policy": "p", "name": "fastv@0.5:layer=2", "success": 0.5, "lost": 2},
]


def test_trackio_keeps_a_run_for_every_condition(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pytest.importorskip("trackio", reason="needs the extra trackio")
    ((tool, project),) = exporters(["trackio:mine"])
    to_tracker(tool, project, ROWS)
    with sqlite3.connect(tmp_path / "mine.db") as database:
        rows = database.execute("SELECT run_name, metrics FROM metrics").fetchall()
    found = {name: json.loads(metrics) for name, metrics in rows}
    assert found == {
        "p s none": {"success": 1.0, "ms": 3.5},
        "p s fastv@0.5:layer=2": {"success": 0.5, "lost": 2},
    }


def test_wandb_writes_a_run_for_every_condition(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb = pytest.importorskip("wandb", reason="needs the extra wandb")
    ((tool, project),) = exporters(["wandb:mine"])
    to_tracker(tool, project, ROWS)
    wandb.teardown()  # writes what is left, as the end of the process does
    runs = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"), key=lambda p: p.stat().st_mtime)
    assert len(runs) == 2
    first, second = (run.read_bytes() for run in runs)
    assert b"p s none" in first and b"success" in first
    assert b"p s fastv@0.5:layer=2" in second and b"lost" in second
