"""How far a command is: a bar in a terminal, lines where the output goes to a file."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar

from vla_pruner.episodes.episode import Episode
from vla_pruner.runs.execute import Progress
from vla_pruner.runs.job import Job, Planned

EVERY_S = 60.0
"""Seconds after which a command without a terminal says how far it is."""


class Lines:
    """What a bar tells, in lines: the first time, once a minute, and at the end.

    Used as the bar is, in a `with` block.

    Args:
        console: where they go.
        every_s: seconds between them.
    """

    def __init__(self, console: Console, every_s: float = EVERY_S) -> None:
        self._console, self._every_s = console, every_s

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass

    def add_task(self, description: str, total: float | None, completed: int = 0) -> TaskID:
        """Begin something that takes `total` steps (None: not known yet)."""
        self._description, self._total, self._done = description, total, completed
        self._said = time.monotonic()
        if total is not None:
            self._say()
        return TaskID(0)

    def update(self, task: TaskID, *, total: float) -> None:
        """How many steps there are."""
        self._total = total
        self._say()

    def advance(self, task: TaskID) -> None:
        """One more step."""
        self._done += 1
        if self._done == self._total or time.monotonic() - self._said >= self._every_s:
            self._said = time.monotonic()
            self._say()

    def _say(self) -> None:
        of = "" if self._total is None else f" of {self._total:g}"
        say(self._console, f"{self._description}: {self._done}{of}")


def progress_bar(console: Console) -> Bar | Lines:
    """A bar for episodes, with the time that is left; lines where nobody watches it."""
    return bar(console) if console.is_terminal else Lines(console)


def bar(console: Console) -> Bar:
    """A bar for episodes, with the time that is left."""
    return Bar(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("elapsed,"),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=console,
        transient=True,
    )


def say(console: Console, text: str) -> None:
    """A line, as it is, at once."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)
    console.file.flush()


class RunProgress(Progress):
    """A bar of all episodes of a run; without a terminal a line per cell, and one a minute.

    Used in a `with` block, at whose end the bar disappears.

    Args:
        console: where it is shown.
        every_s: seconds between lines on episodes.
    """

    def __init__(self, console: Console, every_s: float = EVERY_S) -> None:
        self._console, self._every_s = console, every_s
        self._bar = bar(console) if console.is_terminal else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def planned(self, cells: Sequence[Planned], missing: Sequence[Job]) -> None:
        """Show what there is to do."""
        self._total = sum(item.episodes for item in cells)
        self._done = self._total - len(missing)
        self._missing, self._ran = len(missing), 0
        self._cells, self._finished = len({job.planned for job in missing}), 0
        self._started = self._said = time.monotonic()
        if self._bar is not None:
            self._line = self._bar.add_task("episodes", total=self._total, completed=self._done)
            self._bar.start()
        else:
            there = f", {self._done} of them there already" if self._done else ""
            say(self._console, f"{self._total} episodes in {len(cells)} cells{there}")

    def finished(self, job: Job, episode: Episode) -> None:
        """One more."""
        self._done += 1
        self._ran += 1
        if self._bar is not None:
            self._bar.advance(self._line)
        elif (now := time.monotonic()) - self._said >= self._every_s:
            self._said = now
            left = (now - self._started) / self._ran * (self._missing - self._ran)
            say(
                self._console,
                f"{self._done} of {self._total} episodes, about {_duration(left)} left",
            )

    def cell_finished(self, item: Planned, solved: int, episodes: int) -> None:
        """A line, where nobody watches a bar."""
        self._finished += 1
        if self._bar is None:
            setup = item.setup
            say(
                self._console,
                f"{setup.policy} in {setup.suite}, {item.condition.name}: {solved} of {episodes} "
                f"solved ({self._finished} of {self._cells} cells, {self._done} of {self._total} "
                f"episodes, {_duration(time.monotonic() - self._started)})",
            )


def _duration(seconds: float) -> str:
    """Seconds for people."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
