"""How far pruned actions deviate from those of the full model, on recorded training scenes.

    python experiments/deviation.py mini-oft 6 OUT.csv fastv@0.25 scope@0.25 ...

(also MODULE:CLASS(OPTION=VALUE, ...) of a file beside this one, such as quick:Quick(keep=0.25))
records six episodes of the unpruned policy once (into OUT-observations), and appends a row for each
condition. Scenes are training scenes that the shipped policies did not learn from; none of those
that are kept for evaluation. Deviation is the mean over a chunk's actions and dimensions of the
absolute difference, each dimension divided by its standard deviation over all full chunks.
"""

from __future__ import annotations

import csv
import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

import vla_pruner as vp
from vla_pruner.commands.calibrate import FIRST_SEED
from vla_pruner.episodes.control import Control
from vla_pruner.episodes.observations import read_episode, record_observations
from vla_pruner.models.loading import load, locate
from vla_pruner.scenes.suites import pick_place

COLUMNS = (
    "policy episodes calls condition deviation pruned_calls of_pruned of_pruned_p90 visual_kept"
)
EVERY = 1000
"""Moments of an episode that are kept: all."""


def made(condition: str) -> Any:
    """A method by its short form, or from a class of a module."""
    module, colon, call = condition.partition(":")
    if not (colon and call.endswith(")")):
        return condition
    return eval(call, dict(vars(importlib.import_module(module))))  # of one's own command line


def main(name: str, count: int, out: Path, conditions: list[str]) -> None:
    """Record what is missing, and measure one condition after the other."""
    policy, suite = load(name).eval(), pick_place()
    control = Control.of(policy, suite.cameras, folder=Path(locate(name)))
    folder = out.with_name(f"{out.stem}-observations") / name
    seeds = range(FIRST_SEED, FIRST_SEED + count)
    record_observations(
        policy, suite.open_scene, folder, seeds, suite=suite, control=control, per_episode=EVERY
    )
    episodes = [read_episode(file)[0] for file in sorted(folder.glob("*.npz"))[:count]]

    def act(seen: dict[str, Any]) -> np.ndarray:
        given = {key: value for key, value in seen.items() if value is not None}
        return np.asarray(policy.predict_action(**given), dtype=np.float64)

    full = [[act(seen) for seen in episode] for episode in episodes]
    chunks = np.concatenate([np.reshape(a, (-1, a.shape[-1])) for one in full for a in one])
    spread = chunks.std(axis=0) + 1e-6
    calls = sum(map(len, episodes))
    for condition in conditions:
        deviation, kept = [], []
        with vp.prune(policy, made(condition)) as session:
            for episode, expected in zip(episodes, full, strict=True):
                session.reset()
                for seen, wanted in zip(episode, expected, strict=True):
                    deviation.append(float((np.abs(act(seen) - wanted) / spread).mean()))
                    kept.append(float(session.last.kept_mask.float().mean()))  # type: ignore
        found, share = np.array(deviation), np.array(kept)
        pruned = found[share < 1] if (share < 1).any() else found
        row = [found.mean(), (share < 1).sum(), pruned.mean(), np.quantile(pruned, 0.9)]
        line = [name, count, calls, condition, *row, share.mean()]
        cells = [f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in line]
        print(*cells, flush=True)
        new = not out.exists()
        with out.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerows([COLUMNS.split(), cells] if new else [cells])


if __name__ == "__main__":
    torch.set_num_threads(1)
    with torch.inference_mode():
        main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
