"""Episodes on a Ray cluster of two nodes, one of which is taken away in mid-sweep."""

import os
import signal
import sys
import threading
import time

import pytest

from faulty import FOLDER
from toy_task import save_policy, toy_task
from vla_pruner.cli import main
from vla_pruner.episodes.condition import Condition
from vla_pruner.reports.identical import parting
from vla_pruner.runs.execute import run_cells
from vla_pruner.runs.job import Job
from vla_pruner.runs.matrix import Cell
from vla_pruner.runs.runner import EpisodeRunner
from vla_pruner.runs.store import Store

pytest.importorskip("ray", reason="Ray is not installed: pip install 'vla-pruner[ray]'")
import ray
from ray.cluster_utils import Cluster

import vla_pruner.runs.ray as module
from vla_pruner.runs.ray import RayActors, _Dispatch

NONE, HALF = Condition(), Condition.parse("vla-pruner@0.5")
EPISODES = 8


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    monkeypatch.setenv(FOLDER, str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "object_store_memory": 80_000_000},
    )
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def resets(folder) -> list[str]:
    path = folder / "resets"
    return path.read_text().split() if path.exists() else []


def test_a_node_that_is_killed_loses_no_episode_and_doubles_none(cluster, tmp_path):
    doomed = cluster.add_node(num_cpus=1, object_store_memory=80_000_000)
    cluster.wait_for_nodes()
    policy = save_policy(tmp_path / "policy")
    removed: list[int] = []

    def remove_in_mid_sweep() -> None:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            nodes = {line.partition(":")[2] for line in resets(tmp_path)}
            if len(nodes) == 2 and len(resets(tmp_path)) >= 5:
                removed.append(len(resets(tmp_path)))
                cluster.remove_node(doomed, allow_graceful=False)
                return
            time.sleep(0.02)

    killer = threading.Thread(target=remove_in_mid_sweep)
    killer.start()
    cells = [Cell(policy, "faulty:slow", NONE, EPISODES)]
    executor = RayActors(cluster.address, workers=2, time_limit=300)
    assert run_cells(cells, tmp_path / "out", executor)
    killer.join()
    assert removed, "both nodes never worked at once"
    assert removed[0] < len(resets(tmp_path))
    with Store(tmp_path / "out") as store:
        setup = store.planned()[0].setup
        episodes = store.episodes(setup, [NONE])
    assert [episode.seed for episode in episodes] == [100 + n for n in range(EPISODES)]
    assert [episode.success for episode in episodes] == [e.seed % 3 != 0 for e in episodes]


def test_policies_apart_answer_several_simulators_and_either_may_die(
    cluster, tmp_path, monkeypatch
):
    """Two simulators ask one policy; its actor is killed in mid-episode, then a simulator."""
    cluster.add_node(num_cpus=2, object_store_memory=80_000_000)
    cluster.wait_for_nodes()
    policy = save_policy(tmp_path / "policy")
    cells = [Cell(policy, "faulty:meeting", condition, 4) for condition in (NONE, HALF)]
    dispatches, killed = [], []

    class Watched(_Dispatch):
        def __init__(self, executor):
            super().__init__(executor)
            dispatches.append(self)

    monkeypatch.setattr(module, "_Dispatch", Watched)

    def simulators() -> list[int]:
        return list(dict.fromkeys(int(line.partition(":")[2]) for line in resets(tmp_path)))

    def kill_both() -> None:
        deadline = time.monotonic() + 900
        while time.monotonic() < deadline and len(killed) < 2:
            busy = [one for each in dispatches for one in each._policies if one.busy == 2]
            if not killed and busy and len(resets(tmp_path)) >= 4:
                ray.kill(busy[0].actor)
                killed.append(len(resets(tmp_path)))
            elif killed and busy and len(resets(tmp_path)) >= killed[0] + 2:
                os.kill(simulators()[0], signal.SIGKILL)
                killed.append(len(resets(tmp_path)))
            time.sleep(0.02)

    killer = threading.Thread(target=kill_both)
    killer.start()
    executor = RayActors(cluster.address, workers=2, time_limit=900, policies=1)
    assert run_cells(cells, tmp_path / "out", executor)
    killer.join()
    assert len(killed) == 2, "both simulators never asked at once"
    policy_gone, simulator_gone = killed
    assert policy_gone < simulator_gone < len(resets(tmp_path)), "nothing was begun anew"
    with Store(tmp_path / "out") as store:
        setup = store.planned()[0].setup
        found = store.episodes(setup, [NONE, HALF])
    assert [(one.seed, one.condition) for one in found] == [
        (100 + n, condition.name) for n in range(4) for condition in (NONE, HALF)
    ]
    runner = EpisodeRunner()
    for plan, condition in zip(store_plans(tmp_path / "out"), (NONE, HALF), strict=True):
        for one in (one for one in found if one.condition == condition.name):
            assert parting(one, runner.run(Job(plan, toy_task(), one.seed))) is None


def store_plans(folder):
    with Store(folder) as store:
        return store.planned()


def test_options_of_a_cluster_need_one(tmp_path, capsys):
    words = ["eval", "--suite", "toy_task:toy_task", "--out", str(tmp_path / "out")]
    assert main([*words, "--policy-actors", "1"]) == 2
    assert "add --ray auto" in capsys.readouterr().err
    with pytest.raises(ValueError, match="policies=-1"):
        RayActors(policies=-1)


def test_no_cluster_is_an_error_that_says_what_to_do():
    with pytest.raises(RuntimeError, match="ray start --head"):
        list(RayActors("127.0.0.1:1").run([]))
