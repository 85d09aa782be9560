"""A captured step does what the eager one does: actions, kept tokens, memory, refusals."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo
from tiny_openvla import sizes
from torch import Tensor

import vla_pruner as vp
from capturing import PRUNED, act, both_ways, built, same, seen
from checks import near
from vla_pruner.models.capture import capture_policy
from vla_pruner.models.openvla import OpenVLA, OpenVLAConfig, OpenVLAOFT, OpenVLAOFTConfig


@pytest.fixture(autouse=True)
def fresh_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def oft() -> OpenVLAOFT:
    return built(OpenVLAOFT.build(OpenVLAOFTConfig(**(sizes(3) | {"chunk": 2}))))


def test_pruned_steps_equal_eager_ones_while_prompts_change(oft):
    """Two warm-up steps, then pruned ones; prompts of six lengths in two padded ones."""
    lengths = (9, 9, 9, 12, 19, 7)
    calls = [seen(oft, number, prompt) for number, prompt in enumerate(lengths)]
    eager, captured, graphs = both_ways(oft, calls, "vla-pruner", "eager", **PRUNED)
    same(eager, captured)
    assert graphs == 3, "on all tokens, and pruned in each of two padded lengths"
    assert captured[-1][1].sum() < captured[0][1].sum()


@pytest.mark.slow
@pytest.mark.parametrize("method", [None, "none", "fastv", "vla-pruner"])
def test_methods_and_a_batch_of_episodes(oft, method):
    calls = [seen(oft, number, batch=2) for number in range(4)]
    options = {"vla-pruner": PRUNED, "fastv": {"keep": 0.25, "layer": 1}}.get(method, {})
    eager, captured, graphs = both_ways(oft, calls, method, "eager", **options)
    same(eager, captured)
    assert graphs == (2 if method == "vla-pruner" else 1)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiler_changes_nothing(oft, backend):
    calls = [seen(oft, number) for number in range(5)]
    eager, captured, graphs = both_ways(oft, calls, "vla-pruner", backend, **PRUNED)
    same(eager, captured)
    assert graphs == 2


@pytest.mark.slow
def test_openvla_is_captured_token_by_token():
    policy = built(OpenVLA.build(OpenVLAConfig(**sizes(3))))
    calls = [seen(policy, number, 7 + number) for number in range(4)]
    eager, captured, graphs = both_ways(policy, calls, "vla-pruner", "eager", **PRUNED)
    same(eager, captured)
    assert graphs == 2 * policy.config.action_dim


@pytest.mark.slow
def test_a_call_that_fails_never_was(oft):
    calls = [seen(oft, number) for number in range(3)]

    def memories(fail: bool) -> list[Tensor]:
        with vp.prune(oft, "vla-pruner", **PRUNED) as session, oft.capture(backend="eager"):
            for number, given in enumerate(calls):
                if fail and number == 1:
                    with pytest.raises(ZeroDivisionError), session.step():
                        act(oft, seen(oft, 17))
                        raise ZeroDivisionError
                act(oft, given)
            return [session._passes.episodes._known[0].memory, session.last.kept_mask.float()]

    for one, other in zip(memories(False), memories(True), strict=True):
        near(one, other)


def test_what_cannot_be_captured_is_refused():
    oft = built(OpenVLAOFT.build(OpenVLAOFTConfig(**(sizes(8) | {"chunk": 2}))))
    given = seen(oft, 0)
    with vp.prune(oft, "pact"), pytest.raises(NotImplementedError, match="as it sees fit"):
        oft.capture()
    with vp.prune(oft, "vla-cache"), pytest.raises(NotImplementedError, match="on the host"):
        oft.capture()
    with pytest.raises(ValueError, match="bucket"):
        oft.capture(bucket=0)
    with pytest.raises(TypeError, match="no captured step"):
        capture_policy(torch.nn.Linear(2, 2))
    with oft.capture(backend="eager"):
        with pytest.raises(RuntimeError, match="captured already"):
            oft.capture()
        with torch.enable_grad(), pytest.raises(RuntimeError, match="no gradients"):
            oft(*given)
        with vp.prune(oft, keep=0.5), pytest.raises(RuntimeError, match="capture again"):
            act(oft, given)
    assert "forward" not in vars(oft)


def test_a_session_that_ends_takes_its_capture_along(oft):
    before = act(oft, seen(oft, 0))
    session = vp.prune(oft, "vla-pruner", **PRUNED)
    oft.capture(backend="eager")
    session.remove()
    assert "forward" not in vars(oft)
    assert torch.equal(act(oft, seen(oft, 0)), before)
    oft.capture(backend="eager").remove()
