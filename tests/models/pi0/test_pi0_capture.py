"""A captured step of pi0 does what the eager one does."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo
from tiny_pi0 import make_config

from capturing import PRUNED, both_ways, built, same, seen
from vla_pruner.models.pi0 import Pi0


@pytest.fixture(autouse=True)
def fresh_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_pi0_is_captured_pass_by_pass(kind):
    policy = built(Pi0.build(make_config(kind)))
    calls = [seen(policy, number, 6 + number) for number in range(4)]
    eager, captured, graphs = both_ways(policy, calls, "vla-pruner", "eager", **PRUNED)
    same(eager, captured)
    assert graphs == 6, "prefix, flow steps that count and that do not; all tokens and pruned"
