"""Replicas in a Ray cluster of two nodes: a node that is killed costs its episodes a warm-up."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[1] / "models" / "openvla"))
from tiny_openvla import make_oft, picture

from vla_pruner.cli import main
from vla_pruner.serving.engine import Engine, Hung
from vla_pruner.serving.policy import ServedPolicy
from vla_pruner.serving.worker import OnRay


def make() -> ServedPolicy:
    oft = make_oft(num_images=2, proprio_dim=8)
    return ServedPolicy(oft, "vla-pruner", keep=0.25, unnorm_key="pick_place")


def seen(episode: int, step: int) -> dict[str, Any]:
    return {
        "images": [picture(100 * episode + step), picture(7 * step)],
        "instruction": "pick up the can",
        "proprio": np.full(8, 0.1 * episode),
    }


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "120")  # read when Ray is imported
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'vla-pruner[ray]'")
    import ray
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    notice = {
        "health_check_initial_delay_ms": 0,
        "health_check_period_ms": 1000,
        "health_check_failure_threshold": 10,
        "worker_niceness": 0,  # Ray's own is 15
    }
    memory = {"object_store_memory": 80_000_000}
    made = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "_system_config": notice, **memory}
    )
    yield made, partial(made.add_node, num_cpus=1, **memory)
    ray.shutdown()
    made.shutdown()


def near(got: np.ndarray, wanted: np.ndarray) -> bool:
    return bool(np.abs(got - wanted).max() <= 1e-5 * np.abs(wanted).max())


def direct(episode: int, steps: range) -> list[np.ndarray]:
    """The chunks of an episode, without engine and Ray."""
    served = make()
    key = served.start("")
    found = [served.act([key], [seen(episode, step)])[0] for step in steps]
    served.close()
    return found


def _gone(worker: Any) -> bool:
    import ray

    try:
        ray.get(worker._actor.__ray_ready__.remote(), timeout=5)
    except ray.exceptions.GetTimeoutError:
        return False
    except ray.exceptions.RayError:
        return True
    return False


def test_a_node_that_is_killed_costs_its_episodes_a_warm_up(cluster: Any) -> None:
    head, add = cluster
    doomed = add()
    head.wait_for_nodes()

    async def run() -> None:
        engine = Engine(
            make, replicas=2, watchdog_s=120, apart=partial(OnRay, address=head.address)
        )
        await engine.start()
        keys = [engine.open(str(number)) for number in range(4)]
        for step in range(5):
            replies = [await engine.act(key, seen(n, step)) for n, key in enumerate(keys)]
        assert [reply.warm_up for reply in replies] == [False] * 4
        for number, reply in enumerate(replies):
            assert near(reply.actions, direct(number, range(5))[-1])

        head.remove_node(doomed, allow_graceful=False)
        while not any(_gone(lane.worker) for lane in engine._lanes):  # it outlives its node a while
            await asyncio.sleep(0.2)
        told = await asyncio.gather(
            *(engine.act(key, seen(n, 5)) for n, key in enumerate(keys)), return_exceptions=True
        )
        lost = [n for n, one in enumerate(told) if isinstance(one, Hung)]
        answered = {n: one for n, one in enumerate(told) if n not in lost}
        assert lost and all(not isinstance(one, BaseException) for one in answered.values())
        # Of the dead replica's two, one may have waited behind the other: it was moved, untold.
        kept = {n: one for n, one in answered.items() if not one.warm_up}
        assert len(kept) == 2
        for number, reply in kept.items():
            assert near(reply.actions, direct(number, range(6))[-1])
        for number in lost:  # they begin anew, on the node that is left
            again = [await engine.act(keys[number], seen(number, step)) for step in range(4)]
            assert [reply.warm_up for reply in again] == [True, True, True, False]
            for reply, wanted in zip(again, direct(number, range(4)), strict=True):
                assert near(reply.actions, wanted)
        fresh = engine.open("new")
        assert (await engine.act(fresh, seen(9, 0))).warm_up
        assert "restarts_total 1" in engine.metrics.text()
        await engine.drain(10)
        assert engine.ended(120)

    asyncio.run(run())


def test_a_policy_that_cannot_be_made_says_so(cluster: Any) -> None:
    head, _ = cluster

    async def run() -> None:
        engine = Engine(_broken, apart=partial(OnRay, address=head.address))
        with pytest.raises(RuntimeError, match="cannot be served: OSError: no such weights"):
            await engine.start()

    asyncio.run(run())


def _broken() -> ServedPolicy:
    raise OSError("no such weights")


def test_no_cluster_there() -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'vla-pruner[ray]'")
    with pytest.raises(RuntimeError, match=r"no Ray cluster answers at 127\.0\.0\.1:9"):
        OnRay(make, address="127.0.0.1:9").start()


def test_without_ray_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["serve", "--protocol", "openpi:0", "--ray", "auto"]) == 1
    assert "pip install 'vla-pruner[ray]'" in capsys.readouterr().err
