"""No action that is no number leaves a policy, and no input that is none enters one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny_openvla import make_oft, make_openvla
from tiny_openvla import observation as openvla_observation
from tiny_pi0 import make as make_pi0
from tiny_pi0 import observation as pi0_observation
from torch.utils._python_dispatch import TorchDispatchMode

import vla_pruner as vp
from vla_pruner.models import NonFiniteActionError

NAN, INF = float("nan"), float("inf")
KINDS = pytest.mark.parametrize("kind", ["openvla", "oft", "pi0", "pi05"])


def make(kind: str) -> Any:
    makers = {"openvla": make_openvla, "oft": make_oft}
    return makers[kind]() if kind in makers else make_pi0(kind)


def observation(policy: Any, seed: int = 0) -> dict[str, Any]:
    cameras = policy.config.num_images
    if hasattr(policy.config, "flow_steps"):
        return pi0_observation(seed, cameras)
    return openvla_observation(seed, cameras)


def breakable(policy: Any) -> list[torch.nn.Parameter]:
    """A weight of a tower, of the decoder, and one near the action."""
    names = [name for name, _ in policy.named_parameters()]
    ends = ("action_head", "action_out_proj", "lm_head", "language_model.norm", "model.norm")
    chosen = [
        next(n for n in names if n.startswith("vision")),
        next(n for n in names if "layers.1." in n and n.startswith("language_model")),
        next(n for end in ends for n in names if end in n and "expert" not in n),
    ]
    return [dict(policy.named_parameters())[name] for name in chosen]


@KINDS
@pytest.mark.parametrize("value", [NAN, INF])
def test_a_policy_that_works_out_no_numbers_gives_no_action(kind, value):
    policy = make(kind)
    seen = observation(policy)
    expected = policy.predict_actions([seen])
    for parameter in breakable(policy):
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.view(-1)[:] = value
        with pytest.raises(NonFiniteActionError, match=r"NaN or infinite \(rows \[0\]"):
            policy.predict_actions([seen])
        with pytest.raises(NonFiniteActionError):
            policy.predict_action(**{k: v for k, v in seen.items() if v is not None})
        with torch.no_grad():
            parameter.copy_(kept)
    assert (policy.predict_actions([seen]) == expected).all()


@pytest.mark.parametrize("kind", ["oft", "pi0"])
def test_the_row_is_named(kind):
    """One broken row of a batch: all are held back, and the message says which it was."""
    policy = make(kind)
    end = policy.action_head if kind == "oft" else policy.action_out_proj

    def spoil(module, args, output):
        output = output.clone()
        output[1] = NAN
        return output

    handle = end.register_forward_hook(spoil)
    with pytest.raises(NonFiniteActionError, match=r"rows \[1\]"):
        policy.predict_actions([observation(policy, seed) for seed in range(3)])
    handle.remove()


def test_a_later_token_of_openvla_is_looked_at_too():
    """NaN logits have an argmax: the action would be finite and mean nothing."""
    policy = make_openvla()
    calls = []

    def spoil(module, args, output):
        calls.append(output)
        return torch.full_like(output, NAN) if len(calls) == 5 else output

    handle = policy.language_model.lm_head.register_forward_hook(spoil)
    with pytest.raises(NonFiniteActionError, match="logits"):
        policy.predict_actions([observation(policy)])
    handle.remove()
    assert len(calls) == 7


@KINDS
@pytest.mark.parametrize("method", ["fastv", "vla-pruner", "random"])
def test_the_guard_holds_with_pruning(kind, method):
    policy = make(kind)
    weight = breakable(policy)[-1]
    with vp.prune(policy, method, keep=0.5, layer=2):
        assert np.isfinite(policy.predict_actions([observation(policy)])).all()
        with torch.no_grad():
            weight.fill_(NAN)
        with pytest.raises((NonFiniteActionError, ValueError), match="NaN"):
            policy.predict_actions([observation(policy, 1)])


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_numbers_too_large_for_what_is_sent(kind):
    policy = make(kind)
    policy.config.norm_stats["action"]["std"] = [1e29] * 5
    policy.config.norm_stats["action"]["q99"] = [9e29] * 5
    with torch.no_grad():
        policy.action_out_proj.bias.fill_(1e12)
    with pytest.raises(NonFiniteActionError, match="actions"):
        policy.predict_actions([observation(policy)])


class Reads(TorchDispatchMode):
    """Counts how often values are read from tensors."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.name() == "aten::_local_scalar_dense"
        return func(*args, **(kwargs or {}))


@KINDS
def test_the_guard_reads_nothing_that_is_not_read_anyway(kind):
    """On a GPU each read would wait for everything before it."""
    policy = make(kind)
    inputs = policy.prepare([observation(policy)])
    with Reads() as reads:
        policy.sample(inputs) if hasattr(policy, "sample") else policy.infer(inputs)
    assert reads.count == 0
    with Reads() as reads:
        bool(torch.ones(1).all())
    assert reads.count == 1, "reads are not counted"


# -- inputs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["oft", "pi0", "pi05"])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_robot_state_that_is_no_number_is_refused_before_the_step(kind, value, monkeypatch):
    policy = make(kind)
    monkeypatch.setattr(type(policy), "infer", no_step, raising=False)
    monkeypatch.setattr(type(policy), "sample", no_step, raising=False)
    seen = observation(policy)
    for state in (
        np.where(np.arange(len(seen["proprio"])) == 2, value, seen["proprio"]),
        [*seen["proprio"][:-1], value],
        torch.tensor(seen["proprio"]).bfloat16() * value,
    ):
        with pytest.raises(ValueError, match="proprio is not finite"):
            policy.predict_actions([seen | {"proprio": state}])


@pytest.mark.parametrize(
    ("state", "error", "said"),
    [
        ("here", TypeError, "proprio must be"),
        (["0.5"] * 8, TypeError, "proprio must be"),
        ([None] * 8, TypeError, "proprio must be"),
        ([True] * 8, TypeError, "proprio must be"),
        ([1j] * 8, TypeError, "proprio must be"),
        ({"x": 1}, TypeError, "proprio must be"),
        ([[0.0] * 8, [0.0]], TypeError, "proprio must be"),
        ([[0.0] * 8], ValueError, r"shape \(1, 8\)"),
        (0.5, ValueError, r"shape \(\)"),
        ([], ValueError, r"shape \(0,\)"),
        (None, ValueError, "give `proprio` with 8 numbers"),
    ],
)
def test_a_robot_state_of_another_kind_is_named(state, error, said):
    policy = make("oft")
    with pytest.raises(error, match=said):
        policy.predict_actions([observation(policy) | {"proprio": state}])


@pytest.mark.parametrize("kind", ["oft", "pi0"])
def test_a_robot_state_may_be_a_tensor_or_whole_numbers(kind):
    policy = make(kind)
    seen = observation(policy)
    ones = np.ones(len(seen["proprio"]))
    expected = policy.predict_actions([seen | {"proprio": ones}])
    for state in (torch.tensor(ones).float(), ones.astype(int).tolist(), ones.astype(np.float16)):
        assert (policy.predict_actions([seen | {"proprio": state}]) == expected).all()


def test_a_robot_state_out_of_all_proportion():
    policy = make("pi0")
    with pytest.raises(ValueError, match="proprio is too large"):
        policy.predict_actions([observation(policy) | {"proprio": [1e300] * 4}])


@pytest.mark.parametrize(
    ("noise", "error", "said"),
    [
        (torch.full((6, 8), NAN), ValueError, "noise is not finite"),
        (torch.zeros(6, 7), ValueError, r"noise has shape \(1, 6, 7\); expected \(1, 6, 8\)"),
        (torch.zeros(6, 8, dtype=torch.int64), TypeError, "floating-point"),
        (np.zeros((6, 8)), TypeError, "got ndarray"),
    ],
)
def test_noise_that_cannot_be_started_from(noise, error, said):
    policy = make("pi0")
    with pytest.raises(error, match=said):
        policy.predict_action(**observation(policy), noise=noise)


def no_step(*args, **options):
    pytest.fail("the step began")
