"""Exports: what other tools are given, and what is said where they are missing."""

import sys
import types
from pathlib import Path

import pytest

from vla_pruner.cli import explain
from vla_pruner.reports.export import PACKAGES, exporters, to_parquet, to_rerun, to_tracker

ROWS = [
    {
        "suite": "s",
        "policy": "p",
        "name": "none",
        "label": "all tokens",
        "success": 1.0,
        "lost": None,
    },
    {
        "suite": "s",
        "policy": "p",
        "name": "fastv@0.5",
        "label": "fastv, 50 %",
        "success": 0.5,
        "lost": 2,
        "difference": float("nan"),
    },
]


@pytest.mark.parametrize("tool", PACKAGES)
def test_a_tool_that_is_missing_is_named_with_its_extra(tool, monkeypatch):
    monkeypatch.setitem(sys.modules, PACKAGES[tool], None)
    with pytest.raises(ModuleNotFoundError) as error:
        exporters([tool])
    code, sentence = explain(error.value)
    assert code == 1
    assert sentence.endswith(f"pip install 'vla-pruner[{tool}]'")


@pytest.mark.parametrize(
    ("word", "message"), [("excel", "there are parquet, wandb"), ("parquet:x", "takes no project")]
)
def test_what_is_no_tool_is_refused(word, message):
    with pytest.raises(ValueError, match=message):
        exporters([word])


@pytest.mark.parametrize("tool", ["wandb", "trackio"])
def test_a_tracker_gets_a_run_for_every_condition(tool, monkeypatch):
    said: list = []
    module = types.ModuleType(tool)
    module.init = lambda **how: said.append(how)  # type: ignore[attr-defined]
    module.log = said.append  # type: ignore[attr-defined]
    module.finish = lambda: said.append("end")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, tool, module)
    assert exporters([tool, f"{tool}:mine"]) == [(tool, "vla-pruner"), (tool, "mine")]
    to_tracker(tool, "mine", ROWS)
    config = {"suite": "s", "policy": "p", "name": "fastv@0.5", "label": "fastv, 50 %"}
    assert said[3:] == [
        {"project": "mine", "name": "p s fastv@0.5", "config": config},
        {"success": 0.5, "lost": 2},
        "end",
    ]


def test_parquet_keeps_types_and_empty_cells(tmp_path: Path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra parquet")
    to_parquet(tmp_path / "report.parquet", [*ROWS, {"interval": None}, {"interval.low": 0.25}])
    found = parquet.read_table(tmp_path / "report.parquet").to_pydict()
    assert found["success"] == [1.0, 0.5, None, None]
    assert found["lost"] == [None, 2, None, None]
    assert found["interval.low"] == [None, None, None, 0.25]
    assert "interval" not in found
    assert [path.name for path in tmp_path.iterdir()] == ["report.parquet"]


def test_an_episode_becomes_a_rerun_file(tmp_path: Path):
    pytest.importorskip("rerun", reason="needs the extra rerun")
    import numpy as np
    from PIL import Image

    from vla_pruner.episodes.recording import _sheet

    frames = [Image.fromarray(np.full((16, 16, 3), 50 * n, np.uint8)) for n in range(3)]
    calls = [{"step": 0, "kept": "4040", "latency_ms": 5.0, "actions": [[0.1] * 7, [0.2] * 7]}]
    recording = {
        "cameras": ["front"],
        "grids": [2],
        "frames": 3,
        "size": 16,
        "columns": 10,
        "sheets": [_sheet(frames)],
        "calls": calls,
    }
    to_rerun(tmp_path / "a" / "1.rrd", recording, "an episode")
    assert (tmp_path / "a" / "1.rrd").read_bytes()[:4] == b"RRF2"
