"""Sweeps: what a file asks for is run, once, whatever dies, hangs or is interrupted on the way."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from faulty import FOLDER
from toy_task import save_policy, toy_task
from vla_pruner.commands import eval as eval_command
from vla_pruner.episodes.condition import Condition
from vla_pruner.runs import processes
from vla_pruner.runs.execute import run_cells
from vla_pruner.runs.matrix import Cell, read_config, read_matrix
from vla_pruner.runs.plan import missing_jobs, plan
from vla_pruner.runs.processes import EpisodesFailed, Processes
from vla_pruner.runs.store import Store

EXPERIMENTS = sorted((Path(__file__).parents[2] / "experiments").glob("*.yaml"))
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


# -- the matrix ----------------------------------------------------------------------------------


def test_a_file_describes_a_matrix(tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text(
        """
policies: [a, b]
suites: toys
episodes: 40
seed: 3
keep: [0.5, 64]
methods:
  none: {episodes: 100}
  vla-pruner: {options: {window: 1, first: nearest}}
  fastv: {keep: 0.125, episodes: 10}
conditions:
  - random@0.5
  - divprune@0.25: 7
"""
    )
    found = read_config(path)
    wanted = [
        ("none", 100),
        ("vla-pruner@0.5:window=1:first=nearest", 40),
        ("vla-pruner@64:window=1:first=nearest", 40),
        ("fastv@0.125", 10),
        ("random@0.5", 40),
        ("divprune@0.25", 7),
    ]
    assert [(cell.condition.name, cell.episodes) for cell in found] == wanted * 2
    assert [cell.policy for cell in found] == ["a"] * 6 + ["b"] * 6
    assert {(cell.suite, cell.first) for cell in found} == {("toys", 3)}


def test_episodes_may_differ_from_suite_to_suite():
    found = read_matrix(
        {
            "policies": ["a"],
            "suites": ["short", "long"],
            "episodes": {"short": 9, "long": 3},
            "methods": {"none": {"episodes": {"long": 5, "short": 20}}},
            "conditions": ["fastv@0.5", {"random@0.5": {"short": 2, "long": 1}}, {"vtw@0.5": 4}],
        }
    )
    assert [(cell.suite, cell.condition.name, cell.episodes) for cell in found] == [
        ("short", "none", 20),
        ("short", "fastv@0.5", 9),
        ("short", "random@0.5", 2),
        ("short", "vtw@0.5", 4),
        ("long", "none", 5),
        ("long", "fastv@0.5", 3),
        ("long", "random@0.5", 1),
        ("long", "vtw@0.5", 4),
    ]


def test_the_matrix_of_the_docs_is_understood():
    page = (Path(__file__).parents[2] / "docs" / "evaluating.md").read_text("utf-8")
    found = read_matrix(yaml.safe_load(page.partition("```yaml")[2].partition("```")[0]))
    assert ("sparsevlm@0.125:count=behind", 40) in [(c.condition.name, c.episodes) for c in found]
    assert ("divprune@64", 20) in [(c.condition.name, c.episodes) for c in found]


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_the_matrices_of_the_experiments_are_understood(path):
    assert "none" in {cell.condition.name for cell in read_config(path)}


def matrix(**changes) -> dict:
    return {"policies": ["a"], "suites": ["toys"], "conditions": ["none"], **changes}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "expected the entries policies"),
        (matrix(worker=2), "unknown entry worker"),
        (matrix(policies=[]), "policies: expected a list of names"),
        (matrix(suites=["a", "a"]), "suites: a name is there twice"),
        (matrix(conditions=[]), "nothing to run"),
        (matrix(conditions=["none", "none"]), "asked for twice"),
        (matrix(conditions=[3]), "conditions: 3 must be a name"),
        (matrix(conditions=["vlapruner@0.5"]), "unknown method"),
        (matrix(conditions=[{"none": 0}]), "episodes: 0 must be a number"),
        (matrix(episodes=True), "episodes: True must be a number"),
        (matrix(episodes={"toys": 0}), "episodes: 0 must be a number"),
        (matrix(episodes={"toy": 3}), "expected a number for each of toys; got {'toy': 3}"),
        (matrix(suites=["toys", "b"], episodes={"b": 3}), "a number for each of toys, b"),
        (matrix(seed=-1), "seed: -1 must be the number"),
        (matrix(methods=["fastv"]), "fastv has no `keep`"),
        (matrix(methods={"fastv": {"ratio": 1}}), "may say keep, episodes and options"),
        (matrix(methods=3), "methods: expected names"),
    ],
)
def test_a_matrix_that_is_not_understood_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        read_matrix(values)


def test_an_error_in_a_file_names_the_file(tmp_path):
    (tmp_path / "a.yaml").write_text("policies: [")
    with pytest.raises(ValueError, match=r"a\.yaml is not YAML"):
        read_config(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text("policies: [x]")
    with pytest.raises(ValueError, match=r"a\.yaml: suites: expected a list"):
        read_config(tmp_path / "a.yaml")
    with pytest.raises(FileNotFoundError, match=r"no file .*b\.yaml"):
        read_config(tmp_path / "b.yaml")


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


# -- running it ----------------------------------------------------------------------------------


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
    assert run_cells(cells(policy, "faulty:once", 4), out, Processes(1, time_limit=30))
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


def test_an_error_in_an_episode_ends_the_sweep_and_keeps_the_rest(policy, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="joint 3 is out of range") as caught:
        run_cells(cells(policy, "faulty:broken", 3), out, Processes(1))
    assert "none, scene 101" in caught.value.__notes__[0]
    assert finished(out) == [("none", 100)]


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


def test_eval_takes_a_method_or_conditions(policy, tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(eval_command, "run_command", lambda args, cells: ran.append(cells) or 0)

    def run(*words: str) -> list[str]:
        from vla_pruner.cli import main

        assert main(["eval", "--out", str(tmp_path), *words]) == 0
        return [cell.condition.name for cell in ran[-1]]

    assert run() == ["none"]
    assert run("--method", "fastv", "--keep", "64") == ["fastv@64"]
    assert run("--conditions", "none,vla-pruner@0.25:window=1") == [
        "none",
        "vla-pruner@0.25:window=1",
    ]
