"""Time that goes on while a policy computes: how many ticks late its actions come.

On a robot nothing waits for the policy. A tick is one step of the scene; a call that takes `ms`
milliseconds comes `ceil(ms * hz / 1000)` ticks late, because commands are given at ticks only. With
latencies that are given, nothing depends on the machine that simulates: success over the delay, run
once per policy, then holds for every piece of hardware.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from vla_pruner._short import short

Pace = Literal["wait", "ahead", "rtc", "rtc-full"]
"""What the robot does meanwhile, see `Clock`."""

EVERY = "*"
"""Stands for every condition in `Clock.latencies`."""
_NAME = re.compile(r"live(?P<hz>[0-9.]+)?(?::(?P<latency>[^:]+))?(?::(?P<pace>[a-z-]+))?")
_MS = re.compile(r"(?P<ms>[0-9.]+)ms")


@dataclass(frozen=True)
class Latency:
    """How long a call takes under one condition, in ms.

    Args:
        condition: name; `EVERY` is any.
        warm_up: a call that runs on all tokens under a pruning method.
        pruned: any other call.
    """

    condition: str
    warm_up: float
    pruned: float


@dataclass(frozen=True)
class Clock:
    """Ticks that go on while the policy computes.

    Args:
        hz: ticks in a second, one step of the scene each.
        latencies: of calls; None: as they are measured in the episode.
        pace: "wait": the robot holds still until the answer comes, then carries it out. "ahead":
            the next call begins before the chunk ends, its first actions, planned for ticks that
            have passed, are left out. "rtc": the same, and the policy is shown what is left of the
            chunk that is being carried out, to continue it (flow policies; Jacobian as identity);
            "rtc-full": with the Jacobian of the policy.
    """

    hz: float
    latencies: tuple[Latency, ...] | None = None
    pace: Pace = "wait"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.hz) and self.hz > 0):
            raise ValueError(f"--live {self.hz:g}: ticks in a second must be more than 0")
        if self.pace not in get_args(Pace):
            raise ValueError(f"--pace {short(self.pace)}: use {', '.join(get_args(Pace))}")
        for one in self.latencies or ():
            if not all(math.isfinite(ms) and ms >= 0 for ms in (one.warm_up, one.pruned)):
                raise ValueError(
                    f"latency of {one.condition}: {one.warm_up:g} and {one.pruned:g} ms; "
                    "expected 0 or more"
                )

    def delay(self, condition: str, *, warm_up: bool, measured_ms: float) -> int:
        """Ticks until the actions of a call are there.

        Raises:
            ValueError: the latencies do not tell that of the condition.
        """
        ms = measured_ms
        if self.latencies is not None:
            one = self.latency_of(condition)
            ms = one.warm_up if warm_up else one.pruned
        return math.ceil(ms * self.hz / 1000 - 1e-9)

    def latency_of(self, condition: str) -> Latency:
        """What was given for a condition.

        Raises:
            ValueError: nothing was.
        """
        known = {one.condition: one for one in self.latencies or ()}
        if condition not in known and EVERY not in known:
            raise ValueError(
                f"the latencies say nothing of {condition}, only of {', '.join(known) or 'nothing'}"
            )
        return known.get(condition) or known[EVERY]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Clock:
        """The clock whose fields are given as plain values."""
        given = values["latencies"]
        latencies = None if given is None else tuple(Latency(**one) for one in given)
        return cls(**{**values, "latencies": latencies})


def read_clock(text: str, hz: float) -> Clock:
    """The clock that a suite's name asks for: `live`, `live10`, `live10:200ms`, `live:FILE:ahead`.

    Args:
        text: what follows `+` in the name.
        hz: of the suite, taken where the name says none.

    Raises:
        ValueError: it is written otherwise, or the file holds no latencies.
        FileNotFoundError: there is no such file.
    """
    match = _NAME.fullmatch(text)
    if match is None:
        raise ValueError(
            f"{short(text)}: write live, liveHZ, liveHZ:200ms or liveHZ:FILE, and perhaps :ahead"
        )
    try:
        rate = float(match["hz"] or hz)
    except ValueError:
        raise ValueError(f"{short(text)}: {match['hz']} is no number of ticks a second") from None
    latency, pace = match["latency"], match["pace"] or "wait"
    if latency in get_args(Pace) and match["pace"] is None:
        latency, pace = None, latency
    given = None if latency is None else _latencies(latency)
    return Clock(rate, given, pace)  # type: ignore[arg-type]


def _latencies(text: str) -> tuple[Latency, ...]:
    if match := _MS.fullmatch(text):
        try:
            ms = float(match["ms"])
        except ValueError:
            raise ValueError(
                f"latency {short(text)}: write a number of ms, such as 200ms"
            ) from None
        return (Latency(EVERY, ms, ms),)
    return read_latencies(Path(text))


_EVERY, _WARM, _PRUNED = (
    f"replayed.{which}.latency_ms" for which in ("every", "warm_up", "pruned")
)


def read_latencies(path: Path) -> tuple[Latency, ...]:
    """Latencies by condition, from the `report.csv` of a run that was timed, or from JSON.

    JSON maps conditions to ms, or to `{"warm_up": ms, "pruned": ms}`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no latencies, or two that differ for one condition.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no file {path}; expected the report.csv of a run after `vla-pruner latency` "
            "and `vla-pruner report`, or JSON that maps conditions to ms"
        )
    text = path.read_text("utf-8")
    try:
        found = _of_json(json.loads(text)) if path.suffix == ".json" else _of_csv(text)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} holds no latencies of conditions ({error!r})") from error
    if not found:
        raise ValueError(f"{path} holds no latencies; time the run first with `vla-pruner latency`")
    names = [one.condition for one in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"{path} has several latencies of {', '.join(twice)}; use one policy in one suite"
        )
    return tuple(found)


def _of_json(values: Any) -> list[Latency]:
    found = []
    for name, ms in values.items():
        both = ms if isinstance(ms, dict) else {"warm_up": ms, "pruned": ms}
        found.append(Latency(name, float(both["warm_up"]), float(both["pruned"])))
    return found


def _of_csv(text: str) -> list[Latency]:
    found = []
    for row in csv.DictReader(text.splitlines()):
        if every := row.get(_EVERY):
            warm, pruned = row.get(_WARM) or every, row.get(_PRUNED) or every
            found.append(Latency(row["name"], float(warm), float(pruned)))
    return found
