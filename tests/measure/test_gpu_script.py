"""`make gpu` runs on the CPU with tiny models, and writes what it writes on a GPU."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from vla_pruner.measure import workloads

SCRIPT = Path(__file__).parents[2] / "scripts" / "gpu.py"


@pytest.fixture
def script() -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workloads, "PUBLISHED", dict(workloads.PUBLISHED))
        patch.setattr(workloads, "PROMPTS", dict(workloads.PROMPTS))
        yield runpy.run_path(str(SCRIPT), run_name="gpu")


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "gpu.json").read_text())


def test_a_part_writes_its_files(script, tmp_path):
    words = ["--out", str(tmp_path), "--rehearse", "--only", "oft-eager", "openvla-eager"]
    assert script["main"](words) == 0
    assert [part["failed"] for part in results(tmp_path)["parts"].values()] == [None, None]
    table = json.loads((tmp_path / "openvla-oft-7b-eager.json").read_text())
    names = [row["name"] for row in table["rows"]]
    assert "full" in names and any(name.startswith("vla-pruner") for name in names)
    assert any(name.startswith("ideal") for name in names)
    assert "| full" in (tmp_path / "openvla-7b-eager.md").read_text()


def test_a_part_that_fails_is_written_down_and_the_next_one_runs(script, tmp_path, monkeypatch):
    def broken(*_: Any) -> None:
        raise OSError("no luck")

    ran = []
    monkeypatch.setitem(script["main"].__globals__, "run_tests", broken)
    monkeypatch.setitem(
        script["main"].__globals__, "check_capture", lambda *_: ran.append("captured")
    )
    words = ["--out", str(tmp_path), "--rehearse", "--only", "tests", "captured-is-right"]
    assert script["main"](words) == 1
    assert results(tmp_path)["parts"]["tests"]["failed"] == "OSError: no luck"
    assert ran == ["captured"]


@pytest.mark.slow
def test_the_whole_rehearsal(script, tmp_path):
    assert script["main"](["--out", str(tmp_path), "--rehearse"]) == 0
    parts = results(tmp_path)["parts"]
    assert all(part["failed"] is None for part in parts.values())
    assert json.loads((tmp_path / "captured.json").read_text())["kept_alike"] is True
    assert (tmp_path / "tests.txt").exists()
    assert (tmp_path / "pi05-captured.md").exists()


def test_it_says_what_it_needs(script, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(SystemExit, match="needs an NVIDIA GPU"):
        script["main"](["--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="the parts are tests, captured-is-right"):
        script["main"](["--out", str(tmp_path), "--rehearse", "--only", "all"])
