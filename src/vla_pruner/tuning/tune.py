"""Every condition on the same recorded observations, and the cheapest within a tolerance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from vla_pruner._short import cut
from vla_pruner.episodes.condition import ALL_TOKENS, Condition
from vla_pruner.runs.plan import settings_of
from vla_pruner.tuning.deviation import Deviation, Scale
from vla_pruner.tuning.expectation import Expected, shipped_expectation
from vla_pruner.tuning.replay import Answers, Latency, Tick, answer, deviation_of, time_calls
from vla_pruner.tuning.sources import Source

BASELINE = Condition(ALL_TOKENS)
_REFUSALS = (ValueError, TypeError, NotImplementedError, OSError)


@dataclass(frozen=True)
class Row:
    """What one condition does to the policy.

    Args:
        condition: which.
        recipe: digest of the recipe that it follows; None: it follows none.
        deviation: from the answers on all tokens.
        expected: share of success that conditions with such a deviation lost elsewhere.
        allowed: within the tolerance, with the upper end of its interval.
        visual: visual tokens of a call, and those that stay in the calls that drop some.
        flops: prefill FLOPs of an average call, warm-up included, over those on all tokens.
        latency: of whole calls; None: not timed.
    """

    condition: Condition
    recipe: str | None
    deviation: Deviation
    expected: Expected
    allowed: bool
    visual: tuple[int, float]
    flops: float
    latency: Latency | None


@dataclass(frozen=True)
class Tuning:
    """What was found.

    Args:
        rows: the first is all tokens; then as they were asked for.
        scale: of the unpruned actions.
        tolerance: largest mean deviation that was asked for.
        recorded: mean distance of the first unpruned action of each call from the one that was
            recorded, in units of the action's spread; None: actions were not recorded.
    """

    rows: tuple[Row, ...]
    scale: Scale
    tolerance: float
    recorded: float | None

    @property
    def recommended(self) -> Row:
        """The allowed row with the fewest FLOPs; all tokens, if nothing else is allowed."""
        return min((row for row in self.rows if row.allowed), key=lambda row: row.flops)


def conditions_of(methods: Sequence[str], keeps: Sequence[float | int]) -> list[Condition]:
    """The conditions to try: every method at every budget, or as it says itself.

    Args:
        methods: names, or conditions such as "fastv@64:layer=2".
        keeps: budgets of the names.

    Raises:
        ValueError: an unknown method, a condition that is there twice, or "none", which always is.
    """
    found: list[Condition] = []
    for word in methods:
        if word == ALL_TOKENS:
            raise ValueError("all tokens are always measured; leave 'none' out of --methods")
        words = [word] if "@" in word else [f"{word}@{keep}" for keep in keeps]
        found += [Condition.parse(text) for text in words]
    names = [condition.name for condition in found]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"{', '.join(sorted(twice))}: named twice")
    return found


def tune(
    policy: nn.Module,
    conditions: Sequence[Condition],
    source: Source,
    *,
    execute: int,
    tolerance: float,
    gripper: Sequence[int] = (-1,),
    threshold: float = 0.0,
    rounds: int = 5,
    timed: int = 2,
    on_start: Callable[[int], None] = lambda total: None,
    tick: Tick = lambda: None,
) -> Tuning:
    """Replay everything, compare with all tokens, then time all conditions in turn.

    Args:
        policy: has `predict_action`.
        conditions: without all tokens, which are added.
        source: recorded episodes.
        execute: actions of a chunk that are carried out.
        tolerance: largest mean deviation, in units of the action's spread.
        gripper, threshold: dimensions of the gripper, and what lies between its two sides.
        rounds: repetitions behind the latency; 0: none is measured.
        timed: episodes that are timed.
        on_start: told how often `tick` will be called.
        tick: called after each replayed episode.

    Raises:
        ValueError: conditions that do not fit the policy, each of them named.
    """
    if not 0 < tolerance < float("inf"):
        raise ValueError(f"tolerance {tolerance} must be positive: a share of the action's spread")
    recipes = _checked(policy, conditions)
    episodes, fast = source.episodes, source.episodes[:timed]
    everything = [BASELINE, *conditions]
    on_start(len(everything) * (len(episodes) + rounds * len(fast)))
    full = answer(policy, BASELINE, episodes, tick)
    scale = Scale.of(
        [one.actions for one in full], execute=execute, gripper=gripper, threshold=threshold
    )
    rows = []
    for condition in everything:
        found = full if condition is BASELINE else answer(policy, condition, episodes, tick)
        deviation, _ = deviation_of(episodes, full, found, scale)
        rows.append(_row(condition, recipes.get(condition.name), deviation, found, tolerance))
    if rounds:
        latency = time_calls(policy, everything, fast, rounds, tick)
        rows = [replace(row, latency=latency[row.condition.name]) for row in rows]
    return Tuning(tuple(rows), scale, tolerance, _from_recorded(source, full, scale))


def _checked(policy: nn.Module, conditions: Sequence[Condition]) -> dict[str, str | None]:
    """Digest of each condition's recipe, after all of them have been attached once."""
    recipes: dict[str, str | None] = {}
    problems = []
    for condition in conditions:
        try:
            recipes[condition.name] = settings_of(condition, policy)[1]
        except _REFUSALS as error:
            problems.append(f"{condition.name}: {cut(str(error), 500)}")
    if problems:
        raise ValueError("nothing was replayed; these do not fit:\n  " + "\n  ".join(problems))
    return recipes


def _row(
    condition: Condition,
    recipe: str | None,
    deviation: Deviation,
    answers: Sequence[Answers],
    tolerance: float,
) -> Row:
    calls = [call for one in answers for call in one.calls]
    pruned = [call for call in calls if not call.warm_up] or calls
    bound = deviation.mean if deviation.high is None else deviation.high
    return Row(
        condition=condition,
        recipe=recipe,
        deviation=deviation,
        expected=shipped_expectation().at(deviation.mean),
        allowed=bound <= tolerance,
        visual=(calls[0].visual, float(np.mean([call.visual_kept for call in pruned]))),
        flops=sum(call.prefill_macs for call in calls) / sum(call.full_macs for call in calls),
        latency=None,
    )


def _from_recorded(source: Source, full: Sequence[Answers], scale: Scale) -> float | None:
    if not source.actions:
        return None
    found: list[Any] = [
        np.abs(one.actions[:, 0] - actions)[:, scale.moving] / scale.spread[scale.moving]
        for one, actions in zip(full, source.actions, strict=True)
    ]
    return float(np.concatenate(found).mean())
