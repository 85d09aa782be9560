"""All methods in one table and one picture: success, or deviation, against the time of whole calls.

    python experiments/pareto.py measure [CONDITION ...]  appends to results/methods-2026-calls.csv
    python experiments/pareto.py page                     writes the picture and the table

`measure` replays recorded episodes of training scenes (search.py's "confirm") under every condition
in turn, episode by episode, and notes the deviation of each call and the processor's time for it,
images in, actions out, one thread. Processor time, so that others on the machine do not count.
`page` joins these with the closed-loop episodes of results/mini-oft.csv and methods-2026.csv.
"""

from __future__ import annotations

import csv
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from recompute import wilson
from search import DRAWS, Recordings

import vla_pruner as vp

HERE = Path(__file__).parent
CALLS, PAGE = HERE / "results" / "methods-2026-calls.csv", HERE.parent / "docs"
EPISODES = ("mini-oft.csv", "methods-2026.csv")
COLUMNS = ("condition", "scene", "calls", "pruned", "deviation", "kept", "cpu_ms", "pruned_cpu_ms")
BLUE, ORANGE = "#0072b2", "#d55e00"
WARM = 2
"""Calls before anything is timed."""
BOTH = (
    "fastv",
    "vla-pruner",
    "vla-pruner:window=1",
    "scope",
    "safe-pruner",
    "specprune-vla",
    "hiprune:layer=3:positions=keep",
    "cdpruner:layer=3:positions=keep:weight=0.5",
    "dart:layer=3",
    "holov",
    "pact",
    "fitprune",
    "efficientvla",
    "random",
)
"""At 25 and at 12.5 %."""
QUARTER = (
    "divprune:layer=3:positions=keep",
    "sparsevlm-release",
    "vla-pruner-release",
    "vla-cache",
    "team-vla",
    "vla-iap",
    "cdpruner",
    "hiprune",
    "dart",
)
"""At 25 % alone: not among the best, or shown for what cutting before the decoder costs."""


def at(method: str, keep: str) -> str:
    """A condition."""
    name, colon, options = method.partition(":")
    return f"{name}@{keep}{colon}{options}"


ALL = ["none", *(at(one, k) for k in ("0.25", "0.125") for one in BOTH)]
ALL += [at(one, "0.25") for one in QUARTER]


def measure(conditions: list[str], limit: int = 6) -> None:
    """Append a row for each condition and episode that has none."""
    done = {(row["condition"], row["scene"]) for row in rows(CALLS)}
    recordings = Recordings("confirm", HERE.parent / "runs" / "search-observations")
    for number, scene in enumerate(recordings.scenes[:limit]):
        for condition in conditions:
            if (condition, str(scene)) in done:
                continue
            cells = replay(recordings, number, condition)
            new = not CALLS.exists()
            with CALLS.open("a", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                writer.writerows([COLUMNS] * new + [[condition, scene, *cells]])
        print(scene, flush=True)


def replay(recordings: Recordings, number: int, condition: str) -> list[str]:
    """One episode under one condition: what `COLUMNS` say behind the scene."""
    episode, full = recordings.episodes[number], recordings.full[number]
    off, kept, spent = [], [], []
    session = None if condition == "none" else vp.prune(recordings.policy, condition)
    try:
        for call in [*range(WARM), None, *range(len(episode))]:
            if call is None:
                off, kept, spent = [], [], []
                if session is not None:
                    session.reset()
                continue
            start = time.process_time()
            found = recordings.act(episode[call])
            spent.append(1000 * (time.process_time() - start))
            off.append(recordings.deviation(found, full[call]))
            share = 1.0 if session is None else float(session.last.kept_mask.float().mean())  # type: ignore[union-attr]
            kept.append(share)
    finally:
        if session is not None:
            session.remove()
    pruned = np.array(kept) < 1 if min(kept) < 1 else np.ones(len(kept), dtype=bool)
    numbers = np.mean(off), np.mean(kept), np.mean(spent), np.median(np.array(spent)[pruned])
    return [str(len(off)), str(int(pruned.sum())), *(f"{one:.4f}" for one in numbers)]


def rows(file: Path) -> list[dict[str, str]]:
    """Of a CSV file; none if there is no file."""
    if not file.exists():
        return []
    with file.open(newline="", encoding="utf-8") as opened:
        return list(csv.DictReader(opened))


# -- table and picture -----------------------------------------------------------------------------


def successes() -> dict[str, tuple[int, int]]:
    """Solved and all scenes of each condition, on the scenes that it was run on."""
    found: dict[str, dict[str, bool]] = defaultdict(dict)
    for name in EPISODES:
        for row in rows(HERE / "results" / name):
            found[row["condition"]].setdefault(row["seed"], row["success"] == "True")
    return {name: (sum(one.values()), len(one)) for name, one in found.items()}


def summary() -> list[dict[str, object]]:
    """A row for each condition that was replayed: means, and intervals over episodes."""
    by: dict[str, dict[str, dict[str, float]]] = defaultdict(dict)
    for row in rows(CALLS):
        values = {key: float(row[key]) for key in COLUMNS[2:]}
        by[row["condition"]][row["scene"]] = values
    solved, base, found = successes(), by["none"], []
    for condition, episodes in by.items():
        scenes = sorted(set(episodes) & set(base))
        drawn = np.random.default_rng(0).integers(len(scenes), size=(DRAWS, len(scenes)))
        n = np.array([episodes[s]["calls"] for s in scenes])
        own, other = (
            np.array([one[s]["cpu_ms"] * one[s]["calls"] for s in scenes])
            for one in (episodes, base)
        )
        off = np.array([episodes[s]["deviation"] * episodes[s]["calls"] for s in scenes])
        ratio = other[drawn].sum(axis=1) / own[drawn].sum(axis=1)
        means = off[drawn].sum(axis=1) / n[drawn].sum(axis=1)
        kept = np.array([episodes[s]["kept"] for s in scenes])
        pruned = np.array([episodes[s]["pruned_cpu_ms"] for s in scenes])
        full = np.array([base[s]["pruned_cpu_ms"] for s in scenes])
        found.append(
            {
                "condition": condition,
                "deviation": off.sum() / n.sum(),
                "deviation_ends": tuple(np.quantile(means, [0.025, 0.975])),
                "ms": own.sum() / n.sum(),
                "speedup": other.sum() / own.sum(),
                "speedup_ends": tuple(np.quantile(ratio, [0.025, 0.975])),
                "pruned_speedup": float(np.median(full / pruned)),
                "kept": float(np.average(kept, weights=n)),
                "solved": solved.get(condition),
                "episodes": len(scenes),
            }
        )
    return sorted(found, key=lambda row: float(row["deviation"]))  # type: ignore[arg-type]


def table(found: list[dict[str, object]]) -> str:
    """Markdown."""
    lines = [
        "| | condition | tokens | solved | deviation | all calls, ms | speed-up | pruned calls |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for number, row in enumerate(found):
        low, high = row["deviation_ends"]  # type: ignore[misc]
        slow, fast = row["speedup_ends"]  # type: ignore[misc]
        won = "not run"
        if row["solved"] is not None:
            s, n = row["solved"]  # type: ignore[misc]
            a, b = wilson(s, n)
            won = f"{s} of {n} ({100 * a:.0f}-{100 * b:.0f} %)"
        lines.append(
            f"| {number} | `{row['condition']}` | {100 * float(row['kept']):.0f} % | {won} | "  # type: ignore[arg-type]
            f"{row['deviation']:.3f} ({low:.3f}-{high:.3f}) | {row['ms']:.1f} | "
            f"{row['speedup']:.2f} ({slow:.2f}-{fast:.2f}) | {row['pruned_speedup']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def picture(found: list[dict[str, object]], file: Path) -> None:
    """Success where it was measured, and deviation for all, against the time of a call."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(14, 7.6))
    names = [f"{number}  {row['condition']}" for number, row in enumerate(found)]
    for panel, what in zip(panels, ("solved", "deviation"), strict=True):
        for number, row in enumerate(found):
            x, (slow, fast) = float(row["speedup"]), row["speedup_ends"]  # type: ignore
            if what == "solved":
                if row["solved"] is None:
                    continue
                s, n = row["solved"]  # type: ignore[misc]
                y, (low, high) = 100 * s / n, (100 * end for end in wilson(s, n))
            else:
                y, (low, high) = float(row["deviation"]), row["deviation_ends"]  # type: ignore
            name = str(row["condition"])
            colour = "black" if name == "none" else BLUE if "@0.25" in name else ORANGE
            run = row["solved"] is not None
            panel.errorbar(
                x,
                y,
                xerr=[[max(0.0, x - slow)], [max(0.0, fast - x)]],
                yerr=[[max(0.0, y - low)], [max(0.0, high - y)]],
                fmt="o" if run else "s",
                mfc=colour if run else "white",
                color=colour,
                ms=11,
                lw=0.5,
            )
            ink = "white" if run else colour
            panel.annotate(str(number), (x, y), ha="center", va="center", size=7, color=ink)
        panel.set_xlabel("time of the full model's call over this one's, dense calls included")
        panel.axvline(1, color="grey", lw=0.6)
    panels[0].set_ylabel("closed loop: scenes solved, %")
    panels[1].set_ylabel("recordings: deviation of actions (no success), spreads")
    panels[1].invert_yaxis()
    figure.suptitle(
        "mini-oft, 95 % intervals. Blue: 25 % of the visual tokens asked for, orange: 12.5 %. "
        "Hollow squares: success not measured."
    )
    half = (len(names) + 2) // 3
    for column in range(3):
        text = "\n".join(names[column * half : (column + 1) * half])
        figure.text(0.05 + 0.32 * column, 0.01, text, size=7.5, va="bottom", family="monospace")
    figure.subplots_adjust(left=0.05, right=0.99, top=0.93, bottom=0.32, wspace=0.12)
    figure.savefig(file, dpi=110)


def page() -> None:
    """Write table and picture."""
    found = summary()
    picture(found, PAGE / "pareto.png")
    text = (PAGE / "methods-compared.md").read_text("utf-8")
    head = text.partition("<!-- table -->")[0]
    (PAGE / "methods-compared.md").write_text(f"{head}<!-- table -->\n{table(found)}", "utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "page":
        page()
    else:
        with torch.inference_mode():
            measure(sys.argv[2:] or ALL)
