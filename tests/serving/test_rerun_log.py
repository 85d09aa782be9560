"""The Rerun log: what is in it, images go first, and nobody ever waits for it."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from vla_pruner.cli import main
from vla_pruner.reports.rerun_log import RerunLog, Shown, maps
from vla_pruner.serving.engine import Engine
from vla_pruner.serving.policy import ServedPolicy

sys.path.append(str(Path(__file__).parents[1] / "models" / "openvla"))
from tiny_openvla import make_oft, picture


class Stream:
    """As `rerun.RecordingStream`; `gate` keeps it from writing."""

    gate = threading.Event()
    written: list[tuple[str, Any]]

    def __init__(self, *_: Any, **__: Any) -> None:
        type(self).written = []

    def save(self, path: str) -> None:
        self.path = path

    def set_time(self, *_: Any, **__: Any) -> None:
        """The time of what comes."""

    def log(self, path: str, value: Any) -> None:
        assert self.gate.wait(60)
        self.written.append((path, value))

    def flush(self) -> None:
        """All is written."""


@pytest.fixture
def rerun(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Stream]]:
    module = SimpleNamespace(
        RecordingStream=Stream,
        Image=lambda image: ("image", np.asarray(image)),
        Scalars=lambda values: ("scalars", values),
        Tensor=lambda values, dim_names: ("tensor", values),
    )
    monkeypatch.setitem(sys.modules, "rerun", module)
    Stream.gate.set()
    yield Stream
    Stream.gate.set()


def shown(step: int = 0) -> Shown:
    kept = {"kept": "1000" * 4, "grids": [4], "semantic": None, "forecast": None}
    image = np.zeros((8, 8, 3), np.uint8)
    return Shown("0 x", step, [image], kept, np.zeros((2, 7)), {"latency_ms": 3.0}, time.time())


def test_images_go_first_then_answers_and_nobody_waits(rerun: type[Stream], tmp_path: Path) -> None:
    rerun.gate.clear()  # a disk that does not answer
    log = RerunLog(tmp_path / "a.rrd", most=8)
    putting = threading.Thread(target=lambda: [log.put(shown(n)) for n in range(100)], daemon=True)
    putting.start()
    putting.join(30)
    assert not putting.is_alive()
    # One answer is being written; four wait whole, four without images, the rest is left out.
    assert log.dropped_images in (4, 5) and log.dropped in (91, 92)
    assert all(each.images is None for each in list(log._waiting)[-4:])
    rerun.gate.set()
    log.close()
    assert log.written == 100 - log.dropped
    paths = [path for path, _ in rerun.written]
    assert paths.count("0 x/camera/0") == log.written - log.dropped_images
    assert paths.count("0 x/latency_ms") == log.written
    log.put(shown())
    assert log.dropped == 101 - log.written


def test_closing_does_not_wait_for_ever(rerun: type[Stream], tmp_path: Path) -> None:
    rerun.gate.clear()
    log = RerunLog(tmp_path / "a.rrd")
    log.put(shown())
    log.close(timeout_s=0.05)
    assert log.written == 0


def test_what_cannot_be_written_is_dropped(
    rerun: type[Stream], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = RerunLog(tmp_path / "a.rrd")
    monkeypatch.setattr(Stream, "log", lambda *_: 1 / 0)
    log.put(shown())
    log.close()
    assert (log.written, log.dropped) == (0, 1)
    with pytest.raises(OSError):
        RerunLog(tmp_path / "a.rrd" / "b.rrd")


def test_maps() -> None:
    kept = {"kept": "1000" + "0230" * 4, "grids": [2, 4], "semantic": None, "forecast": None}
    found = dict(maps(kept))
    assert set(found) == {"kept_tokens/0", "kept_tokens/1"}
    assert found["kept_tokens/0"].tolist() == [[255, 0], [0, 0]]
    assert found["kept_tokens/1"].tolist() == [[0, 255, 255, 0]] * 4
    assert maps({}) == []


@pytest.fixture
def run(rerun: type[Stream], tmp_path: Path) -> Callable[[], RerunLog]:
    def made() -> RerunLog:
        oft = make_oft(num_images=2, proprio_dim=8)
        served = ServedPolicy(oft, "vla-pruner", keep=0.25, unnorm_key="pick_place", show=True)
        log = RerunLog(tmp_path / "run.rrd")

        async def ask() -> None:
            engine = Engine(served, log=log)
            await engine.start()
            episodes = [engine.open("can"), engine.open("milk")]
            for step in range(5):
                rows = [
                    {
                        "images": [picture(10 * n + step), picture(50 + step)],
                        "instruction": "pick up the can",
                        "proprio": np.zeros(8),
                    }
                    for n in range(2)
                ]
                await asyncio.gather(
                    *(engine.act(one, row) for one, row in zip(episodes, rows, strict=True))
                )
            await engine.drain(10)

        asyncio.run(ask())
        served.close()
        return log

    return made


def test_answers_of_an_engine(run: Callable[[], RerunLog], rerun: type[Stream]) -> None:
    log = run()
    assert (log.written, log.dropped, log.dropped_images) == (10, 0, 0)
    by_path: dict[str, list[Any]] = {}
    for path, (_, value) in rerun.written:
        by_path.setdefault(path, []).append(value)
    for episode in ("0 can", "1 milk"):
        assert len(by_path[f"{episode}/camera/1"]) == 5
        assert by_path[f"{episode}/warm_up"] == [1, 1, 1, 0, 0]
        kept = [(cells > 0).sum() for cells in by_path[f"{episode}/kept_tokens/0"]]
        rest = [(cells > 0).sum() for cells in by_path[f"{episode}/kept_tokens/1"]]
        both = [int(a + b) for a, b in zip(kept, rest, strict=True)]
        tokens = by_path[f"{episode}/tokens"]
        assert both[3:] == tokens[3:] and both[3] < both[0]
        assert by_path[f"{episode}/latency_ms"][0] > 0
        assert by_path[f"{episode}/semantic/0"]
        assert by_path[f"{episode}/chunk"][0].shape[1] == 7
    # Each row of a batch shows its own tokens.
    first, second = (np.array(by_path[f"{e}/semantic/0"][4]) for e in ("0 can", "1 milk"))
    assert not np.array_equal(first, second)


def test_the_file_is_read_by_rerun(tmp_path: Path) -> None:
    pytest.importorskip("rerun", reason="pip install 'vla-pruner[rerun]'")
    log = RerunLog(tmp_path / "a.rrd")
    log.put(shown())
    log.close()
    assert log.written == 1 and (tmp_path / "a.rrd").stat().st_size > 1000


def test_without_rerun_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "rerun", None)
    assert main(["serve", "--protocol", "openpi", "--rerun", str(tmp_path / "a.rrd")]) == 1
    assert "pip install 'vla-pruner[rerun]'" in capsys.readouterr().err
