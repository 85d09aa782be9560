"""The store: what was written comes back, once, whatever happened in between."""

import dataclasses
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from toy_task import CAMERAS, OBJECTS, STEP_LIMIT, toy_task
from vla_pruner.episodes.condition import Condition
from vla_pruner.episodes.control import Control
from vla_pruner.episodes.episode import Episode
from vla_pruner.episodes.policy_runner import Call
from vla_pruner.runs.job import Job, Planned, Setup
from vla_pruner.runs.store import FILE, Store

NONE, HALF = map(Condition.parse, ["none", "vla-pruner@0.5:window=1"])
SETUP = Setup("toy_suite", "toy", "abc", Control(CAMERAS, 2, True), STEP_LIMIT, OBJECTS)
STAMP = {"vla-pruner": "1.2", "commit": "f00", "torch": "2"}


def planned(condition: Condition = NONE, setup: Setup = SETUP, **changes) -> Planned:
    values = {"settings": {"layer": 3}, "recipe": None, "first": 0, "episodes": 2, **changes}
    return Planned(setup, condition, **values)


def episode(condition: Condition, seed: int) -> Episode:
    calls = [Call(0, 12.5, True, 60, 32, 32, 100, 100), Call(2, 7.5, False, 60, 32, 16, 70, 100)]
    return Episode(condition.name, seed, seed % 2, "pick up the cup", True, 7, calls)


def add(store: Store, plan: Planned, seed: int) -> Episode:
    done = episode(plan.condition, seed)
    store.add(Job(plan, toy_task(), seed), done)
    return done


def test_episodes_come_back_as_they_were_in_the_order_asked_for(tmp_path):
    with Store(tmp_path, write=True) as store:
        plans = [planned(NONE), planned(HALF)]
        store.begin(plans, STAMP)
        written = [add(store, plan, seed) for seed in (101, 100) for plan in plans]
    with Store(tmp_path) as store:
        assert store.episodes(SETUP, [NONE, HALF]) == [written[i] for i in (2, 3, 0, 1)]
        assert store.episodes(SETUP, [HALF], [100]) == [written[3]]
        assert store.finished(SETUP) == {(c.name, s) for c in (NONE, HALF) for s in (100, 101)}
        assert store.environments() == [STAMP]
        found = store.planned()
    assert [(item.condition, item.setup, item.episodes) for item in found] == [
        (NONE, SETUP, 2),
        (HALF, SETUP, 2),
    ]


def test_a_row_can_be_read_without_this_package(tmp_path):
    with Store(tmp_path, write=True) as store:
        plan = planned(HALF, recipe="cafe")
        store.begin([plan], STAMP)
        add(store, plan, 103)
    base = sqlite3.connect(tmp_path / FILE)
    base.row_factory = sqlite3.Row
    (row,) = map(dict, base.execute("SELECT * FROM episodes"))
    calls = row.pop("calls")
    assert '"latency_ms":[12.5,7.5]' in calls
    assert row.pop("finished").startswith("20")
    assert (row.pop("held"), row.pop("motion")) == (None, None)
    assert row == {
        "suite": "toy_suite",
        "task": "plate",
        "initial_state": 1,
        "seed": 103,
        "policy": "toy",
        "weights": "abc",
        "condition": "vla-pruner@0.5:window=1",
        "method": "vla-pruner",
        "keep": 0.5,
        "options": '{"window": 1}',
        "recipe": "cafe",
        "target": 1,
        "instruction": "pick up the cup",
        "success": 1,
        "steps": 7,
        "policy_calls": 2,
        "warm_up_calls": 1,
        "tokens": 60,
        "visual": 32,
        "visual_kept": 16,
        "full_macs": 200,
        "prefill_macs": 170,
        "median_ms": 10.0,
        "stand_in_assets": 0,
        "version": "1.2",
        "git": "f00",
        "environment": 1,
    }


def test_a_number_of_tokens_stays_a_number_of_tokens(tmp_path):
    condition = Condition.parse("fastv@1")
    with Store(tmp_path, write=True) as store:
        store.begin([planned(condition)], STAMP)
    (keep,) = sqlite3.connect(tmp_path / FILE).execute("SELECT keep FROM plan").fetchone()
    assert type(keep) is int


def test_an_episode_is_kept_once(tmp_path):
    with Store(tmp_path, write=True) as store:
        store.begin([planned()], STAMP)
        add(store, planned(), 100)
        with pytest.raises(sqlite3.IntegrityError):
            add(store, planned(), 100)
        assert len(store.episodes(SETUP, [NONE])) == 1


@pytest.mark.parametrize(
    ("setup", "what"),
    [
        (dataclasses.replace(SETUP, weights="xyz"), "weights"),
        (dataclasses.replace(SETUP, step_limit=99), "step_limit"),
        (dataclasses.replace(SETUP, control=Control(CAMERAS, 1, True)), "control"),
        (dataclasses.replace(SETUP, stand_in_assets=True), "stand_in_assets"),
    ],
)
def test_episodes_of_another_setup_are_not_mixed(tmp_path, setup, what):
    with Store(tmp_path, write=True) as store:
        store.begin([planned()], STAMP)
        with pytest.raises(ValueError, match=f"toy in toy_suite with another {what}"):
            store.begin([planned(setup=setup)], STAMP)


def test_a_method_with_other_defaults_or_another_recipe_is_not_mixed(tmp_path):
    with Store(tmp_path, write=True) as store:
        store.begin([planned(HALF)], STAMP)
        store.begin([planned(HALF, recipe="new")], STAMP)  # no episode yet
        add(store, planned(HALF, recipe="new"), 100)
        with pytest.raises(ValueError, match="another recipe"):
            store.begin([planned(HALF, recipe="newer")], STAMP)
        with pytest.raises(ValueError, match=r"another layer \(3 instead of 5\)"):
            store.begin([planned(HALF, recipe="new", settings={"layer": 5})], STAMP)
        store.begin([planned(HALF, recipe="new", settings={"layer": 3, "later": 1})], STAMP)


def test_a_second_writer_is_refused_and_a_reader_is_not(tmp_path):
    with Store(tmp_path, write=True) as store:
        store.begin([planned()], STAMP)
        add(store, planned(), 100)
        with pytest.raises(RuntimeError, match="another process is writing"):
            Store(tmp_path, write=True)
        with Store(tmp_path) as reader:
            assert len(reader.episodes(SETUP, [NONE])) == 1
    Store(tmp_path, write=True).close()


def test_a_full_disk_is_said_and_loses_nothing(tmp_path):
    with Store(tmp_path, write=True) as store:
        store.begin([planned(episodes=500)], STAMP)
        pages = store._base.execute("PRAGMA page_count").fetchone()[0]
        store._base.execute(f"PRAGMA max_page_count = {pages + 2}")
        with pytest.raises(OSError, match=r"disk is full.*make room and run the same command"):
            for seed in range(100, 600):
                add(store, planned(), seed)
        kept = len(store.finished(SETUP))
        assert 0 < kept < 500
        store._base.execute("PRAGMA max_page_count = 10000")
        add(store, planned(), 100 + kept)
    with Store(tmp_path) as store:
        assert store.finished(SETUP) == {("none", 100 + number) for number in range(kept + 1)}


KILLED = """
import os, sys
sys.path[:0] = {path!r}
from test_store import *
with Store({folder!r}, write=True) as store:
    store.begin([planned()], STAMP)
    add(store, planned(), 100)
    store._base.execute("BEGIN IMMEDIATE")
    store._base.execute("DELETE FROM episodes")
    os.kill(os.getpid(), 9)
"""


def test_a_writer_killed_in_mid_transaction_leaves_what_was_finished(tmp_path):
    script = KILLED.format(path=sys.path, folder=str(tmp_path))
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    with Store(tmp_path, write=True) as store:
        assert store.finished(SETUP) == {("none", 100)}


def test_files_that_are_no_store_are_refused_and_left_alone(tmp_path):
    with pytest.raises(FileNotFoundError, match="vla-pruner eval"):
        Store(tmp_path)
    (tmp_path / FILE).touch()
    with pytest.raises(ValueError, match="holds no episodes yet"):
        Store(tmp_path)
    (tmp_path / FILE).unlink()
    (tmp_path / FILE).mkdir()
    for write in (False, True):
        with pytest.raises(ValueError, match="is no file; move it away"):
            Store(tmp_path, write=write)
    (tmp_path / FILE).rmdir()
    (tmp_path / FILE).write_text("hello, world. " * 100)
    with pytest.raises(ValueError, match="no SQLite file"):
        Store(tmp_path, write=True)
    assert (tmp_path / FILE).read_text().startswith("hello")
    (tmp_path / FILE).unlink()
    base = sqlite3.connect(tmp_path / FILE)
    base.execute("CREATE TABLE other (x)")
    base.close()
    with pytest.raises(ValueError, match="format 0"):
        Store(tmp_path, write=True)
    base = sqlite3.connect(tmp_path / FILE)
    base.execute("PRAGMA user_version = 99")
    base.close()
    with pytest.raises(ValueError, match="has format 99"):
        Store(tmp_path)


READ_ONLY = """
import os, shutil, sys, tempfile
sys.path[:0] = {path!r}
from vla_pruner.cli import main
if os.getuid() == 0:
    # Before root becomes nobody, who may not read this Python: all that a report loads.
    with tempfile.TemporaryDirectory() as copy:
        shutil.copytree({folder!r}, copy + "/run")
        assert main(["report", copy + "/run"]) == 0
    os.setgid(65534)
    os.setuid(65534)
try:
    open({folder!r} + "/mine", "w")
except OSError:
    sys.exit(main(["report", {folder!r}, *{words!r}]))
sys.exit("the folder can be written to")
"""


@pytest.fixture
def read_only():
    """A finished run that this user, or nobody in place of root, can read and not write to."""
    folder = Path(tempfile.mkdtemp(prefix="read-only-"))
    run = folder / "run"
    with Store(run, write=True) as store:
        plans = [planned(NONE), planned(HALF)]
        store.begin(plans, STAMP)
        for plan in plans:
            add(store, plan, 100)
    folder.chmod(0o755)
    yield run
    run.chmod(0o755)
    shutil.rmtree(folder)


def report_as_reader(run: Path, *words: str) -> subprocess.CompletedProcess[str]:
    run.chmod(0o555)
    script = READ_ONLY.format(path=[p for p in sys.path if p], folder=str(run), words=list(words))
    words_of_python = [sys.executable, "-c", script]
    return subprocess.run(words_of_python, capture_output=True, text=True, check=False, cwd="/")


def test_a_read_only_folder_is_read(read_only, tmp_path):
    out = Path(tempfile.mkdtemp(prefix="report-"))
    out.chmod(0o777)
    try:
        result = report_as_reader(read_only, "--out", str(out))
        assert result.returncode == 0, result.stderr
        assert "1 of 1" in (out / "report.md").read_text("utf-8")
    finally:
        shutil.rmtree(out)
    assert sorted(path.name for path in read_only.iterdir()) == [FILE, FILE + ".lock"]


def test_newer_episodes_in_a_read_only_folder_are_not_lost_silently(read_only, monkeypatch):
    """What SQLite has not merged yet lies in another file, which only a writer can merge."""
    (read_only / (FILE + "-wal")).write_bytes(b"newer")
    monkeypatch.setattr("vla_pruner.runs.store._read_only", lambda folder: True)
    with pytest.raises(RuntimeError, match=r"read-only, and the newest episodes are in .*-wal"):
        Store(read_only)
    (read_only / (FILE + "-wal")).write_bytes(b"")
    with Store(read_only) as store:
        assert len(store.episodes(SETUP, [NONE, HALF])) == 2


def test_the_report_of_a_read_only_folder_says_where_to_put_it(read_only):
    result = report_as_reader(read_only)
    assert result.returncode == 1
    assert "cannot write" in result.stderr and "--out" in result.stderr
