"""Does the deviation of pruned actions predict success? Replays fresh recordings, then compares.

    python experiments/tune_study.py replay mini-oft --out runs/tune-study    # one policy, minutes
    python experiments/tune_study.py report --out runs/tune-study             # csv, picture, map
    python experiments/tune_study.py rank smol-oft --out runs/tune-study      # one policy's rows

`replay` records episodes of training scenes that nothing else uses, and replays them under every
condition of experiments/results/POLICY.csv. `report` joins that with the success of those rows;
`rank` does so for one policy, and leaves the picture and the map of the package alone.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import re
from collections import defaultdict
from pathlib import Path

import matplotlib
import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import betaln
from scipy.stats import spearmanr

from vla_pruner.episodes.condition import Condition
from vla_pruner.episodes.control import said_by
from vla_pruner.models.loading import load, locate
from vla_pruner.runs.job import fingerprint
from vla_pruner.scenes.suites import open_suite
from vla_pruner.tuning.deviation import Scale
from vla_pruner.tuning.expectation import FILE
from vla_pruner.tuning.replay import answer, deviation_of
from vla_pruner.tuning.sources import record_source, suite_of

matplotlib.use("Agg")

from matplotlib import pyplot

HERE = Path(__file__).parent
FIRST = 950_000
"""First recorded scene: no policy learned from it, and no evaluation or calibration uses it."""
POLICIES = ("mini-oft", "mini-openvla", "mini-pi0", "smol-oft")
EXTRA = {"smol-oft": ("vla-pruner@0.5", "vla-pruner@0.125", "fastv@0.25", "random@0.25")}
"""Conditions that are replayed although their success was never measured."""


def measured(policy: str) -> dict[str, tuple[int, int, str]]:
    """Condition: episodes solved, episodes, weights."""
    found: dict[str, list] = defaultdict(lambda: [0, 0, ""])
    with (HERE / "results" / f"{policy}.csv").open() as file:
        for row in csv.DictReader(file):
            entry = found[row["condition"]]
            entry[0] += row["success"] == "True"
            entry[1] += 1
            entry[2] = row["weights"]
    return {name: tuple(values) for name, values in found.items()}


def replay(name: str, out: Path, episodes: int, calls: int, only: list[str]) -> None:
    """Replay every condition whose success is known; what is in `out` already is left alone."""
    torch.set_num_threads(1)
    policy = load(name)
    rows = measured(name)
    weights = next(iter(rows.values()))[2]
    if weights not in (fingerprint(policy), fingerprint(copy.deepcopy(policy).bfloat16())):
        raise SystemExit(f"{name} has other weights than those of its results ({weights})")
    suite = open_suite(suite_of(name, said_by(Path(locate(name)))))
    folder = out / name
    source = record_source(
        policy, name, suite, folder / "observations", episodes=episodes, calls=calls, first=FIRST
    )
    print(name, [len(one.observations) for one in source.episodes], flush=True)
    execute = said_by(Path(locate(name))).get("execute", 1)
    full = answer(policy, Condition(), source.episodes)
    scale = Scale.of([one.actions for one in full], execute=execute)
    skipped = []
    for text in only or [*rows, *EXTRA.get(name, ())]:
        path = folder / f"{re.sub('[^a-z0-9.=@_-]', '+', text)}.npz"
        if text == "none" or path.exists():
            continue
        try:
            found = answer(policy, Condition.parse(text), source.episodes)
        except (ValueError, NotImplementedError, FileNotFoundError) as error:
            skipped.append(f"{text}: {error}")
            continue
        deviation, each = deviation_of(source.episodes, full, found, scale)
        np.savez(
            path,
            condition=np.array(text),
            lengths=np.array([len(one.moved) for one in each]),
            warm_up=np.concatenate([one.warm_up for one in found]),
            dims=np.concatenate([one.units for one in each]) / scale.spread,
            **{
                key: np.concatenate([getattr(one, key) for one in each])
                for key in ("moved", "chunk", "worst", "flips")
            },
        )
        print(f"{text:50s} {deviation.mean:.3f} {deviation.p90:.3f}", flush=True)
    (folder / "skipped.txt").write_text("\n".join(skipped) + "\n")
    print("skipped:", *skipped, sep="\n  ")


# -- what it says ----------------------------------------------------------------------------------

STATISTICS = {
    "mean": lambda one: one["moved"].mean(),
    "p90": lambda one: np.quantile(one["moved"], 0.9),
    "worst": lambda one: one["worst"].max(),
    "mean of worst": lambda one: one["worst"].mean(),
    "whole chunk": lambda one: one["chunk"].mean(),
    "root mean square": lambda one: np.sqrt((one["moved"] ** 2).mean()),
    "pruned calls": lambda one: one["moved"][~one["warm_up"]].mean(),
    "gripper flips": lambda one: one["flips"].mean(),
    "gripper": lambda one: one["dims"][:, -1].mean(),
    "without gripper": lambda one: one["dims"][:, :-1].mean(),
    "first third": lambda one: one["moved"][one["phase"] < 1 / 3].mean(),
    "middle third": lambda one: one["moved"][
        (one["phase"] >= 1 / 3) & (one["phase"] < 2 / 3)
    ].mean(),
    "last third": lambda one: one["moved"][one["phase"] >= 2 / 3].mean(),
}
"""Of the calls of a condition."""
LEAST = 30
"""Episodes behind a success rate, at least; `rank` takes what there is."""
GRID = np.concatenate([np.linspace(0, 0.3, 31), np.linspace(0.32, 1.5, 60)])
DRAWS = 400


def group_of(text: str) -> str:
    """What kind of condition: some change more than which tokens are there."""
    method = Condition.parse(text).build()
    if method.name == "efficientvla":
        return "EfficientVLA"
    return "renumbered" if getattr(method, "positions", "keep") != "keep" else "others"


def load_replays(out: Path, name: str) -> list[dict]:
    """What `replay` kept of a policy, joined with the success of each condition."""
    success = measured(name)
    found = []
    for path in sorted((out / name).glob("*.npz")):
        one = dict(np.load(path))
        text = str(one["condition"])
        one["phase"] = np.concatenate([np.arange(n) / n for n in one["lengths"]])
        one["episode"] = np.repeat(np.arange(len(one["lengths"])), one["lengths"])
        solved, episodes, _ = success.get(text, (0, 0, ""))
        base, of, _ = success["none"]
        one |= {"policy": name, "text": text, "group": group_of(text), "base": base / of}
        found.append(one | {"solved": solved, "episodes": episodes})
    return found


def spearman(conditions: list[dict], values: np.ndarray, draws: int = DRAWS) -> tuple[float, ...]:
    """Rank correlation with success, and its 95 % interval over conditions and episodes drawn."""
    rng = np.random.default_rng(0)
    solved = np.array([one["solved"] for one in conditions])
    episodes = np.array([one["episodes"] for one in conditions])
    drawn = []
    for _ in range(draws):
        which = rng.integers(len(conditions), size=len(conditions))
        if np.ptp(values[which]) == 0 or np.ptp(solved[which] / episodes[which]) == 0:
            continue
        again = rng.binomial(episodes, solved / episodes)[which] / episodes[which]
        drawn.append(spearmanr(values[which], again).statistic)
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return float(spearmanr(values, solved / episodes).statistic), float(low), float(high)


def of_episodes(one: dict, chosen: np.ndarray) -> dict:
    """The same condition with some of its recorded episodes alone."""
    keep = np.isin(one["episode"], chosen)
    return {
        key: one[key][keep]
        for key in ("moved", "worst", "chunk", "warm_up", "flips", "dims", "phase")
    }


def fit(conditions: list[dict], start: np.ndarray | None = None) -> np.ndarray:
    """Share of the unpruned success that is left: logistic in log deviation, beta-binomial.

    The scatter between conditions with the same deviation is part of the model: it, not the number
    of episodes, is what a new condition has to expect.
    """
    deviation = np.array([one["moved"].mean() for one in conditions])
    solved = np.array([one["solved"] for one in conditions])
    episodes = np.array([one["episodes"] for one in conditions])
    base = np.array([one["base"] for one in conditions])

    def loss(parameters: np.ndarray) -> float:
        rate = np.clip(base * left(parameters, deviation), 1e-4, 1 - 1e-4)
        size = np.exp(np.clip(parameters[2], -1, 5))
        a, b = rate * size, (1 - rate) * size
        return float(-(betaln(solved + a, episodes - solved + b) - betaln(a, b)).sum())

    begin = np.array([np.log(0.25), 1.0, 2.0]) if start is None else start
    return minimize(loss, begin, method="Nelder-Mead", options={"maxiter": 2000}).x


def left(parameters: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    """Share of the success that is left at a deviation."""
    middle, slope = parameters[0], np.exp(parameters[1])
    with np.errstate(divide="ignore"):
        return 1 / (1 + np.exp(np.clip(slope * (np.log(deviation) - middle), -50, 50)))


def expectation(policies: dict[str, list[dict]], draws: int = 100) -> dict[str, np.ndarray]:
    """Loss on the grid: the middle one, and what nine of ten new conditions would lose.

    Each policy has a curve of its own, and counts as much as any other: how much a deviation costs
    differs more between policies than between conditions of one. Parameters are fitted again to
    conditions drawn with replacement; each draw scatters by its own beta distribution.
    """
    rng, drawn = np.random.default_rng(0), []
    for conditions in policies.values():
        best = fit(conditions)
        for _ in range(draws):
            which = rng.integers(len(conditions), size=len(conditions))
            found = fit([conditions[n] for n in which], best)
            rate = np.clip(left(found, GRID), 1e-4, 1 - 1e-4)
            size = np.exp(np.clip(found[2], -1, 5))
            drawn.append(rng.beta(rate * size, (1 - rate) * size, size=(50, len(GRID))))
    quantiles = np.quantile(1 - np.concatenate(drawn), [0.5, 0.05, 0.95], axis=0)
    quantiles[:, 0] = 0  # no deviation, no loss
    return dict(zip(("loss", "low", "high"), np.maximum.accumulate(quantiles, axis=1), strict=True))


def loss_of(one: dict) -> float:
    """Share of the unpruned policy's success that a condition lost."""
    return 1 - one["solved"] / one["episodes"] / one["base"]


def covered(conditions: list[dict], table: dict[str, np.ndarray]) -> tuple[float, float]:
    """Share of measured losses within the band, and mean absolute distance from the middle."""
    inside, distance = [], []
    for one in conditions:
        seen = np.clip(loss_of(one), 0, 1)
        low, high, middle = (
            np.interp(one["moved"].mean(), GRID, table[key]) for key in ("low", "high", "loss")
        )
        inside.append(low - 0.5 / one["episodes"] <= seen <= high + 0.5 / one["episodes"])
        distance.append(abs(seen - middle))
    return float(np.mean(inside)), float(np.mean(distance))


def print_correlations(known: dict[str, list[dict]]) -> None:
    """Of each statistic with success."""
    print("\nSpearman with success (95 %)")
    for statistic, value in STATISTICS.items():
        line = f"{statistic:18s}"
        for found in known.values():
            values = np.nan_to_num([value(one) for one in found])
            line += "  {:+.2f} ({:+.2f} to {:+.2f})".format(*spearman(found, values))
        print(line)


def print_by_number(known: dict[str, list[dict]]) -> None:
    """The correlation with few recorded episodes."""
    print("\nby number of recorded episodes (mean; 5 % to 95 % over which ones)")
    rng = np.random.default_rng(0)
    for name, conditions in known.items():
        count = max(len(one["lengths"]) for one in conditions)
        rates = [one["solved"] / one["episodes"] for one in conditions]
        for size in range(1, count + 1):
            found = []
            for _ in range(40 if size < count else 1):
                chosen = rng.choice(count, size, replace=False)
                values = [of_episodes(one, chosen)["moved"].mean() for one in conditions]
                found.append(spearmanr(values, rates).statistic)
            low, middle, high = np.quantile(found, [0.05, 0.5, 0.95])
            print(f"{name:14s} {size}  {middle:+.2f}  {low:+.2f} to {high:+.2f}")


def rank(name: str, out: Path) -> None:
    """How well deviation ranks the conditions of one policy; its rows of results/tune.csv."""
    found = [one for one in load_replays(out, name) if one["episodes"]]
    print_correlations({name: found})
    print_by_number({name: found})
    for one in sorted(found, key=lambda one: one["moved"].mean()):
        success = f"{one['solved']} of {one['episodes']}"
        print(f"{one['text']:50s} {one['moved'].mean():.3f}  {success}")
    with (HERE / "results" / "tune.csv").open() as file:
        head, *others = [row for row in csv.reader(file) if row[0] != name]
    with (HERE / "results" / "tune.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([head, *others, *map(row_of, found)])


def report(out: Path) -> None:
    """Print every comparison; write the CSV, the picture and the table of the package."""
    every = {name: load_replays(out, name) for name in POLICIES if (out / name).is_dir()}
    known = {name: [c for c in found if c["episodes"] >= LEAST] for name, found in every.items()}
    known = {name: found for name, found in known.items() if found}
    ranked = [name for name, found in known.items() if len(found) > 4]
    print_correlations({name: known[name] for name in ranked})
    print("\nby group (mean)")
    for name in ranked:
        for group in ("others", "renumbered", "EfficientVLA"):
            own = [one for one in known[name] if one["group"] == group]
            if len(own) > 3:
                values = np.array([one["moved"].mean() for one in own])
                found = spearman(own, values)
                print(
                    f"{name:14s} {group:14s} {len(own):3d} "
                    + "{:+.2f} ({:+.2f} to {:+.2f})".format(*found)
                )
    print_by_number({name: known[name] for name in ranked})
    print("\nmap: each policy predicted by the others (share within the band, mean distance)")
    for name in ranked:
        if others := {other: known[other] for other in ranked if other != name}:
            inside, distance = covered(known[name], expectation(others, 30))
            print(f"{name:14s} {inside:.2f} {distance:.2f}")
    table = expectation({name: known[name] for name in ranked})
    print("\nshare of success lost, by deviation: conditions, mean, largest")
    for name in ranked:
        for low, high in ((0, 0.05), (0.05, 0.1), (0.1, 0.15), (0.15, 0.25), (0.25, 0.5), (0.5, 9)):
            lost = [loss_of(c) for c in known[name] if low < c["moved"].mean() <= high]
            if lost:
                print(
                    f"{name:14s} {low:.2f} to {high:.2f} {len(lost):3d} {np.mean(lost):+.2f} "
                    f"{max(lost):+.2f}"
                )
    print("\nfarthest from the map")
    for name in ranked:
        far = []
        for one in known[name]:
            seen = loss_of(one)
            far.append(
                (
                    seen - np.interp(one["moved"].mean(), GRID, table["loss"]),
                    one["text"],
                    one["moved"].mean(),
                    seen,
                )
            )
        for difference, text, deviation, seen in sorted(far, key=lambda f: -abs(f[0]))[:8]:
            print(
                f"{name:14s} {difference:+.2f} {text:45s} deviation {deviation:.3f} lost {seen:.2f}"
            )
    write(every, ranked, table)


def row_of(one: dict) -> list:
    """A condition's row of tune.csv."""
    names = ("policy", "text", "group", "solved", "episodes")
    values = [f"{np.nan_to_num(value(one)):.4f}" for value in STATISTICS.values()]
    counts = [f"{one['base']:.2f}", len(one["lengths"]), len(one["moved"])]
    return [*(one[name] for name in names), *counts, *values]


def write(every: dict, ranked: list[str], table: dict[str, np.ndarray]) -> None:
    """The files that a reader finds."""
    with (HERE / "results" / "tune.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        head = [
            "policy",
            "condition",
            "group",
            "solved",
            "episodes",
            "unpruned_rate",
            "replayed",
            "calls",
        ]
        writer.writerow([*head, *(name.replace(" ", "_") for name in STATISTICS)])
        writer.writerows(row_of(one) for found in every.values() for one in found)
    values = {
        "made_by": "experiments/tune_study.py",
        "conditions": sum(c["episodes"] >= LEAST for name in ranked for c in every[name]),
        "policies": ranked,
        "deviation": [round(float(x), 4) for x in GRID],
        **{key: [round(float(x), 4) for x in found] for key, found in table.items()},
    }
    FILE.write_text(json.dumps(values) + "\n")
    draw(every, table, HERE.parent / "docs" / "tune.png")


COLOURS = {
    "mini-oft": "#0f5fa8",
    "mini-openvla": "#d9730d",
    "mini-pi0": "#2f855a",
    "smol-oft": "#8b3fa8",
}
MARKS = {"others": "o", "renumbered": "x", "EfficientVLA": "^"}


def draw(every: dict, table: dict[str, np.ndarray], path: Path) -> None:
    """All conditions, and the map."""
    figure, axis = pyplot.subplots(figsize=(8.5, 5))
    axis.fill_between(
        GRID, 1 - table["high"], 1 - table["low"], color="#dde3ea", label="nine of ten conditions"
    )
    axis.plot(GRID, 1 - table["loss"], color="#54616e", label="the map")
    for name, found in every.items():
        for group, mark in MARKS.items():
            own = [c for c in found if c["group"] == group and c["episodes"] >= LEAST]
            x = [one["moved"].mean() for one in own]
            y = [one["solved"] / one["episodes"] / one["base"] for one in own]
            label = name if group == "others" else f"{name}, {group}"
            if own:
                axis.scatter(x, y, s=22, marker=mark, color=COLOURS[name], label=label, alpha=0.75)
    axis.set_xlim(0, 1.5)
    axis.set_ylim(-0.03, 1.12)
    axis.set_xlabel("mean deviation on recorded observations, spreads of the action")
    axis.set_ylabel("success, share of the unpruned policy's")
    axis.legend(fontsize=8, frameon=False, loc="upper right")
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Read the arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["replay", "report", "rank"])
    parser.add_argument("policy", nargs="?", choices=POLICIES)
    parser.add_argument("--out", type=Path, default=Path("runs/tune-study"))
    parser.add_argument("--episodes", type=int, default=8)
    parser.add_argument("--calls", type=int, default=40)
    parser.add_argument("--only", nargs="+", default=[], help="these conditions")
    args = parser.parse_args()
    if args.what == "replay":
        replay(args.policy, args.out, args.episodes, args.calls, args.only)
    elif args.what == "rank":
        rank(args.policy, args.out)
    else:
        report(args.out)


if __name__ == "__main__":
    main()
