"""Episodes on a Ray cluster of two nodes, one of which is taken away in mid-sweep."""

import os
import sys
import threading
import time

import pytest
from faulty import FOLDER
from toy_task import save_policy

from vla_pruner.evaluation.episode import Condition
from vla_pruner.evaluation.store import Store
from vla_pruner.evaluation.sweep import Cell, run_cells

pytest.importorskip("ray", reason="Ray is not installed: pip install 'vla-pruner[ray]'")
import ray
from ray.cluster_utils import Cluster

from vla_pruner.evaluation.cluster import RayActors

NONE = Condition()
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
    crew = RayActors(cluster.address, workers=2, time_limit=300)
    assert run_cells(cells, tmp_path / "out", crew)
    killer.join()
    assert removed, "both nodes never worked at once"
    assert removed[0] < len(resets(tmp_path))
    with Store(tmp_path / "out") as store:
        setup = store.planned()[0].setup
        episodes = store.episodes(setup, [NONE])
    assert [episode.seed for episode in episodes] == [100 + n for n in range(EPISODES)]
    assert [episode.success for episode in episodes] == [e.seed % 3 != 0 for e in episodes]


def test_no_cluster_is_an_error_that_says_what_to_do():
    with pytest.raises(RuntimeError, match="ray start --head"):
        list(RayActors("127.0.0.1:1").run([]))
