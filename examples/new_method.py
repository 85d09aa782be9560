"""A pruning method of one's own, next to two others: python examples/new_method.py"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

import vla_pruner as vp
from vla_pruner.methods import Evidence, OneCut
from vla_pruner.pruning.selection import top_k


@dataclass(frozen=True, kw_only=True)
class Brightest(OneCut):
    """Keep the tokens with the longest features; looks at no attention at all."""

    name: ClassVar[str] = "brightest"
    summary: ClassVar[str] = "the longest features"

    def choose(self, evidence: Evidence, k: int) -> Tensor:
        """k tokens of each row [B, k] by the norm of their features [B, M, D]."""
        length = evidence.features.float().norm(dim=-1)
        if evidence.valid is not None:  # a camera is missing
            length = length.masked_fill(~evidence.valid, -1.0)
        return top_k(length, k)


policy = vp.models.load("mini-oft")
rng = np.random.default_rng(0)
images = [rng.integers(0, 255, (160, 160, 3), dtype=np.uint8) for _ in range(2)]
full = policy.predict_action(images, "pick up the milk", np.zeros(8))
for method in (Brightest(keep=0.25), "fastv@0.25", "random@0.25"):
    with vp.prune(policy, method) as session:
        pruned = policy.predict_action(images, "pick up the milk", np.zeros(8))
        print(f"{session.method.name:10} deviates by {np.abs(pruned - full).max():.3f}")
