"""Compare rules by the deviation of pruned actions: search on some recordings, confirm on others.

    python experiments/search.py search CONDITION ...    6 training scenes, to choose on
    python experiments/search.py confirm CONDITION ...   12 fresh ones, for what was chosen
    python experiments/search.py table SET BASELINE      means, paired differences, intervals

A condition is a method's short form, or MODULE:CLASS(OPTION=VALUE, ...) of a file beside this one.
Scenes are training scenes that the shipped policies did not learn from. Deviation: see
deviation.py. Each run appends one row per episode to results/search.csv.
"""

from __future__ import annotations

import csv
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deviation import made

import vla_pruner as vp
from vla_pruner.episodes.control import Control
from vla_pruner.episodes.observations import read_episode, record_observations
from vla_pruner.models.loading import load, locate
from vla_pruner.scenes.suites import pick_place

POLICY = "mini-oft"
SETS = {"search": range(900_000, 900_006), "confirm": range(910_000, 910_012)}
ROWS = Path(__file__).parent / "results" / "search.csv"
COLUMNS = [
    "set",
    "condition",
    "scene",
    "calls",
    "pruned",
    "deviation",
    "of_pruned",
    "kept",
    "computed",
]
DRAWS = 4000


class Recordings:
    """Episodes of one set, and what the full model answers to them."""

    def __init__(self, which: str, folder: Path) -> None:
        self.policy: Any = load(POLICY).eval()
        suite = pick_place()
        control = Control.of(self.policy, suite.cameras, folder=Path(locate(POLICY)))
        seeds = SETS[which]
        record_observations(
            self.policy,
            suite.open_scene,
            folder / which,
            seeds,
            suite=suite,
            control=control,
            per_episode=1000,
        )
        files = sorted((folder / which).glob("*.npz"))[: len(seeds)]
        self.episodes = [read_episode(file)[0] for file in files]
        self.scenes = list(seeds)
        kept = folder / f"{which}-full.npz"
        if not kept.exists():
            found = [np.stack([self.act(seen) for seen in one]) for one in self.episodes]
            np.savez(kept, *found)
        with np.load(kept) as held:
            self.full = [list(held[name]) for name in held.files]
        chunks = np.concatenate(
            [np.reshape(a, (-1, a.shape[-1])) for one in self.full for a in one]
        )
        self.spread = chunks.std(axis=0) + 1e-6

    def act(self, seen: dict[str, Any]) -> np.ndarray:
        """The chunk for one observation."""
        given = {key: value for key, value in seen.items() if value is not None}
        return np.asarray(self.policy.predict_action(**given), dtype=np.float64)

    def deviation(self, actions: np.ndarray, wanted: np.ndarray) -> float:
        """Mean distance of two chunks, in spreads."""
        return float((np.abs(actions - wanted) / self.spread).mean())

    def replay(self, condition: str) -> list[tuple[np.ndarray, np.ndarray, float]]:
        """Of each episode: deviation and share of tokens left by call, share of rows computed."""
        found = []
        with vp.prune(self.policy, made(condition)) as session:
            for episode, expected in zip(self.episodes, self.full, strict=True):
                session.reset()
                off, left, rows = [], [], []
                for seen, wanted in zip(episode, expected, strict=True):
                    off.append(self.deviation(self.act(seen), wanted))
                    last = session.last
                    left.append(float(last.kept_mask.float().mean()))  # type: ignore[union-attr]
                    layers = last.tokens_per_layer  # type: ignore[union-attr]
                    rows.append(sum(layers) / len(layers) / last.tokens_full)  # type: ignore[union-attr]
                found.append((np.array(off), np.array(left), float(np.mean(rows))))
        return found


def measure(which: str, conditions: list[str], folder: Path) -> None:
    """Append rows of what is not measured yet."""
    done = {(row["set"], row["condition"]) for row in rows()}
    wanted = [one for one in conditions if (which, one) not in done]
    if not wanted:
        return
    recordings = Recordings(which, folder)
    for condition in wanted:
        new = not ROWS.exists()
        with ROWS.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(COLUMNS)
            for scene, (off, left, computed) in zip(
                recordings.scenes, recordings.replay(condition), strict=True
            ):
                pruned = left < 1
                of_pruned = off[pruned].mean() if pruned.any() else float("nan")
                cells = [off.mean(), of_pruned, left.mean(), computed]
                writer.writerow(
                    [
                        which,
                        condition,
                        scene,
                        len(off),
                        pruned.sum(),
                        *(f"{cell:.5f}" for cell in cells),
                    ]
                )
        print(condition, flush=True)


def rows() -> list[dict[str, str]]:
    """Everything measured so far."""
    if not ROWS.exists():
        return []
    with ROWS.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def table(which: str, baseline: str) -> None:
    """Mean over calls, and the paired difference from a baseline; episodes are drawn anew."""
    by: dict[str, dict[int, dict[str, float]]] = defaultdict(dict)
    for row in rows():
        if row["set"] == which:
            by[row["condition"]][int(row["scene"])] = {key: float(row[key]) for key in COLUMNS[3:]}
    drawn = np.random.default_rng(0).integers(len(SETS[which]), size=(DRAWS, len(SETS[which])))
    calls = {c: np.array([one["calls"] for one in e.values()]) for c, e in by.items()}
    total = {
        c: np.array([one["deviation"] * one["calls"] for one in e.values()]) for c, e in by.items()
    }
    print(f"| {which} | deviation | pruned calls | tokens | decoder rows | minus `{baseline}` |")
    print("|---|---|---|---|---|---|")
    for condition, episodes in sorted(by.items(), key=lambda item: total[item[0]].sum()):
        n = calls[condition]
        of_pruned = sum(
            one["of_pruned"] * one["pruned"] for one in episodes.values() if one["pruned"]
        )
        pruned = of_pruned / max(1, sum(one["pruned"] for one in episodes.values()))
        kept, computed = (
            float(np.average([one[key] for one in episodes.values()], weights=n))
            for key in ("kept", "computed")
        )
        apart = "-"
        if baseline in total and condition != baseline:
            both = total[condition] - total[baseline]
            low, high = np.quantile(both[drawn].sum(axis=1) / n[drawn].sum(axis=1), [0.025, 0.975])
            apart = f"{both.sum() / n.sum():+.3f} ({low:+.3f} to {high:+.3f})"
        mean = total[condition].sum() / n.sum()
        cells = " | ".join(f"{cell:.3f}" for cell in (mean, pruned, kept, computed))
        print(f"| `{condition}` | {cells} | {apart} |")


if __name__ == "__main__":
    torch.set_num_threads(1)
    with torch.inference_mode():
        if sys.argv[1] == "table":
            table(sys.argv[2], sys.argv[3])
        else:
            measure(
                sys.argv[1],
                sys.argv[2:],
                Path(__file__).parents[1] / "runs" / "search-observations",
            )
