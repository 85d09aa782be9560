"""Operations that are counted: against products worked out by hand, and against the formula."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from toy_task import tiny_policy
from vla_pruner.measure.counted import count_flops
from vla_pruner.models.prune import prune


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 16, bias=False), nn.Linear(16, 8, bias=False)

    def forward(self, x):
        return self.two(self.one(x))


def test_products_and_attention_are_counted_inside_and_outside_the_decoder():
    decoder, before = Stack(), nn.Linear(8, 8, bias=False)

    @torch.no_grad()
    def call():
        x = before(torch.ones(1, 1, 5, 8))
        x = F.scaled_dot_product_attention(x, x, x)
        return decoder(x)

    flops = count_flops(call, decoder)
    assert flops.decoder == 2 * 5 * (8 * 16 + 16 * 8)
    assert flops.call == flops.decoder + 2 * 5 * 8 * 8 + 2 * 2 * 5 * 5 * 8
    assert not decoder._forward_hooks and not decoder._forward_pre_hooks


def test_scores_are_counted_and_dropped_tokens_are_not():
    policy, rng = tiny_policy(), np.random.default_rng(0)
    images = [rng.integers(0, 255, (40, 40, 3), np.uint8) for _ in range(2)]

    def call():
        return policy.predict_action(images, "pick up the cup", np.zeros(8))

    with prune(policy, "none") as session:
        full = count_flops(call, session.decoder)
    with prune(policy, "vla-pruner", keep=0.25) as session:
        session.reset()
        found = [count_flops(call, session.decoder) for _ in range(4)]
    assert [one.decoder > full.decoder for one in found] == [True, True, True, False]
    beside = {one.call - one.decoder for one in (full, *found)}
    assert len(beside) == 1 and beside.pop() > 0
    assert found[3].decoder / full.decoder == pytest.approx(0.9, abs=0.1)
