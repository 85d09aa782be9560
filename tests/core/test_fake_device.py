"""A pruned step on a device that is not there: fake tensors run through all of it.

Fake tensors have shapes and no values, so that whatever looks at a value raises an exception. What
is chosen by where tensors are is chosen as on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import vla_pruner as vp
from vla_pruner import _flags as flags
from vla_pruner.measure.operators import Operators

MOST_ADDED = 60
"""Launches that VLA-Pruner adds to a pruned step of mini-oft; eager, before any capture."""


@pytest.fixture
def fake() -> Iterator[FakeTensorMode]:
    """Everything inside is fake, and a look at values would be a wait."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flags, "HOST", ())
        patch.setattr(torch.Tensor, "is_cpu", property(lambda self: False), raising=False)
        # What was noted is read between steps, when one may wait.
        patch.setattr(flags.Flags, "raise_noted", lambda self: self.noted.clear())
        yield FakeTensorMode(allow_non_fake_inputs=True)


@pytest.fixture
def policy() -> Any:
    """mini-oft, still real: fakes cannot be read from a file."""
    return vp.models.load("mini-oft")


def faked(policy: Any) -> Any:
    """The policy with fake weights, inside of the mode."""
    for module in policy.modules():
        for name, old in list(module._parameters.items()):
            if old is not None:
                fresh = torch.empty(old.shape, dtype=old.dtype)
                module._parameters[name] = nn.Parameter(fresh, requires_grad=False)
        for name, old in list(module._buffers.items()):
            if old is not None:
                module._buffers[name] = torch.empty(old.shape, dtype=old.dtype)
    return policy


@torch.no_grad()
def step(policy: Any, prompt: int = 12) -> torch.Tensor:
    config = policy.config
    size, state = config.image_size, config.proprio_dim
    pixels = torch.empty(1, 6 * config.num_images, size, size)
    proprio = None if state is None else torch.empty(1, state)
    return policy(torch.ones(1, prompt, dtype=torch.int64), pixels, proprio)


def test_no_operator_of_a_pruned_step_depends_on_values(policy: Any, fake: FakeTensorMode) -> None:
    with fake:
        faked(policy)
        step(policy)
        with Operators() as alone:
            step(policy)
        with vp.prune(policy, "vla-pruner", keep=0.25):
            for prompt in (12, 13, 14, 12, 12):  # Warm-up, prompts of other lengths, pruned.
                assert step(policy, prompt).shape[1:] == (policy.config.chunk, 7)
            with Operators() as pruned:
                step(policy)
    assert dict(pruned.waits) == {}
    assert 0 < pruned.count - alone.count <= MOST_ADDED


@pytest.mark.parametrize("name", ["fastv", "divprune", "random", "vla-pruner-release"])
def test_nor_of_other_methods(name: str, policy: Any, fake: FakeTensorMode) -> None:
    with fake:
        faked(policy)
        with vp.prune(policy, name, keep=0.25):
            for _ in range(5):
                step(policy)


def test_a_look_at_a_value_is_seen(fake: FakeTensorMode) -> None:
    with fake, pytest.raises(DataDependentOutputException):
        bool(torch.ones(3).sum() > 2)
