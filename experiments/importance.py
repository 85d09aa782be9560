"""Which tokens matter, which score knows it, and how far rules are from the oracle.

    python experiments/importance.py measure CALLS    appends rows to results/importance.csv
    python experiments/importance.py table

On one call of each of search.py's training scenes, mini-oft, cut before layer 3. A token's
importance is how far the actions move when it alone is dropped (normalised actions, mean absolute
difference). Beside the rank correlation of each score with it stand the deviations of the k tokens
that a score, a rule or the oracle's greedy search (forward, four at a time) keeps. Scores are of
this call; "last" is the deep action attention of the call before, all tokens there. "now" is that
of this call, which no rule can know before the cut.
"""

from __future__ import annotations

import csv
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from scipy.stats import spearmanr
from search import Recordings
from torch import Tensor

import vla_pruner as vp
from vla_pruner.analysis.oracle import Bench, Oracle
from vla_pruner.baselines.correspondence import correspondence
from vla_pruner.baselines.determinant import most_determinant
from vla_pruner.methods import Evidence, HistorySpec, OneCut, ScoreSpec
from vla_pruner.models import find_adapter
from vla_pruner.pruning.coverage import shares
from vla_pruner.pruning.selection import combine_then_filter, top_k

ROWS = Path(__file__).parent / "results" / "importance.csv"
BUDGETS, LAYER = (25, 16), 3


@dataclass(frozen=True, kw_only=True)
class Peek(OneCut):
    """Keeps everything and hands over what it saw."""

    name: ClassVar[str] = "peek"
    summary: ClassVar[str] = "keeps everything"
    keep: float | int = 1.0
    seen: list[Evidence] = field(default_factory=list)

    @property
    def history(self) -> HistorySpec:
        """The action's deep attention."""
        return HistorySpec(window=1)

    def scores(self, cut: int) -> dict[str, ScoreSpec]:
        """Of the action queries, early and right before the cut, and of all rows."""
        return {
            "action": ScoreSpec(layer=cut - 1, rows="action"),
            "action, layer 0": ScoreSpec(layer=0, rows="action"),
            "action, layer 1": ScoreSpec(layer=1, rows="action"),
            "all rows": ScoreSpec(layer=cut - 1, rows="all"),
            "words": ScoreSpec(layer=cut - 1, rows="text"),
        }

    def select(self, evidence: Evidence) -> Tensor:
        """All tokens."""
        self.seen.append(evidence)
        return torch.arange(evidence.features.shape[1])[None]


def looked_at(recordings: Recordings, number: int, call: int) -> tuple[Evidence, dict[str, Tensor]]:
    """What is seen at the cut of a call, and all scores `[1, M]` as shares."""
    peek = Peek()
    with vp.prune(recordings.policy, peek) as session:
        action = []
        for seen in recordings.episodes[number][call - 1 : call + 1]:
            recordings.act(seen)
            action.append(session.last.action)  # type: ignore[union-attr]
    before, now = peek.seen[-2:]
    scores: dict[str, Tensor] = {name: shares(score, None) for name, score in now.scores.items()}
    scores["last, by place"] = shares(action[0], None)
    like = correspondence(now.features, before.features, now.views)
    scores["last, by likeness"] = shares(action[0].gather(1, like), None)
    scores["action + all + last"] = sum(  # type: ignore[assignment]
        scores[name] for name in ("action", "all rows", "last, by likeness")
    )
    scores["now"] = shares(action[1], None)
    return now, scores


def chosen(evidence: Evidence, scores: dict[str, Tensor], k: int) -> dict[str, list[int]]:
    """The k tokens of each score, and of a few rules."""
    sets = {f"top {name}": top_k(score, k) for name, score in scores.items()}
    every, hidden = scores["all rows"], evidence.hidden
    assert hidden is not None
    for name in ("last, by place", "last, by likeness", "now"):
        pool = torch.zeros_like(every, dtype=torch.bool)
        for one in (every, scores[name]):
            pool = pool.scatter(1, top_k(one, k), True)
        sets[f"Algorithm 2, {name}"] = combine_then_filter(
            evidence.features, every, scores[name], k
        )
        sets[f"Algorithm 2 with a determinant, {name}"] = most_determinant(
            evidence.features, k, valid=pool
        )
    mixed = scores["action + all + last"]
    sets["determinant, weighed"] = most_determinant(hidden, k, quality=mixed)
    return {name: one[0].tolist() for name, one in sets.items()}


def measure(calls: list[int]) -> None:
    """Append the rows of some calls of every episode."""
    recordings = Recordings("search", Path(__file__).parents[1] / "runs" / "search-observations")
    done = {(row["scene"], row["call"]) for row in rows()}
    for call in calls:
        for number, scene in enumerate(recordings.scenes):
            if call >= len(recordings.episodes[number]) or (str(scene), str(call)) in done:
                continue
            found: list[tuple[Any, ...]] = []
            evidence, scores = looked_at(recordings, number, call)
            seen = {k: v for k, v in recordings.episodes[number][call].items() if v is not None}
            adapter = find_adapter(recordings.policy)
            with Bench(recordings.policy, seen, adapter=adapter, layer=LAYER) as bench:
                everything = range(bench.size)
                alone = [[j for j in everything if j != i] for i in everything]
                importance = ask(bench, alone)
                for name, score in scores.items():
                    found.append(("rank", name, 0, spearmanr(score[0], importance).statistic))
                for k in BUDGETS:
                    sets = chosen(evidence, scores, k)
                    sets["top importance"] = np.argsort(importance)[-k:].tolist()
                    for name, off in zip(sets, ask(bench, list(sets.values())), strict=True):
                        found.append(("deviation", name, k, off))
                    best = Oracle(keep=k, layer=LAYER, stride=4).run(bench)
                    found.append(("deviation", "oracle", k, best.divergence))
                    for name, kept in sets.items():
                        shared = len({*kept} & {*best.kept}) / k
                        found.append(("shared with the oracle", name, k, shared))
            write([(scene, call, *row) for row in found])
            print(scene, call, flush=True)


def ask(bench: Bench, sets: list[list[int]]) -> list[float]:
    """Deviations of many sets of one size, some at once."""
    return [off for i in range(0, len(sets), 50) for off in bench.divergence(sets[i : i + 50])]


def write(found: list[tuple[Any, ...]]) -> None:
    """Append rows."""
    new = not ROWS.exists()
    with ROWS.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(["scene", "call", "what", "name", "k", "value"])
        for *cells, value in found:
            writer.writerow([*cells, f"{value:.5f}"])


def rows() -> list[dict[str, str]]:
    """Everything measured so far."""
    if not ROWS.exists():
        return []
    with ROWS.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def table() -> None:
    """Means over calls, with 95 % intervals over calls drawn with replacement."""
    by: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for row in rows():
        by[row["what"], row["k"], row["name"]].append(float(row["value"]))
    rng = np.random.default_rng(0)
    for (what, k, name), values in sorted(by.items(), key=lambda item: (item[0][:2], item[1])):
        drawn = rng.choice(values, size=(4000, len(values))).mean(axis=1)
        low, high = np.quantile(drawn, [0.025, 0.975])
        print(f"| {what} {k} | {name} | {np.mean(values):.3f} ({low:.3f} to {high:.3f}) |")


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "table":
        table()
    else:
        with torch.no_grad():
            measure([int(one) for one in sys.argv[2:]])
