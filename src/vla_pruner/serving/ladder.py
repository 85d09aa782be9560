"""Degrade before late: budgets that a tuning receipt allows, and when to step among them."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from vla_pruner._short import short


@dataclass(frozen=True)
class Rung:
    """One budget.

    Args:
        method: name of a pruning method, or "none".
        keep: share of the visual tokens, in (0, 1], or their number.
        p99_ms: 99th percentile of a whole call where it was tuned, milliseconds; None: not known.
        options: of the method.
    """

    method: str
    keep: float | int
    p99_ms: float | None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """As a condition is written: "vla-pruner@0.25"."""
        return self.method if self.method == "none" else f"{self.method}@{self.keep:g}"


@dataclass
class Ladder:
    """Steps down when answers come close to the deadline, and up again when there is room.

    Args:
        rungs: from most tokens to fewest; see `read`.
        deadline_s: what answers must not exceed.
        high: the share of the deadline at which the 99th percentile steps down.
        low: the share of it that the upper rung is expected to stay under before it steps up.
        window: answers that the percentile is taken over.
        least: answers on a rung before anything is decided.
        patience: answers on a rung before it steps up; doubled each time that this was too early.

    Raises:
        ValueError: no rungs, or numbers that make no ladder.
    """

    rungs: Sequence[Rung]
    deadline_s: float
    high: float = 0.9
    low: float = 0.7
    window: int = 100
    least: int = 8
    patience: int = 100
    at: int = field(default=0, init=False)
    _seen: deque[float] = field(init=False, repr=False)
    _count: int = field(default=0, init=False, repr=False)
    _climbed: bool = field(default=False, init=False, repr=False)
    _wait: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.rungs:
            raise ValueError("a ladder needs at least one allowed rung")
        if not (math.isfinite(self.deadline_s) and self.deadline_s > 0):
            raise ValueError(f"a ladder needs a deadline above 0; got {short(self.deadline_s)}")
        if not 0 < self.low < self.high <= 1:
            raise ValueError(f"expected 0 < low < high <= 1; got {self.low}, {self.high}")
        for above, below in pairwise(self.rungs):
            if type(above.keep) is type(below.keep) and below.keep >= above.keep:
                raise ValueError(
                    f"rungs go from most tokens to fewest; {below.name} stands below {above.name}"
                )
        self._seen = deque(maxlen=self.window)
        self._wait = self.patience

    @classmethod
    def read(
        cls, path: str | Path, deadline_s: float, *, weights: str | None = None, **options: Any
    ) -> Ladder:
        """The ladder of a receipt of `vla-pruner tune`: the rungs that it allows.

        Args:
            path: the receipt, its folder, or a file with a list of `{"method", "keep", "p99_ms",
                "allowed"}`, by itself or under "rungs".
            deadline_s, options: of the ladder.
            weights: fingerprint of the policy that is served (`runs.job.fingerprint`), which the
                receipt has to be of; None: it is not asked for.

        Raises:
            ValueError: no such file, entries that are none of these, or the receipt of another
                policy.
        """
        file = Path(path) / "receipt.json" if Path(path).is_dir() else Path(path)
        try:
            found = json.loads(file.read_text("utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} cannot be read as a receipt of `tune`: {error}") from None
        if isinstance(found, Mapping) and "ladder" in found:
            from vla_pruner.tuning.receipt import load_receipt

            receipt = load_receipt(file)
            if weights is not None:
                receipt.check(weights)
            rungs = [Rung(r.method, r.keep, r.p99_ms, r.options) for r in receipt.allowed]
            return cls(rungs, deadline_s, **options)
        if weights is not None:
            raise ValueError(
                f"{path} does not say of which policy its rungs are; make a receipt with "
                "`vla-pruner tune`"
            )
        entries = found.get("rungs") if isinstance(found, Mapping) else found
        if not isinstance(entries, list):
            raise ValueError(f"{path} holds no list of rungs; make one with `vla-pruner tune`")
        rungs = [rung for entry in entries if (rung := _rung(path, entry)) is not None]
        best: dict[float, Rung] = {}
        for rung in rungs:
            known = best.get(rung.keep)
            if known is None or (rung.p99_ms or 0.0) < (known.p99_ms or 0.0):
                best[rung.keep] = rung
        if not best:
            raise ValueError(f"{path} allows no rung; nothing to step down to")
        return cls([best[keep] for keep in sorted(best, reverse=True)], deadline_s, **options)

    @property
    def rung(self) -> Rung:
        """The one in use."""
        return self.rungs[self.at]

    def observe(self, seconds: float) -> int:
        """Count one answer in, and step if it is time to.

        Args:
            seconds: from an observation's arrival to its answer, or to its deadline.

        Returns:
            -1 stepped down to fewer tokens, 1 up to more, 0 neither.
        """
        self._seen.append(seconds)
        self._count += 1
        if self._count < self.least:
            return 0
        p99 = float(np.quantile(self._seen, 0.99))
        if p99 >= self.high * self.deadline_s:
            if self.at == len(self.rungs) - 1:
                return 0
            if self._climbed and self._count <= self.patience:
                self._wait *= 2
            return self._go(1)
        if self._climbed and self._count > self._wait:
            self._wait = self.patience
        if self.at and self._count >= self._wait:
            above, here = self.rungs[self.at - 1].p99_ms, self.rung.p99_ms
            ratio = 1.0 if above is None or here is None else above / here
            if p99 * max(ratio, 1.0) < self.low * self.deadline_s:
                return self._go(-1)
        return 0

    def _go(self, by: int) -> int:
        self.at += by
        self._climbed = by < 0
        self._seen.clear()
        self._count = 0
        return -by


def _rung(path: str | Path, entry: Any) -> Rung | None:
    """A rung of a receipt; None: it is not allowed. Errors: ValueError."""
    if not isinstance(entry, Mapping) or not {"method", "keep", "p99_ms"} <= set(entry):
        raise ValueError(f"{path}: a rung is {{method, keep, p99_ms, allowed}}; got {short(entry)}")
    if entry.get("allowed") is not True:
        return None
    method, keep, p99 = entry["method"], entry["keep"], entry["p99_ms"]
    keep = 1.0 if keep is None and method == "none" else keep
    numbers = all(type(value) in (int, float) and math.isfinite(value) for value in (keep, p99))
    if not isinstance(method, str) or not numbers or not 0 < keep <= 1 or p99 <= 0:
        raise ValueError(
            f"{path}: a rung needs a method, a share in (0, 1] and a p99_ms above 0; got "
            f"{short(entry)}"
        )
    return Rung(method, float(keep), float(p99))
