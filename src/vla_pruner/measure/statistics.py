"""Intervals and tests for paired episodes, without any dependency beyond NumPy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np

_BISECTIONS = 60
_AT_ONCE = 2_000_000
"""Numbers held at once while medians are counted."""


@dataclass(frozen=True)
class Interval:
    """A confidence interval."""

    low: float
    high: float


def wilson(successes: int, episodes: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a success rate (Wilson, JASA 1927).

    It stays within [0, 1] and keeps its coverage for few episodes and for rates near 0 and 1.

    Raises:
        ValueError: not 0 <= successes <= episodes, or no episodes.
    """
    if episodes < 1 or not 0 <= successes <= episodes:
        raise ValueError(
            f"{successes} successes in {episodes} episodes have no success rate; "
            "need 0 <= successes <= episodes and at least one episode"
        )
    z = _z(confidence)
    rate, shrink = successes / episodes, z * z / episodes
    centre = (rate + shrink / 2) / (1 + shrink)
    half = z * math.sqrt(rate * (1 - rate) / episodes + shrink / (4 * episodes)) / (1 + shrink)
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == episodes else centre + half
    return Interval(low, high)


@dataclass(frozen=True)
class PairedSuccess:
    """The same episodes under a baseline and under a treatment.

    Args:
        gained: episodes that only the treatment solved.
        lost: episodes that only the baseline solved.
        pairs: all episodes that both ran.
    """

    gained: int
    lost: int
    pairs: int

    def __post_init__(self) -> None:
        if min(self.gained, self.lost) < 0 or self.pairs < max(1, self.gained + self.lost):
            raise ValueError(
                f"gained={self.gained} and lost={self.lost} do not fit into {self.pairs} pairs"
            )

    @property
    def difference(self) -> float:
        """Success rate of the treatment minus that of the baseline."""
        return (self.gained - self.lost) / self.pairs

    def p_value(self) -> float:
        """Two-sided exact McNemar test: a fair coin decides each episode that differs."""
        differing = self.gained + self.lost
        fewer = min(self.gained, self.lost)
        tail = sum(math.comb(differing, k) for k in range(fewer + 1)) / 2**differing
        return min(1.0, 2 * tail)

    def interval(self, confidence: float = 0.95) -> Interval:
        """Score interval of the difference (Tango, Statistics in Medicine 1998)."""
        z = _z(confidence)
        return Interval(
            _crossing(lambda delta: self._score(delta) - z, -1.0, self.difference),
            _crossing(lambda delta: self._score(delta) + z, self.difference, 1.0),
        )

    def _score(self, delta: float) -> float:
        """Standardised distance of the observed difference from `delta`; it falls with delta."""
        distance = self.gained - self.lost - self.pairs * delta
        if distance == 0:
            return 0.0
        # Maximum-likelihood rate of "only the baseline" if the true difference were delta.
        b = -(self.gained + self.lost) + (2 * self.pairs - self.gained + self.lost) * delta
        c = -self.lost * delta * (1 - delta)
        lost_rate = (math.sqrt(max(b * b - 8 * self.pairs * c, 0.0)) - b) / (4 * self.pairs)
        variance = self.pairs * (2 * lost_rate + delta * (1 - delta))
        return math.copysign(math.inf, distance) if variance <= 0 else distance / variance**0.5


def paired_success(baseline: Sequence[bool], treatment: Sequence[bool]) -> PairedSuccess:
    """Count the episodes that differ; entry i of both is the same episode.

    Raises:
        ValueError: different lengths, or no episodes.
    """
    pairs = list(zip(baseline, treatment, strict=True))
    return PairedSuccess(
        gained=sum(after and not before for before, after in pairs),
        lost=sum(before and not after for before, after in pairs),
        pairs=len(pairs),
    )


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile (q in [0, 1]), interpolated between neighbours; NaN without values."""
    return float(np.quantile(np.asarray(values, dtype=np.float64), q)) if len(values) else math.nan


def median(values: Sequence[float]) -> float:
    """The middle of the values; NaN without values."""
    return quantile(values, 0.5)


def speedup_of(
    baseline: Sequence[Sequence[float]],
    treatment: Sequence[Sequence[float]],
    confidence: float = 0.95,
    *,
    draws: int = 1000,
    seed: int = 0,
) -> tuple[float, Interval | None]:
    """How many times faster the median call of `treatment` is, and its bootstrap interval.

    Whole episodes are drawn, in pairs: calls within an episode are alike, and what slowed the
    machine during an episode slowed its partner. A single episode has no interval.

    Args:
        baseline, treatment: latencies of the calls of each episode; entry i is the same episode.

    Raises:
        ValueError: different numbers of episodes, or none.
    """
    if len(baseline) != len(treatment) or not baseline:
        raise ValueError(
            f"need the same episodes on both sides, got {len(baseline)} and {len(treatment)}"
        )
    before, after = _Pool(baseline), _Pool(treatment)
    once = np.ones((1, len(baseline)), dtype=np.int64)
    ratio = float(before.medians(once)[0] / after.medians(once)[0])
    if len(baseline) == 1:
        return ratio, None
    times = _drawn(len(baseline), draws, seed)
    ratios = (before.medians(times) / after.medians(times)).tolist()
    tail = (1 - confidence) / 2
    return ratio, Interval(quantile(ratios, tail), quantile(ratios, 1 - tail))


@lru_cache(maxsize=8)
def _drawn(count: int, draws: int, seed: int) -> np.ndarray:
    """How often each of `count` episodes is drawn, with replacement: int64 `[draws, count]`."""
    rng = np.random.default_rng(seed)
    chosen = (rng.integers(count, size=count) for _ in range(draws))
    return np.stack([np.bincount(episodes, minlength=count) for episodes in chosen])


class _Pool:
    """Calls of several episodes, sorted once, so that a median of drawn episodes only counts."""

    def __init__(self, episodes: Sequence[Sequence[float]]) -> None:
        values = np.concatenate([np.asarray(calls, dtype=np.float64) for calls in episodes])
        owners = np.repeat(np.arange(len(episodes)), [len(calls) for calls in episodes])
        order = np.argsort(values, kind="stable")
        self.values = values[order]
        # Of each episode, how many calls are among the first ones: [n, calls].
        self.until = (owners[order] == np.arange(len(episodes))[:, None]).cumsum(axis=1)

    def medians(self, times: np.ndarray) -> np.ndarray:
        """Medians `[draws]` of the calls, each as often as its episode is in `times` [draws, n]."""
        rows = max(1, _AT_ONCE // len(self.values))
        return np.concatenate(
            [self._medians(times[i : i + rows]) for i in range(0, len(times), rows)]
        )

    def _medians(self, times: np.ndarray) -> np.ndarray:
        until = times.astype(np.float64) @ self.until.astype(np.float64)  # whole numbers, exact
        total = until[:, -1:]
        low, high = (
            self.values[np.count_nonzero(until <= place, axis=1)]
            for place in ((total - 1) // 2, total // 2)
        )
        return np.where(low == high, low, (low + high) / 2)


def ratio_of_means(
    before: Sequence[float], after: Sequence[float], *, draws: int = 2000, seed: int = 0
) -> tuple[float, Interval | None]:
    """Mean of `after` over mean of `before`, and its 95 % bootstrap interval over pairs.

    Entry i of both is the same scene. NaN where the mean before is 0; one pair has no interval, and
    none has it where the mean before may be 0 in what is drawn.

    Raises:
        ValueError: different numbers of values, or none.
    """
    if len(before) != len(after) or not len(before):
        raise ValueError(f"need pairs, got {len(before)} and {len(after)} values")
    old, new = (np.asarray(values, dtype=np.float64) for values in (before, after))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = float(new.mean() / old.mean())
        if len(old) == 1 or not math.isfinite(ratio):
            return ratio if math.isfinite(ratio) else math.nan, None
        drawn = np.random.default_rng(seed).integers(len(old), size=(draws, len(old)))
        ratios = new[drawn].mean(axis=1) / old[drawn].mean(axis=1)
    if not np.isfinite(ratios).all():
        return ratio, None
    return ratio, Interval(quantile(ratios.tolist(), 0.025), quantile(ratios.tolist(), 0.975))


def difference_of_differences(
    first: PairedSuccess, second: PairedSuccess, confidence: float = 0.95
) -> tuple[float, Interval]:
    """Difference of `second` minus that of `first`, and its interval.

    The interval combines the two score intervals (MOVER: Zou and Donner, Statistics in Medicine
    2008), as if the two were independent: that is wide where scenes that are hard in one are hard
    in the other.
    """
    one, two = first.interval(confidence), second.interval(confidence)
    middle = second.difference - first.difference
    low = math.hypot(second.difference - two.low, one.high - first.difference)
    high = math.hypot(two.high - second.difference, first.difference - one.low)
    return middle, Interval(max(-2.0, middle - low), min(2.0, middle + high))


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for being several, in their order (Holm, Scand. J. Statistics 1979).

    Raises:
        ValueError: something is no p-value.
    """
    if odd := [p for p in p_values if not 0 <= p <= 1]:
        raise ValueError(f"p-values lie between 0 and 1; got {odd[0]}")
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def _z(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must lie between 0 and 1, as 0.95 does")
    return NormalDist().inv_cdf((1 + confidence) / 2)


def _crossing(falling: Callable[[float], float], low: float, high: float) -> float:
    """Where a falling function passes zero between `low` and `high`."""
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if falling(middle) > 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2
