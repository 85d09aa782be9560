"""Steps of a policy, eager and captured, call by call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import vla_pruner as vp
from checks import near, randomise
from vla_pruner.models.openvla import OpenVLAOFT
from vla_pruner.models.pi0 import Inputs, Pi0

PRUNED: dict[str, Any] = {"keep": 0.25, "layer": 1, "window": 2}


def built(policy: Any) -> Any:
    with torch.no_grad():
        return randomise(policy).requires_grad_(False)


def seen(policy: Any, number: int, prompt: int = 9, batch: int = 1) -> tuple[Any, ...]:
    """Tensors that a policy reads in call `number`."""
    generator = torch.Generator().manual_seed(number)
    if isinstance(policy, Pi0):
        return (
            Inputs(
                images=torch.rand(batch, 2, 3, 42, 42, generator=generator) * 2 - 1,
                image_mask=torch.ones(batch, 2, dtype=torch.bool),
                tokens=torch.randint(5, 400, (batch, 12), generator=generator),
                token_mask=(torch.arange(12) < prompt).expand(batch, -1),
                state=torch.rand(batch, 7, generator=generator),
            ),
        )
    ids = torch.randint(5, 17, (batch, prompt), generator=generator)
    ids[:, 0], ids[:, -1] = 1, 4
    cameras = len(policy.config.views)
    pixels = torch.randn(batch, 6 * cameras, 32, 32, generator=generator)
    state = torch.randn(batch, 8, generator=generator)
    return (ids, pixels, state) if isinstance(policy, OpenVLAOFT) else (ids, pixels)


@torch.no_grad()
def act(policy: Any, given: tuple[Any, ...]) -> Tensor:
    if isinstance(policy, Pi0):
        return policy.sample(*given)
    return policy(*given) if isinstance(policy, OpenVLAOFT) else policy.predict_tokens(*given)


def both_ways(
    policy: Any, calls: list[tuple[Any, ...]], method: str | None, backend: str, **options: Any
) -> tuple[list[Any], list[Any], int]:
    """Actions, kept tokens and memory of each call, eager and captured; and how many graphs."""
    found, graphs = [], 0
    for captured in (False, True):
        session = None if method is None else vp.prune(policy, method, **options)
        capture = policy.capture(backend=backend) if captured else None
        out = []
        for given in calls:
            actions = act(policy, given).clone()
            kept = memory = None
            if session is not None and session.last is not None:
                kept = session.last.kept_mask
                memory = session._passes.episodes._known[0].memory
            out.append((actions, kept, None if memory is None else memory.clone()))
        found.append(out)
        if capture is not None:
            graphs = len(capture.graphs)
            capture.remove()
        if session is not None:
            session.remove()
    return found[0], found[1], graphs


def same(eager: list[Any], captured: list[Any]) -> None:
    for (actions, kept, memory), (others, left, remembered) in zip(eager, captured, strict=True):
        near(actions, others)
        assert kept is None or torch.equal(kept, left)
        assert (memory is None) == (remembered is None)
        if memory is not None:
            near(memory, remembered)
