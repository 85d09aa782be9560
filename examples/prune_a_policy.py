"""Prune a policy that ships: python examples/prune_a_policy.py [POLICY]"""

import sys

import numpy as np
import torch

import vla_pruner as vp

name = sys.argv[1] if len(sys.argv) > 1 else "mini-oft"
device = "cuda" if torch.cuda.is_available() else "cpu"
policy = vp.models.load(name, device=device)

session = vp.prune(policy, "vla-pruner", keep=0.25)
rng = np.random.default_rng(0)
state = np.zeros(8)
for episode in ("first", "second"):
    with session.episode(episode):  # each has its own history
        for step in range(5):
            images = [rng.integers(0, 255, (160, 160, 3), dtype=np.uint8) for _ in range(2)]
            actions = policy.predict_action(images, "pick up the milk", state)
            print(f"{episode} {step}: {session.last}")
print("kept at last:", session.last.kept_indices[0].tolist()[:10], "...")

session.remove()
full = policy.predict_action(images, "pick up the milk", state)
print(f"largest difference from all tokens: {np.abs(full - actions).max():.3f}")
