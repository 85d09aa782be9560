"""What scoring and choosing cost inside a pass: time in the rooms that do nothing else.

Hooks call functions of `pruning` for scores, and of a method to decide with them. Which functions
is seen while a step runs, not written down here: whatever a method asks for is timed.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import CodeType, FrameType, FunctionType
from typing import Any

import torch

from vla_pruner.measure.operators import Operators
from vla_pruner.measure.timing import synchronize
from vla_pruner.methods import Method

SCORING, SELECTION = "scoring", "selection"

Where = tuple[str, str]
"""Module and qualified name of a function."""


class Parts:
    """Times a method's own functions, called from outside of them, while `timed` lasts.

    Args:
        method: whose functions, besides those of `vla_pruner.methods`, do its choosing.
        device: is waited for before and after each call.
    """

    def __init__(self, method: Method, device: torch.device) -> None:
        self._own = set(_codes(type(method)))
        self._device = device
        self._found: dict[Where, str] = {}
        self._inside = False
        self._ms: dict[str, float] = {}
        self._ops: dict[str, int] = {}
        self._counter: Operators | None = None

    def discover(self, step: Callable[[], object]) -> None:
        """Run a step, and note which functions the model's hooks call."""
        outer: list[FrameType] = []

        def watch(frame: FrameType, event: str, argument: Any) -> None:
            if event == "call" and not outer:
                if (part := self._part(frame)) is not None:
                    outer.append(frame)
                    where = str(frame.f_globals["__name__"]), frame.f_code.co_qualname
                    self._found[where] = part
            elif event == "return" and outer and frame is outer[-1]:
                outer.pop()

        before = sys.getprofile()
        sys.setprofile(watch)
        try:
            step()
        finally:
            sys.setprofile(before)

    @contextmanager
    def timed(self) -> Iterator[Callable[[], dict[str, float]]]:
        """Inside, what was discovered is timed; the function gives ms by part since it last did."""
        with ExitStack() as undo:
            for (module, qualname), part in self._found.items():
                for owner, name, found in _places(module, qualname):
                    undo.callback(setattr, owner, name, found)
                    setattr(owner, name, self._timed(found, part))
            yield self._take

    def operators(self, step: Callable[[], object]) -> tuple[Operators, dict[str, int]]:
        """What a step runs, and how many operators of it each part."""
        self._ops = {}
        with self.timed() as take, Operators() as counter:
            self._counter = counter
            try:
                step()
            finally:
                self._counter = None
                take()
        return counter, self._ops

    def _part(self, frame: FrameType) -> str | None:
        module = str(frame.f_globals.get("__name__"))
        if (
            module.startswith(("vla_pruner.methods.", "vla_pruner.vla_cache.method"))
            or frame.f_code in self._own
        ):
            return SELECTION
        rooms = ("vla_pruner.pruning.", "vla_pruner.baselines.")
        return SCORING if module.startswith(rooms) else None

    def _timed(self, found: Any, part: str) -> Any:
        """The same function, property, static or class method, timed."""
        if isinstance(found, property):
            assert found.fget is not None
            return property(self._timed(found.fget, part), found.fset, found.fdel, found.__doc__)
        if isinstance(found, staticmethod | classmethod):
            return type(found)(self._timed(found.__func__, part))

        @functools.wraps(found)
        def clocked(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return found(*args, **kwargs)
            self._inside, counter = True, self._counter
            before = 0 if counter is None else counter.count
            synchronize(self._device)
            started = time.perf_counter()
            try:
                return found(*args, **kwargs)
            finally:
                synchronize(self._device)
                spent = 1e3 * (time.perf_counter() - started)
                self._ms[part] = self._ms.get(part, 0.0) + spent
                if counter is not None:
                    self._ops[part] = self._ops.get(part, 0) + counter.count - before
                self._inside = False

        return clocked

    def _take(self) -> dict[str, float]:
        taken, self._ms = self._ms, {}
        return taken


@dataclass(frozen=True)
class Measured:
    """What was found of a pruned step.

    Args:
        ms: what each part took in each timed step; a part that no step has is left out.
        operators: of one whole step.
        by_part: of each part of it.
        waits: for what the host would wait, by operator.
    """

    ms: dict[str, Sequence[float]]
    operators: int
    by_part: dict[str, int]
    waits: dict[str, int]


def measure_parts(
    method: Method,
    step: Callable[[], object],
    device: torch.device,
    *,
    dropped: Callable[[], bool] = lambda: True,
    repeats: int = 3,
    tries: int = 12,
) -> Measured:
    """What the parts of a step cost: `2 + repeats` steps.

    Args:
        method: as the session has it.
        step: makes a step.
        device: of the model.
        dropped: whether the last step dropped tokens; those that did not are not counted.
        repeats: timed steps, after the two in which functions are found and operators counted.
        tries: steps that may go by without one that drops tokens.
    """
    parts = Parts(method, device)
    for _ in range(tries):
        parts.discover(step)
        if dropped():
            break
    for _ in range(tries):
        counter, by_part = parts.operators(step)
        if dropped():
            break
    samples: dict[str, list[float]] = {}
    with parts.timed() as take:
        for _ in range(repeats):
            for _ in range(tries):
                take()
                step()
                if dropped():
                    break
            for part, spent in take().items():
                samples.setdefault(part, []).append(spent)
    return Measured(dict(samples), counter.count, dict(by_part), dict(counter.waits))


def _codes(kind: type) -> Iterator[CodeType]:
    """The code of every function of a class and its bases."""
    for base in kind.__mro__:
        for value in vars(base).values():
            function = getattr(value, "fget", None) or getattr(value, "__func__", value)
            if isinstance(function, FunctionType):
                yield function.__code__


def _places(module: str, qualname: str) -> Iterator[tuple[Any, str, Any]]:
    """Where a function is looked up by those who call it: its class, or modules that import it."""
    *path, name = qualname.split(".")
    if "<locals>" in path or name.startswith("<"):
        return  # It was made by a function that is found itself, or by one outside of the parts.
    home: Any = sys.modules[module]
    for step in path:
        home = getattr(home, step)
    if path:
        if name in vars(home):
            yield home, name, vars(home)[name]
        return
    found = vars(home).get(name)
    for other in list(sys.modules.values()):
        if getattr(other, "__name__", "").startswith("vla_pruner.") or other is home:
            for alias, value in list(vars(other).items()):
                if value is found and callable(value):
                    yield other, alias, value
