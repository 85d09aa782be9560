"""Real-time chunking of flow policies: weights, the pull, and what pruning must leave possible."""

import math

import numpy as np
import pytest
import torch

import vla_pruner as vp
from vla_pruner.models.pi0.chunking import Guide, decay, guided, strength


def test_weights_hold_what_is_committed_and_fall_to_the_end_of_what_is_left():
    weights = decay(left=6, delay=2, chunk=8)
    assert weights[:2].tolist() == [1, 1] and weights[6:].tolist() == [0, 0]
    c = [4 / 5, 3 / 5, 2 / 5, 1 / 5]
    expected = [x * (math.e**x - 1) / (math.e - 1) for x in c]
    assert torch.allclose(weights[2:6], torch.tensor(expected))
    assert decay(left=2, delay=5, chunk=8).tolist() == [1, 1, 0, 0, 0, 0, 0, 0]
    assert decay(left=0, delay=0, chunk=3).sum() == 0


@pytest.mark.parametrize(
    ("tau", "weight"),
    [(0.1, 9.11), (0.2, 4.25), (0.3, 2.762), (0.4, 2.167), (0.5, 2), (0.8, 4.25)],
)
def test_strength_of_the_pull(tau, weight):
    assert strength(tau, 100) == pytest.approx(weight, rel=1e-3)
    assert strength(tau, 2.1) == pytest.approx(min(2.1, weight), rel=1e-3)
    assert strength(0, 5) == strength(1, 5) == 5


def test_the_full_jacobian_is_that_of_finite_differences():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 6))

    def velocity(x):
        return net(x.flatten(1)).view_as(x)

    x, wanted, weights = torch.randn(1, 3, 2), torch.randn(3, 2), torch.rand(3, 2)
    now, guide = 0.6, Guide(np.zeros((3, 2)), 1, "full")
    with torch.no_grad():
        found = guided(velocity, x, now, wanted, weights, guide)
        plain = velocity(x)
        error = weights * (wanted - (x - now * plain))
        back = torch.zeros_like(x)
        for i in range(x.numel()):
            step = torch.zeros(x.numel())
            step[i] = 1e-3
            step = step.view_as(x)
            moved = 2 * step - now * (velocity(x + step) - velocity(x - step))
            back.view(-1)[i] = (error * moved / 2e-3).sum()
        expected = plain - strength(0.4, 5) * back
        same = guided(velocity, x, now, wanted, weights, Guide(np.zeros((3, 2)), 1))
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-3)
    assert torch.allclose(same, plain - strength(0.4, 5) * error)
    assert not torch.allclose(found, same, rtol=1e-2)


@pytest.fixture(scope="module")
def seen():
    policy = vp.models.load("mini-pi0")
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 255, (160, 160, 3), np.uint8) for _ in policy.config.cameras]
    noise = torch.randn(policy.config.chunk, policy.config.max_action_dim)

    def act(guide=None):
        return policy.predict_action(
            images, "pick up the milk", np.zeros(8), noise=noise, guide=guide
        )

    return policy, act


@pytest.mark.parametrize(("jacobian", "share"), [("identity", 0.35), ("full", 0.8)])
def test_the_new_chunk_continues_the_old_one_with_and_without_pruning(seen, jacobian, share):
    policy, act = seen
    plain = act()
    left = np.clip(plain[::-1] + 0.3, -1, 1)[:5]
    guide = Guide(left, 2, jacobian)
    full = act(guide)
    near, far = (np.abs(chunk[:2] - left[:2]).max() for chunk in (full, plain))
    assert near < share * far
    with vp.prune(policy, "vla-pruner", keep=1.0) as session:
        session.reset()
        assert np.array_equal(act(guide), full)
    with vp.prune(policy, "vla-pruner", keep=0.25) as session:
        session.reset()
        chunks = [act(guide) for _ in range(5)]
        assert session.last.visual_kept < session.last.visual_full
    assert all(np.abs(chunk[:2] - left[:2]).max() < share * far for chunk in chunks)
    assert np.array_equal(act(), plain)
    assert all(p.grad is None for p in policy.parameters())


def test_nothing_left_is_nothing_to_continue(seen):
    _, act = seen
    assert np.array_equal(act(Guide(np.zeros((0, 7)), 2)), act())
    with pytest.raises(ValueError, match="expected finite actions"):
        act(Guide(np.zeros((3, 5)), 2))
    with pytest.raises(ValueError, match="jacobian='half'"):
        Guide(np.zeros((3, 7)), 0, "half")  # type: ignore[arg-type]
