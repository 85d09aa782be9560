"""How far pruned actions are from unpruned ones: arrays in, numbers out.

Actions of an episode are `[calls, chunk, dim]`, in robot units. Only the first `execute` actions of
a chunk are ever carried out, and only these count, unless a name says otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vla_pruner._short import short

DRAWS = 1000
"""Resamples of episodes behind an interval."""
_STILL = 1e-6
"""A dimension whose spread is below this share of its size, or of 1, does not move."""


def check_gripper(dims: Sequence[int], size: int | None) -> None:
    """Refuse gripper dimensions that actions of `size` numbers do not have; None: not known yet."""
    if size is not None and (wrong := [number for number in dims if not -size <= number < size]):
        raise ValueError(f"gripper dimension {wrong[0]}: actions have {size} numbers")


@dataclass(frozen=True)
class Scale:
    """What the unpruned policy does on the same observations, to measure deviations by.

    Args:
        spread: standard deviation of each dimension `[dim]`, robot units.
        moving: dimensions that move at all `[dim]`, bool; the others have no spread to divide by.
        gripper: dimensions that open and close something.
        threshold: of the gripper's two sides, robot units.
        execute: actions of a chunk that are carried out.
    """

    spread: np.ndarray
    moving: np.ndarray
    gripper: tuple[int, ...]
    threshold: float
    execute: int

    @classmethod
    def of(
        cls,
        full: Sequence[np.ndarray],
        *,
        execute: int,
        gripper: Sequence[int] = (-1,),
        threshold: float = 0.0,
    ) -> Scale:
        """The scale of unpruned actions.

        Args:
            full: `[calls, chunk, dim]` of each episode.
            execute: actions of a chunk that are carried out.
            gripper: dimensions, negative ones from the end; empty: there is none.
            threshold: between its two sides, robot units.

        Raises:
            ValueError: no actions, a gripper that they do not have, or nothing that moves.
        """
        rows = np.concatenate([one.reshape(-1, one.shape[-1]) for one in full]).astype(np.float64)
        size = rows.shape[-1]
        check_gripper(gripper, size)
        spread = rows.std(axis=0)
        moving = spread > _STILL * np.maximum(1.0, np.abs(rows).max(axis=0))
        if not moving.any():
            raise ValueError(
                f"the policy answers all {len(rows)} recorded moments with the same action "
                f"{short(rows[0].tolist())}; deviations have no unit then. Record moments of whole "
                "episodes, and run `vla-pruner doctor` on the policy"
            )
        sides = tuple(sorted({number % size for number in gripper}))
        return cls(spread, moving, sides, threshold, execute)


@dataclass(frozen=True)
class Calls:
    """What differs in each call of one episode.

    Args:
        moved: deviation `[calls]`: mean over carried-out actions and moving dimensions of
            |pruned - full| / spread.
        chunk: the same over the whole chunk.
        worst: the largest |pruned - full| / spread of a carried-out action.
        units: mean |pruned - full| of the carried-out actions `[calls, dim]`, robot units.
        flips: whether a gripper is on the other side in any carried-out action.
    """

    moved: np.ndarray
    chunk: np.ndarray
    worst: np.ndarray
    units: np.ndarray
    flips: np.ndarray


def compare(full: np.ndarray, pruned: np.ndarray, scale: Scale) -> Calls:
    """What differs between the answers to the same observations.

    Args:
        full, pruned: `[calls, chunk, dim]`.
        scale: of the unpruned actions.

    Raises:
        ValueError: different shapes, or an action that is not finite.
    """
    if full.shape != pruned.shape or full.ndim != 3:
        raise ValueError(
            f"actions {full.shape} and {pruned.shape} do not belong to the same observations; "
            "expected [calls, chunk, dim] twice"
        )
    if not (np.isfinite(full).all() and np.isfinite(pruned).all()):
        raise ValueError("an action is not finite; look for NaN in the policy's weights")
    error = np.abs(pruned.astype(np.float64) - full)
    relative = error[..., scale.moving] / scale.spread[scale.moving]
    first = slice(0, scale.execute)
    sides = [actions[:, first, scale.gripper] > scale.threshold for actions in (full, pruned)]
    return Calls(
        moved=relative[:, first].mean(axis=(1, 2)),
        chunk=relative.mean(axis=(1, 2)),
        worst=relative[:, first].max(axis=(1, 2)),
        units=error[:, first].mean(axis=1),
        flips=(sides[0] != sides[1]).any(axis=(1, 2)),
    )


@dataclass(frozen=True)
class Deviation:
    """How far a condition's actions are from the unpruned ones, over all recorded calls.

    Calls of the warm-up count, as they do on the robot; most deviate by nothing.

    Args:
        mean: of `Calls.moved`, in units of the action's spread.
        low, high: 95 % interval of the mean, from resampled episodes; None: only one episode.
        p90: nine of ten calls deviate by at most this.
        worst: the largest deviation of one number of one action.
        worst_episode, worst_call: where that was.
        chunk: mean over whole chunks.
        pruned: mean over the calls that dropped tokens; NaN: none did.
        flips: share of calls with the gripper on the other side.
        by_dimension: mean of each dimension in units of its spread `[dim]`; 0 where none moves.
        by_dimension_units: the same in robot units.
        episodes, calls: how many.
        warm_up: share of calls on all tokens.
    """

    mean: float
    low: float | None
    high: float | None
    p90: float
    worst: float
    worst_episode: int
    worst_call: int
    chunk: float
    pruned: float
    flips: float
    by_dimension: tuple[float, ...]
    by_dimension_units: tuple[float, ...]
    episodes: int
    calls: int
    warm_up: float

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = asdict(self)
        values["pruned"] = None if np.isnan(self.pruned) else self.pruned
        return values


def summarise(
    episodes: Sequence[int], calls: Sequence[Calls], warm_up: Sequence[np.ndarray], scale: Scale
) -> Deviation:
    """All episodes of a condition in one.

    Args:
        episodes: number of each episode, for people.
        calls: what differs in it.
        warm_up: whether each of its calls ran on all tokens `[calls]`.
        scale: of the unpruned actions.
    """
    moved = np.concatenate([one.moved for one in calls])
    warm = np.concatenate(warm_up)
    units = np.concatenate([one.units for one in calls]).mean(axis=0)
    worst = [float(one.worst.max()) for one in calls]
    where = int(np.argmax(worst))
    low, high = interval([one.moved for one in calls])
    return Deviation(
        mean=float(moved.mean()),
        low=low,
        high=high,
        p90=float(np.quantile(moved, 0.9)),
        worst=worst[where],
        worst_episode=episodes[where],
        worst_call=int(np.argmax(calls[where].worst)),
        chunk=float(np.concatenate([one.chunk for one in calls]).mean()),
        pruned=float(moved[~warm].mean()) if (~warm).any() else float("nan"),
        flips=float(np.concatenate([one.flips for one in calls]).mean()),
        by_dimension=tuple(
            float(value) for value in np.where(scale.moving, units / _safe(scale), 0.0)
        ),
        by_dimension_units=tuple(map(float, units)),
        episodes=len(calls),
        calls=len(moved),
        warm_up=float(warm.mean()),
    )


def interval(
    moved: Sequence[np.ndarray], confidence: float = 0.95, seed: int = 0
) -> tuple[float | None, float | None]:
    """Bootstrap interval of the mean over calls: whole episodes are drawn, as calls are alike.

    Args:
        moved: deviation of each call, by episode.

    Returns:
        Both ends; None twice for a single episode.
    """
    if len(moved) < 2:
        return None, None
    sums = np.array([one.sum() for one in moved])
    counts = np.array([len(one) for one in moved])
    drawn = np.random.default_rng(seed).integers(len(moved), size=(DRAWS, len(moved)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    tail = (1 - confidence) / 2
    return float(np.quantile(means, tail)), float(np.quantile(means, 1 - tail))


def _safe(scale: Scale) -> np.ndarray:
    return np.where(scale.moving, scale.spread, 1.0)
