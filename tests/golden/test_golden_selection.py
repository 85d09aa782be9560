"""Our greedy search picks what the public VLA-Pruner release picked, token by token."""

from pathlib import Path

import numpy as np
import pytest
import torch

from vla_pruner.pruning.selection import max_min_filter

GOLDEN = np.load(Path(__file__).parent / "official.npz")


@pytest.mark.parametrize("case", range(int(GOLDEN["n_sel"])))
def test_max_min_filter_picks_what_the_release_picked(case):
    features = torch.from_numpy(GOLDEN[f"s{case}/feat"])
    expected = GOLDEN[f"s{case}/idx"].tolist()
    assert max_min_filter(features, len(expected), first="nearest").tolist() == expected


def test_there_are_24_selections():
    assert int(GOLDEN["n_sel"]) == 24
