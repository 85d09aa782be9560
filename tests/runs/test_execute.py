"""Sweeps: what a file asks for is run, once, whatever dies, hangs or is interrupted on the way."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from faulty import FOLDER
from toy_task import save_policy, toy_task
from vla_pruner.episodes.condition import Condition
from vla_pruner.runs import processes
from vla_pruner.runs.execute import run_cells
from vla_pruner.runs.matrix import Cell
from vla_pruner.runs.plan import missing_jobs, plan
from vla_pruner.runs.processes import EpisodesFailed, Processes
from vla_pruner.runs.store import Store

NONE, HALF, QUARTER = map(Condition.parse, ["none", "vla-pruner@0.5", "vla-pruner@0.25"])


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(autouse=True)
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where faulty scenes leave their marks; worker processes find the toys as this one does."""
    monkeypatch.setenv(FOLDER, str(tmp_path))


def cells(policy: str, suite: str, episodes: int, *conditions: Condition) -> list[Cell]:
    return [Cell(policy, suite, condition, episodes) for condition in conditions or (NONE,)]


def finished(out: Path) -> list[tuple[str, int]]:
    with Store(out) as store:
        setup = store.planned()[0].setup
        return sorted(store.finished(setup))


def resets(folder: Path) -> list[int]:
    lines = (folder / "resets").read_text().split()
    return [int(line.partition(":")[0]) for line in lines]


def test_each_scene_runs_under_all_its_conditions_before_the_next(policy, tmp_path):
    matrix = [*cells(policy, "toys", 4, NONE, HALF), *cells(policy, "toys", 2, QUARTER)]
    with Store(tmp_path, write=True) as store:
        jobs = missing_jobs(plan(matrix, {"toys": toy_task()}), store)
    assert [(job.seed, job.condition.name.partition("@")[2]) for job in jobs] == [
        *[(100, ""), (100, "0.5"), (100, "0.25")],
        *[(101, "0.5"), (101, "0.25"), (101, "")],
        *[(102, ""), (102, "0.5")],
        *[(103, "0.5"), (103, "")],
    ]


@pytest.mark.parametrize(
    ("suite", "episodes", "condition", "message"),
    [
        ("nowhere", 1, "none", "no suite is called 'nowhere'; there are robosuite_pickplace"),
        ("toy_task:nothing", 1, "none", "module toy_task has no 'nothing'"),
        ("toy_task:toy_task", 11, "none", "there are 10 scenes"),
        ("toy_task:toy_task", 1, "fitprune@0.5", "needs a calibration recipe"),
    ],
)
def test_what_cannot_be_run_is_refused_before_the_first_episode(
    policy, tmp_path, suite, episodes, condition, message
):
    matrix = [Cell(policy, suite, Condition.parse(condition), episodes)]
    with pytest.raises(ValueError, match=message):
        run_cells(matrix, tmp_path / "out", Processes(1))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("limits", [(0, 60.0), (1, 0.0)])
def test_an_executor_that_can_run_nothing_is_refused(limits):
    with pytest.raises(ValueError, match=r"workers=0|time_limit=0\.0"):
        Processes(*limits)


def test_a_sweep_is_continued_and_extended_and_nothing_runs_twice(policy, tmp_path):
    out, executor = tmp_path / "out", Processes(1)
    assert run_cells(cells(policy, "faulty:logging", 2, NONE, HALF), out, executor)
    first = finished(out)
    assert first == [("none", 100), ("none", 101), ("vla-pruner@0.5", 100), ("vla-pruner@0.5", 101)]
    before = len(resets(tmp_path))
    assert run_cells(cells(policy, "faulty:logging", 2, NONE, HALF), out, executor)
    assert len(resets(tmp_path)) == before
    assert run_cells(cells(policy, "faulty:logging", 4, NONE), out, Processes(2))
    assert finished(out) == sorted([*first, ("none", 102), ("none", 103)])
    assert set(resets(tmp_path)[before:]) == {102, 103}


def test_an_episode_whose_process_is_killed_or_hangs_is_begun_anew(policy, tmp_path):
    out = tmp_path / "out"
    assert run_cells(cells(policy, "faulty:once", 4), out, Processes(1, time_limit=12))
    assert (tmp_path / "killed").exists()
    assert (tmp_path / "hung").exists()
    assert finished(out) == [("none", 100 + number) for number in range(4)]


def test_an_episode_that_kills_every_process_is_given_up_and_the_others_are_run(
    policy, tmp_path, monkeypatch
):
    monkeypatch.setattr(processes, "ATTEMPTS", 2)
    out = tmp_path / "out"
    with pytest.raises(EpisodesFailed, match=r"scene 101: its process died \(signal 9\)"):
        run_cells(cells(policy, "faulty:deadly", 3), out, Processes(1))
    assert finished(out) == [("none", 100), ("none", 102)]
    assert resets(tmp_path).count(101) == 2


def test_an_error_in_an_episode_ends_its_cell_and_the_others_go_on(policy, tmp_path):
    out = tmp_path / "out"
    matrix = [*cells(policy, "faulty:broken", 3), *cells(policy, "faulty:logging", 3, NONE, HALF)]
    with pytest.raises(EpisodesFailed, match="joint 3 is out of range") as caught:
        run_cells(matrix, out, Processes(1))
    assert "no more episodes of this cell were begun" in str(caught.value)
    assert "in faulty:broken, none, scene 101" in str(caught.value)
    assert "none, scene 101" in caught.value.__notes__[0]
    with Store(out) as store:
        done = {
            (item.setup.suite, item.condition.name): store.tally(item)[1]
            for item in store.planned()
        }
    assert done == {
        ("faulty:broken", "none"): 1,
        ("faulty:logging", "none"): 3,
        ("faulty:logging", "vla-pruner@0.5"): 3,
    }


def test_every_impossible_cell_is_named_before_the_first_episode(policy, tmp_path):
    texts = ("none", "fastv@400", "divprune@33", "vla-pruner@0.5")
    matrix = cells(policy, "toy_task:toy_task", 2, *map(Condition.parse, texts))
    with pytest.raises(ValueError, match="2 things cannot be run") as caught:
        run_cells(matrix, tmp_path / "out", Processes(1))
    message = str(caught.value)
    where = f"{policy} in toy_task:toy_task, "
    assert f"{where}fastv@400: keeping 400 tokens asks for more than the 32" in message
    assert f"{where}divprune@33: " in message
    assert "none" not in message.partition("\n")[2] and "vla-pruner@0.5" not in message
    assert not (tmp_path / "out").exists()


def test_a_missing_policy_and_an_unknown_camera_are_named_too(policy, tmp_path):
    file = Path(policy) / "config.json"
    values = json.loads(file.read_text("utf-8"))
    copy = tmp_path / "copy"
    shutil.copytree(policy, copy)
    values["control"] = {"cameras": ["roof", "hand"]}
    (copy / "config.json").write_text(json.dumps(values), "utf-8")
    nowhere = str(tmp_path / "nowhere")
    matrix = [Cell(name, "toy_task:toy_task", NONE, 1) for name in (nowhere, str(copy), policy)]
    with pytest.raises(ValueError, match="2 things cannot be run") as caught:
        run_cells(matrix, tmp_path / "out", Processes(1))
    assert f"policy {nowhere}: " in str(caught.value)
    assert f"{copy} in toy_task:toy_task: the policy asks for the cameras roof" in str(caught.value)


def test_a_policy_of_another_suite_is_refused(tmp_path):
    matrix = [Cell("mini-oft-libero", "robosuite_pickplace", NONE, 1)]
    with pytest.raises(
        ValueError, match=r"mini-oft-libero was trained for libero_spatial, .*--suite"
    ):
        run_cells(matrix, tmp_path / "out", Processes(1))
    assert not (tmp_path / "out").exists()


SCRIPT = """
import sys
sys.path[:0] = {path!r}
from pathlib import Path
from vla_pruner.cli import main
if __name__ == "__main__":
    sys.exit(main({words!r}))
"""


def start(policy: str, folder: Path) -> subprocess.Popen:
    """`vla-pruner eval` of 6 slow episodes in a process of its own."""
    words = ["eval", "--policy", policy, "--suite", "faulty:slow", "--episodes", "6"]
    script = folder / "script.py"
    script.write_text(
        SCRIPT.format(path=sys.path, words=[*words, "--workers", "1", "--out", str(folder / "out")])
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [sys.executable, str(script)], env=environment, stdout=subprocess.PIPE, text=True
    )


def wait_for_episodes(folder: Path, number: int) -> None:
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        if (folder / "resets").exists() and len(resets(folder)) > number:  # one is the warm-up
            return
        time.sleep(0.02)
    raise AssertionError("no episode was begun")


def test_after_ctrl_c_the_episode_in_progress_is_finished_and_the_rest_left(policy, tmp_path):
    process = start(policy, tmp_path)
    wait_for_episodes(tmp_path, 2)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 130
    assert "The same command continues" in output
    done = finished(tmp_path / "out")
    assert done == [("none", 100 + number) for number in range(len(done))]
    assert len(done) == len(resets(tmp_path)) - 1 < 6


def test_a_killed_sweep_is_continued_without_repeating_what_it_had_finished(policy, tmp_path):
    process = start(policy, tmp_path)
    wait_for_episodes(tmp_path, 2)
    process.kill()
    process.communicate(timeout=600)
    before = finished(tmp_path / "out")
    assert 1 <= len(before) < 6
    count = len(resets(tmp_path))
    assert run_cells(cells(policy, "faulty:slow", 6), tmp_path / "out", Processes(1))
    assert finished(tmp_path / "out") == [("none", 100 + number) for number in range(6)]
    again = resets(tmp_path)[count:]
    assert not {seed for _, seed in before} & set(again)
