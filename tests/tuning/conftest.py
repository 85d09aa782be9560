"""The tiny policy, and what it saw in two episodes of the scene without a simulator."""

import pytest

from toy_task import ToyScene, tiny_policy, toy_task
from vla_pruner.runs.job import Setup
from vla_pruner.runs.replay import read_recorded, record


@pytest.fixture(scope="session")
def policy():
    return tiny_policy()


@pytest.fixture(scope="session")
def recordings(policy, tmp_path_factory):
    """Folder of two episodes, of seven and of twelve steps."""
    folder = tmp_path_factory.mktemp("recorded")
    setup = Setup.of("toy", policy, toy_task())
    for seed in (103, 102):
        record(policy, ToyScene(), seed, seed % 2, setup, folder / f"scene_{seed:07d}.npz")
    return folder


@pytest.fixture(scope="session")
def episodes(recordings):
    return read_recorded(sorted(recordings.glob("*.npz")), 99)
