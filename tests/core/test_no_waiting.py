"""A pruned step never makes the host wait for a device, and broken scores are refused all the same.

There may be no GPU here: operators are watched as they go by on the CPU, in C and by PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import vla_pruner as vp
from toy_task import tiny_policy
from vla_pruner import _flags as flags
from vla_pruner.kernels import native
from vla_pruner.measure.operators import Operators
from vla_pruner.pruning import scores, selection

METHODS = ("vla-pruner", "vla-pruner-release", "fastv", "sparsevlm", "divprune", "random")


def step(policy: Any) -> None:
    config = policy.config
    size = config.image_size
    torch.manual_seed(0)
    pixels = torch.rand(1, 6 * config.num_images, size, size)
    prompt = torch.arange(1, 7)[None]
    prompt[0, -1] = config.empty_token_id
    with torch.no_grad():
        policy(prompt, pixels, torch.zeros(1, config.proprio_dim))


@pytest.fixture(params=["in C", "by operators"])
def as_on_a_device(request: Any, monkeypatch: Any) -> Iterator[None]:
    """Nothing is looked at before it has to be, as where tensors are on a GPU."""
    monkeypatch.setattr(flags, "HOST", ())
    if request.param == "by operators":
        monkeypatch.setattr(native, "reading", lambda *tensors: None)
        monkeypatch.setattr(selection, "_search_on_cpu", _one_row)
    yield


def _one_row(features: Tensor, candidates: Tensor, k: int, nearest: bool) -> Tensor:
    return selection._search_on_device(features[None], candidates[None], k, nearest)[0]


@pytest.mark.usefixtures("as_on_a_device")
@pytest.mark.parametrize("name", METHODS)
def test_a_pruned_step_waits_for_nothing(name: str) -> None:
    policy = tiny_policy()
    with vp.prune(policy, name, keep=0.5) as session:
        for _ in range(5):  # Warm-up, and what is made once.
            step(policy)
        session.last  # noqa: B018
        with Operators() as seen:
            step(policy)
        assert dict(seen.waits) == {}
        assert seen.count > 0 and session.last.visual_kept < session.last.visual_full


def test_what_waits_is_seen() -> None:
    some = torch.rand(4)
    for wait in (
        lambda: bool(some.sum() > 1),
        lambda: some.sum().item(),
        lambda: some.tolist(),
        lambda: some.nonzero(),
        lambda: some[some > 0.5],
        lambda: torch.tensor([1, 2]),
        lambda: torch.nn.functional.one_hot(torch.arange(3), 3),
    ):
        with Operators() as seen:
            wait()
        assert sum(seen.waits.values()) > 0
    with Operators() as seen:
        some.add(1).view(2, 2).sort().indices[:, 0]
    assert not seen.waits and seen.count == 2


@pytest.mark.parametrize("asked", ["last", "the next step"])
def test_broken_scores_are_refused_when_one_may_wait(asked: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(flags, "HOST", ())
    monkeypatch.setattr(native, "reading", lambda *tensors: None)
    policy = tiny_policy()
    whole = scores._by_operators
    with vp.prune(policy, "fastv", keep=0.5) as session:
        step(policy)
        with monkeypatch.context() as patch:
            patch.setattr(scores, "_by_operators", lambda *a: whole(*a) * float("nan"))
            step(policy)
        with pytest.raises(ValueError, match="scores contain NaN"):
            _ = session.last if asked == "last" else step(policy)
        step(policy)  # It is said once.
        assert session.last.visual_kept < session.last.visual_full


@pytest.mark.parametrize("k", [3, 12])
def test_flags_are_read_at_once_outside_of_a_step(k: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(native, "reading", lambda *tensors: None)
    broken = torch.full((2, 12), float("nan"))
    with pytest.raises(ValueError, match="scores contain NaN"):
        selection.top_k(broken, k)
