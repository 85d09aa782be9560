"""From a deviation to the success that policies lost with it: what was seen, never a promise.

The table in calibration.json was made by experiments/tune_study.py from conditions of the policies
that ship here, whose success in closed loop was measured (docs/tune.md).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

FILE = Path(__file__).with_name("calibration.json")


@dataclass(frozen=True)
class Expected:
    """Share of the unpruned policy's success that conditions with some deviation lost.

    Args:
        loss: the middle one, in [0, 1].
        low, high: nine of ten such conditions lost between these.
    """

    loss: float
    low: float
    high: float


@dataclass(frozen=True)
class Expectation:
    """Loss by deviation, as a table to interpolate in.

    Args:
        deviation: ascending, in units of the action's spread.
        loss, low, high: at each of them, rising with it.
        conditions, policies: what the table was made from.
    """

    deviation: tuple[float, ...]
    loss: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    conditions: int
    policies: tuple[str, ...]

    def at(self, deviation: float) -> Expected:
        """What to expect; beyond the last entry, that of the last."""
        found = (
            np.interp(deviation, self.deviation, of) for of in (self.loss, self.low, self.high)
        )
        return Expected(*map(float, found))

    def largest(self, loss: float) -> float:
        """The largest deviation at which the middle condition lost at most `loss`."""
        fine = np.linspace(0.0, self.deviation[-1], 2001)
        return float(fine[np.interp(fine, self.deviation, self.loss) <= loss].max())


@lru_cache(maxsize=1)
def shipped_expectation() -> Expectation:
    """The table of the package."""
    values = json.loads(FILE.read_text("utf-8"))
    curves = {key: tuple(values[key]) for key in ("deviation", "loss", "low", "high", "policies")}
    return Expectation(**curves, conditions=values["conditions"])
