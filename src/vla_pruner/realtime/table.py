"""From trials to one row per condition, as Markdown; and films of them as moving pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from vla_pruner.episodes.motion import MEASURES, compare_motion
from vla_pruner.measure.statistics import paired_success, quantile, wilson
from vla_pruner.realtime.arm import Trial

FILM_HZ = 5.0
"""Pictures of a film in a second of the wall's time."""


def table(trials: Sequence[Trial], conditions: Sequence[str]) -> str:
    """Success, standing still, age of actions, answers and motion, a row per condition.

    Args:
        trials: of the same scenes under each condition.
        conditions: names, in order; differences are from the first.
    """
    base = [one for one in trials if one.condition == conditions[0]]
    rows = []
    for name in conditions:
        mine = [one for one in trials if one.condition == name]
        if mine:
            rows.append([f"`{name}`", *_cells(mine, None if mine[0] is base[0] else base)])
    heads = ["condition", *HEADS]
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


HEADS = (
    "solved",
    "difference",
    "stood still, % of ticks",
    "first action after, s",
    "age of actions, ms: median, p95",
    "answers: late, lost, of",
    "answer, ms: median, warm-up",
    "time, s",
    "hand path, m",
    "hand jerk, m/s³",
    "slipped ticks, %",
)


def _cells(mine: Sequence[Trial], base: Sequence[Trial] | None) -> list[str]:
    solved = sum(one.success for one in mine)
    bounds = wilson(solved, len(mine))
    ages = [age for one in mine for age in one.ages_ms]
    answers = [answer for one in mine for answer in one.answers]
    # The first answer of an episode finds every arm standing, and is not late for it.
    late = sum(a.late or a.stood for one in mine for a in one.answers[1:])
    pruned = [1000 * one.seconds for one in answers if not one.warm_up]
    warm = [1000 * one.seconds for one in answers if one.warm_up]
    ticks = sum(one.ticks for one in mine)
    return [
        f"{solved} of {len(mine)} ({100 * bounds.low:.0f}-{100 * bounds.high:.0f} %)",
        "-" if base is None else _difference(mine, base),
        f"{100 * sum(one.held for one in mine) / max(ticks - _before(mine), 1):.1f}",
        f"{_before(mine) / len(mine) * _tick_s(mine):.2f}",
        f"{quantile(ages, 0.5):.0f}, {quantile(ages, 0.95):.0f}",
        f"{late}, {sum(one.lost for one in mine)}, {len(answers)}",
        f"{quantile(pruned, 0.5):.0f}, {quantile(warm, 0.5):.0f}"
        if warm
        else f"{quantile(pruned, 0.5):.0f}, -",
        *_motion(mine, base),
        f"{100 * sum(one.slipped for one in mine) / max(ticks, 1):.1f}",
    ]


def _before(mine: Sequence[Trial]) -> int:
    return sum(one.before for one in mine)


def _tick_s(mine: Sequence[Trial]) -> float:
    return 1 / mine[0].hz


def _difference(mine: Sequence[Trial], base: Sequence[Trial]) -> str:
    before = {one.seed: one.success for one in base}
    both = [one for one in mine if one.seed in before]
    pairs = paired_success([before[one.seed] for one in both], [one.success for one in both])
    bounds = pairs.interval()
    points = [100 * value for value in (pairs.difference, bounds.low, bounds.high)]
    return f"{points[0]:+.0f} ({points[1]:+.0f} to {points[2]:+.0f}), p = {pairs.p_value():.2g}"


def _motion(mine: Sequence[Trial], base: Sequence[Trial] | None) -> list[str]:
    """Of the scenes that both solved: the first row's are all that it solved."""
    names = ("seconds", "hand_path", "hand_jerk")
    assert set(names) <= set(MEASURES)
    old = None if base is None else {one.seed: one.motion for one in base if one.success}
    shared = [one for one in mine if one.success and (old is None or one.seed in old)]
    after = [one.motion for one in shared if one.motion is not None]
    before = None if old is None else [old[one.seed] or {} for one in shared]
    row = compare_motion(after, before)
    if row is None:
        return ["-"] * len(names)
    cells = []
    for name in names:
        change = row.changes.get(name)
        ratio = "" if change is None or change.ratio is None else f" ({change.ratio:.2f}x)"
        cells.append("-" if change is None else f"{change.mean:.3g}{ratio}")
    return cells


def film(path: Path, scene: Any, trials: Sequence[Trial]) -> None:
    """The trials of one scene side by side, as an animated WebP; red: the arm stood.

    Args:
        path: of the file.
        scene: draws the states that the trials kept.
        trials: of one scene, each with its states.
    """
    every = max(round(trials[0].hz / FILM_HZ), 1)
    length = max(len(one.states) for one in trials)
    pictures = []
    for tick in range(0, length, every):
        panels = [_panel(scene, one, min(tick, len(one.states) - 1)) for one in trials]
        pictures.append(Image.fromarray(np.concatenate(panels, axis=1)))
    first, *others = pictures
    path.parent.mkdir(parents=True, exist_ok=True)
    first.save(
        path, "WEBP", save_all=True, append_images=others, duration=round(1000 / FILM_HZ), loop=0
    )


def _panel(scene: Any, trial: Trial, tick: int) -> np.ndarray:
    state, stood = trial.states[tick]
    scene.show(state)
    image = Image.fromarray(scene.observe(("agentview",))["agentview"]).resize((320, 320))
    over = tick == len(trial.states) - 1
    said = ("solved" if trial.success else "not solved") if over else "stands" if stood else ""
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, 320, 18), "#a11" if stood and not over else "#222")
    draw.text((6, 3), f"{trial.condition}   {tick / trial.hz:.1f} s   {said}", "white")
    return np.asarray(image)
