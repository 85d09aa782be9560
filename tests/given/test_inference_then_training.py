"""A session that has acted under `torch.inference_mode()` takes part in training afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_openvla import make_oft, make_openvla
from tiny_openvla import observation as openvla_observation
from tiny_pi0 import make as make_pi0
from tiny_pi0 import observation as pi0_observation

import vla_pruner as vp

OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "fastv": {"tokens": 8, "layer": 2},
    "vla-pruner": {"tokens": 8, "layer": 2, "window": 1},
    "efficientvla": {"tokens": 8, "layer": 2, "parts": "tokens"},
    "sparsevlm": {"keep": 0.6, "count": "behind"},
    "divprune": {"tokens": 8},
    "holov": {"tokens": 8},
    "vla-cache": {"tokens": 8, "layers": (1, 2)},
}
ON_PI0 = ("none", "fastv", "vla-pruner", "efficientvla")


def openvla() -> tuple[Any, Any, Any]:
    model = make_openvla()
    inputs = model.prepare([openvla_observation(9)])
    return (
        model,
        openvla_observation,
        lambda: model.training_logits(inputs.input_ids, inputs.pixel_values),
    )


def padded() -> tuple[Any, Any, Any]:
    """Two prompts of different lengths."""
    model = make_openvla()
    rows = [openvla_observation(9), openvla_observation(8, instruction="lift the milk slowly now")]
    inputs = model.prepare(rows)
    return (
        model,
        openvla_observation,
        lambda: model.training_logits(inputs.input_ids, inputs.pixel_values, inputs.attention_mask),
    )


def oft() -> tuple[Any, Any, Any]:
    model = make_oft()
    inputs = model.prepare([openvla_observation(9, cameras=2)])
    return (
        model,
        lambda seed: openvla_observation(seed, cameras=2),
        lambda: model(inputs.input_ids, inputs.pixel_values, inputs.proprio),
    )


def flow() -> tuple[Any, Any, Any]:
    model = make_pi0()
    inputs = model.prepare([pi0_observation(9)])
    noise = torch.randn(1, 6, 8)

    def velocity() -> torch.Tensor:
        return model.velocity(model.read_prefix(inputs), inputs.state, noise, torch.ones(1))

    return model, pi0_observation, velocity


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("port", [openvla, padded, oft, flow])
def test_training_after_acting(port, name, mode):
    model, observation, loss = port()
    if port is flow and name not in ON_PI0:
        pytest.skip("not on this port")
    model.tokenizer.padding_side = "left"
    gradients = []
    for calls in (0, 4):
        with vp.prune(model, name, **OPTIONS[name]) as session, torch.enable_grad():
            with mode():
                for seed in range(calls):
                    model.predict_actions([observation(seed)])
            session.reset()
            model.zero_grad()
            loss().float().square().mean().backward()
            found = model.projector
            found = found.weight if port is flow else found.fc1.weight
            gradients.append(found.grad.clone())
    assert gradients[0].abs().max() > 0
    assert torch.equal(*gradients)
