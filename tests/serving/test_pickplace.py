"""vla-eval's own client evaluates a policy that ships with the package, in a real simulator."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import Any

import anyio
import numpy as np
import pytest

pytest.importorskip("vla_eval", reason="vla-eval is missing: pip install 'vla-pruner[serve]'")
if find_spec("robosuite") is None:  # Importing it here would choose how MuJoCo draws.
    pytest.skip("no simulator: pip install 'vla-pruner[sim]'", allow_module_level=True)

from vla_eval.orchestrator import Orchestrator
from wire import serving

from vla_pruner.serving.pickplace import SUITE, LiveLIBERO, PickPlaceBenchmark
from vla_pruner.serving.server import PolicyServer

PLUG_IN = "vla_pruner.serving.pickplace:PickPlaceBenchmark"


@pytest.fixture(scope="module")
def benchmark() -> Any:
    made = PickPlaceBenchmark(send_wrist_image=True, send_state=True)
    yield made
    made.cleanup()


def test_tasks_name_each_object_once(benchmark: Any) -> None:
    tasks = benchmark.get_tasks()
    assert [task["target"] for task in tasks] == [0, 1, 2, 3]
    assert tasks[0]["name"] == "pick up the milk and place it in its bin"


def test_episodes_are_the_held_out_scenes(benchmark: Any) -> None:
    from vla_pruner.scenes.pick_place import PickPlaceScene

    task = benchmark.get_tasks()[2] | {"episode_idx": 3}
    anyio.run(benchmark.start_episode, task)
    seen = anyio.run(benchmark.get_observation)
    with PickPlaceScene() as scene:
        scene.reset(1_000_014, 2)
        assert np.array_equal(seen["states"], scene.proprio())
        views = scene.observe()
    assert all(np.array_equal(seen["images"][name], views[name]) for name in views)
    assert seen["task_description"] == "pick up the cereal box and place it in its bin"


def test_there_are_no_more_episodes_than_held_out_scenes(benchmark: Any) -> None:
    with pytest.raises(ValueError, match="there are 250 held-out episodes of each object"):
        benchmark.reset(benchmark.get_tasks()[0] | {"episode_idx": 250})


def test_an_action_of_another_size_is_refused(benchmark: Any) -> None:
    with pytest.raises(ValueError, match="7 finite numbers"):
        benchmark.step({"actions": np.zeros(8)})


def test_the_harness_evaluates_a_pruned_policy(
    tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """One short episode: images reach the model, actions reach the arm, the answer is kept."""
    server = PolicyServer("mini-oft", keep=0.25, benchmark="pickplace")
    seen: list[Any] = []
    act = server.served.act
    server.served.act = lambda keys, rows: seen.extend(rows) or act(keys, rows)

    async def evaluate() -> list[dict[str, Any]]:
        async with serving(server) as url:
            config = {
                "server": {"url": url, "timeout": 300},
                "output_dir": str(tmp_path),
                "benchmarks": [
                    {"benchmark": PLUG_IN, "subname": SUITE, "max_tasks": 1, "max_steps": 9}
                ],
            }
            return await Orchestrator(config, no_save=True).run()

    with caplog.at_level(logging.INFO, logger="vla_eval"):
        (result,) = anyio.run(evaluate)
    server.served.close()
    (episode,) = result["tasks"][0]["episodes"]
    assert episode["steps"] == 9
    assert result.get("num_errors", 0) == 0
    assert "Spec validation passed" in caplog.text
    seen = [row for row in seen if any(image.any() for image in row["images"])]  # not the warm-up
    assert len(seen) == 5  # two actions of a chunk are carried out
    assert len({row["images"][0].tobytes() for row in seen}) == 5
    assert server.served.session.last.visual_kept == 50
    assert not server.engine._episodes


def test_the_robot_holds_still_in_live_mode():
    for benchmark in (PickPlaceBenchmark(), LiveLIBERO()):
        assert benchmark.get_hold_action(None) == {"actions": [0.0] * 6 + [-1.0]}
        closed = {"actions": np.array([0.3, 0, 0, 0, 0, 0.1, 1.0], dtype=np.float32)}
        assert benchmark.get_hold_action(closed) == {"actions": [0.0] * 6 + [1.0]}
    with pytest.raises(ValueError, match="drop `absolute_action`"):
        LiveLIBERO(absolute_action=True).get_hold_action(None)
