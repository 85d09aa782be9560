"""A tiny policy behind each door, and clients of each protocol."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "models" / "openvla"))
sys.path.append(str(Path(__file__).parents[2] / "clients" / "python" / "src"))

pytest.importorskip("websockets", reason="pip install 'vla-pruner[doors]'")
pytest.importorskip("zmq", reason="pip install 'vla-pruner[doors]'")

from talking import seen
from tiny_openvla import make_oft

from vla_pruner.serving.policy import ServedPolicy


@pytest.fixture(autouse=True)
def an_empty_log() -> None:
    """What tests before this one logged does not count."""
    from vla_pruner.doors import visit

    visit._written.clear()


@pytest.fixture(scope="session")
def oft() -> Any:
    """A policy with two cameras, a state, and chunks of four actions."""
    return make_oft(num_images=2, proprio_dim=8)


@pytest.fixture
def served(oft: Any) -> Iterator[ServedPolicy]:
    """The policy with a method attached."""
    made = ServedPolicy(oft, "vla-pruner", keep=0.25, unnorm_key="pick_place")
    yield made
    made.close()


@pytest.fixture
def direct(oft: Any, served: ServedPolicy) -> Callable:
    """`direct(seeds)`: the chunks of a new episode, without engine and door."""

    def run(seeds: list[int], instruction: str = "pick up the can") -> list[Any]:
        episode = served.start("")
        rows = [{**seen(seed), "instruction": instruction} for seed in seeds]
        return [served.act([episode], [row])[0] for row in rows]

    return run
