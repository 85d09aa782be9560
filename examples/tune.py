"""Which budget is near enough to all tokens? python examples/tune.py [EPISODES_OF_NPZ]

What `vla-pruner tune` does, from Python: recorded observations are shown to the policy with all
tokens and under each method and budget. Without a folder of episodes (docs/tune.md) random images
stand for a recording, and the figures mean nothing.
"""

import sys
from pathlib import Path

import numpy as np

import vla_pruner as vp
from vla_pruner.runs.replay import Recorded
from vla_pruner.tuning.sources import Source, open_source
from vla_pruner.tuning.tune import conditions_of, tune

policy = vp.models.load("mini-oft")
if len(sys.argv) > 1:
    source = open_source(Path(sys.argv[1]), policy, episodes=6, calls=20, execute=2)
else:
    rng = np.random.default_rng(0)
    calls = [
        {
            "images": list(rng.integers(0, 255, (2, 160, 160, 3), dtype=np.uint8)),
            "instruction": "pick up the milk",
            "proprio": np.zeros(8),
        }
        for _ in range(6)
    ]
    source = Source("random", (Recorded(scene=0, observations=tuple(calls), motion=None),))

conditions = conditions_of(["vla-pruner", "fastv", "random"], [0.5, 0.25])
found = tune(policy, conditions, source, execute=2, tolerance=0.1, rounds=0)
for row in found.rows:
    deviation = row.deviation.mean
    print(f"{row.condition.name:18} deviates by {deviation:.3f}", "within" if row.allowed else "")
