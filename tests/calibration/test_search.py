"""The searches find what their papers define."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cosine_similarity

from vla_pruner.calibration import efficientvla, fitprune, vtw
from vla_pruner.calibration.cost import one_cut_share
from vla_pruner.pruning.flops import layer_macs, pruned_prefill_flops

SIZES = {"hidden": 8, "ffn": 16}


# ---------------------------------------------------------------------- FitPrune
def slow_losses(cross, own, alpha):
    """Sample by sample, layer by layer, token by token."""
    samples, layers, size = len(cross), len(cross[0]), len(cross[0][0])
    left = [set(range(size)) for _ in range(samples)]
    result = []
    for layer in range(layers):
        lost = 0
        for sample in range(samples):
            leaving = []
            for mass in (cross[sample][layer], own[sample][layer]):
                floor = sum(mass) * (1 - alpha)
                remaining, prefix = set(left[sample]), set()
                for token in sorted(left[sample], key=lambda i: (mass[i], i)):
                    if sum(mass[i] for i in remaining - {token}) < floor:
                        break
                    remaining.discard(token)
                    prefix.add(token)
                leaving.append(prefix)
            both = leaving[0] & leaving[1]
            left[sample] -= both
            lost += len(both)
        result.append(lost // samples)
    return result


@settings(max_examples=60, deadline=None)
@given(
    samples=st.integers(1, 4),
    layers=st.integers(1, 4),
    size=st.integers(1, 10),
    alpha=st.integers(0, 16).map(lambda i: i / 16),
    seed=st.integers(0, 1000),
)
def test_losses_are_the_definition(samples, layers, size, alpha, seed):
    rng = np.random.default_rng(seed)
    # Masses are multiples of 1/64: sums are exact, so that a tie is one for both.
    cross, own = rng.integers(0, 64, (2, samples, layers, size)) / 64
    found = fitprune.losses(torch.from_numpy(cross), torch.from_numpy(own), alpha)
    assert found == slow_losses(cross.tolist(), own.tolist(), alpha)
    assert sum(found) <= size


def test_nothing_is_lost_at_0_and_everything_at_1():
    cross, own = torch.rand(2, 3, 4, 9).double()
    assert fitprune.losses(cross, own, 0.0) == [0, 0, 0, 0]
    assert fitprune.losses(cross, own, 1.0) == [9, 0, 0, 0]


def test_layers_too_early_to_cut_behind_lose_nothing():
    cross, own = torch.rand(2, 3, 4, 9).double()
    cross[:, :2] = float("nan")
    assert fitprune.losses(cross, own, 1.0) == [0, 0, 9, 0]


def cost(left):
    full = len(left) * layer_macs(left[0], **SIZES)
    return sum(layer_macs(n, **SIZES) for n in left if n) / full


@pytest.mark.parametrize("keep", [0.75, 0.5, 0.25])
def test_the_plan_is_the_smallest_loss_within_the_budget(keep):
    cross, own = torch.rand(2, 4, 7, 32).double()
    found = fitprune.plan(cross, own, keep, **SIZES, tolerance=0.01)
    assert len(found.left) == 8 and found.left[0] == 32
    assert found.share == pytest.approx(cost(found.left)) and found.share <= keep
    lost = slow_losses(cross.tolist(), own.tolist(), found.alpha)
    assert [a - b for a, b in zip(found.left, found.left[1:], strict=False)] == lost
    less = slow_losses(cross.tolist(), own.tolist(), found.alpha - 0.01)
    left = [32 - sum(less[:layer]) for layer in range(8)]
    assert cost(left) > keep


def test_a_budget_that_keeps_everything_loses_nothing():
    cross, own = torch.rand(2, 4, 7, 32).double()
    found = fitprune.plan(cross, own, 1.0, **SIZES)
    assert (found.left, found.alpha, found.share) == ((32,) * 8, 0.0, 1.0)


@pytest.mark.parametrize(
    ("keep", "message"),
    [(0.1, "0.125 is spent"), (0.0, r"in \(0, 1\]"), (1.5, r"in \(0, 1\]")],
)
def test_an_impossible_budget_is_refused(keep, message):
    cross, own = torch.rand(2, 4, 7, 32).double()
    with pytest.raises(ValueError, match=message):
        fitprune.plan(cross, own, keep, **SIZES)


# ---------------------------------------------------------------------- VTW
def test_divergence_of_logits_is_that_of_the_public_code():
    full, pruned = torch.randn(2, 5, 11)
    reference = torch.nn.KLDivLoss(reduction="batchmean")
    expected = reference(full.log_softmax(dim=-1), pruned.softmax(dim=-1))
    assert torch.allclose(vtw.kl_divergence(full, pruned).mean(), expected, atol=1e-6)
    assert vtw.kl_divergence(full, full).abs().max() < 1e-6


def test_divergence_of_actions_does_not_depend_on_units():
    rng = np.random.default_rng(0)
    full, pruned = rng.normal(size=(2, 6, 4, 3))
    units = np.array([1.0, 100.0, 0.01])
    found = vtw.action_divergence(full, pruned)
    assert found == pytest.approx(vtw.action_divergence(full * units, pruned * units))
    spread = [np.std([full[n, c, d] for n in range(6) for c in range(4)]) for d in range(3)]
    by_hand = np.mean([abs(full[..., d] - pruned[..., d]).mean() / spread[d] for d in range(3)])
    assert found == pytest.approx(by_hand)
    constant = np.ones((2, 3))
    assert vtw.action_divergence(constant, constant + 0.5) == pytest.approx(0.5)


def test_the_first_layer_within_eta_is_taken():
    divergences = {1: 0.5, 2: 0.01, 3: 0.02, 4: 0.0}
    assert vtw.first_within(divergences, 0.01) == 2
    assert vtw.first_within(divergences, 0.005) == 4
    with pytest.raises(ValueError, match=r"smallest divergence is 0\.01"):
        vtw.first_within({1: 0.5, 2: 0.01}, 0.001)


@pytest.mark.parametrize(("keep", "layer"), [(0.5, 4), (0.25, 2), (0.125, 1), (0.3, 2), (1.0, 7)])
def test_the_last_affordable_layer_is_taken(keep, layer):
    assert vtw.last_affordable(range(1, 8), 8, keep) == layer


def test_a_budget_that_no_layer_affords_is_refused():
    with pytest.raises(ValueError, match=r"before layer 2 of 8 at the earliest, 0\.250 of it"):
        vtw.last_affordable(range(2, 8), 8, 0.2)


# ---------------------------------------------------------------------- budgets
def test_a_recipe_may_cost_what_one_cut_costs():
    def pruned(tokens, kept, layer):
        return pruned_prefill_flops(tokens, tokens, kept, cut_layer=layer, layers=8, **SIZES)

    options = {"depth": 8, **SIZES}
    for keep, k in ((0.5, 50), (0.125, 12)):
        expected = pruned(100, k, 3) / pruned(100, 100, 3)
        assert one_cut_share(100, keep, layer=3, **options) == pytest.approx(expected)
    assert one_cut_share(100, 0.3, layer=0, **options) == 0.3
    assert one_cut_share(100, 1.0, layer=3, **options) == 1.0
    for keep, layer in ((0.0, 3), (1.5, 3), (True, 3), (64, 3), (0.5, 8), (0.5, -1)):
        with pytest.raises(ValueError, match=f"keep={keep}|layer={layer}"):
            one_cut_share(100, keep, layer=layer, **options)


# ---------------------------------------------------------------------- EfficientVLA
def test_importance_is_one_minus_the_mean_cosine():
    before, after = torch.randn(2, 3, 6, 8)
    expected = [
        1 - np.mean([float(cosine_similarity(b, a, dim=0)) for b, a in zip(x, y, strict=True)])
        for x, y in zip(before, after, strict=True)
    ]
    assert efficientvla.importance(before, after).tolist() == pytest.approx(expected, abs=1e-6)
    assert float(efficientvla.importance(before, 3 * before).abs().max()) < 1e-6
