"""Our greedy search picks what the public VLA-Pruner release picked, token by token."""

from pathlib import Path

import numpy as np
import pytest
import torch

from vla_pruner.methods import Evidence, build
from vla_pruner.pruning.selection import max_min_filter

GOLDEN = np.load(Path(__file__).parent / "official.npz")


@pytest.mark.parametrize("case", range(int(GOLDEN["n_sel"])))
def test_max_min_filter_picks_what_the_release_picked(case):
    features = torch.from_numpy(GOLDEN[f"s{case}/feat"])
    expected = GOLDEN[f"s{case}/idx"].tolist()
    assert max_min_filter(features, len(expected), first="nearest").tolist() == expected


@pytest.mark.parametrize("case", range(int(GOLDEN["n_sel"])))
def test_divprune_keeps_what_that_filter_keeps_of_all_tokens(case):
    """The release's filter is DivPrune's search; here it runs through the method."""
    features, expected = torch.from_numpy(GOLDEN[f"s{case}/feat"]), GOLDEN[f"s{case}/idx"]
    evidence = Evidence(features[None], None, None, (len(features),), layer=0)
    kept = build("divprune", keep=len(expected)).select(evidence)
    assert kept[0].tolist() == sorted(expected.tolist())


def test_there_are_24_selections():
    assert int(GOLDEN["n_sel"]) == 24
