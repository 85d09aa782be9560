"""One way of running a policy: which method, how much it keeps; `none` is all tokens."""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from vla_pruner._short import cut, short
from vla_pruner.core.session import Session
from vla_pruner.methods import Method, build, parse
from vla_pruner.models.capture import capture_policy
from vla_pruner.models.port import share
from vla_pruner.models.prune import prune

ALL_TOKENS = "none"
"""Name of the condition without pruning, the baseline of every comparison."""

_captured: weakref.WeakKeyDictionary[nn.Module, dict[str, tuple[nn.Module, Session]]] = (
    weakref.WeakKeyDictionary()
)


@dataclass(frozen=True)
class Condition:
    """One way of running a policy.

    Args:
        method: name of a pruning method, or MODULE:CLASS; "none" leaves the model untouched.
        keep: fraction of the visual tokens in (0, 1], or their number; None with "none".
        options: further options of the method, as names and values.
    """

    method: str = ALL_TOKENS
    keep: float | int | None = None
    options: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        options = tuple((name, _hashable(value)) for name, value in self.options)
        object.__setattr__(self, "options", options)
        if (self.method == ALL_TOKENS) != (self.keep is None):
            raise ValueError(
                f"condition {short(self.name)}: write 'none', or a method with what it keeps, such "
                "as 'vla-pruner@0.25'"
            )

    @classmethod
    def parse(cls, text: str) -> Condition:
        """The condition called "none", "vla-pruner@0.25" (a fraction) or "fastv@64" (a number).

        Options of the method follow after colons: "vla-pruner@0.25:window=1:first=nearest".

        Raises:
            ValueError: anything else, an unknown method or option, or an impossible budget.
        """
        method, at, rest = text.strip().partition("@")
        try:
            # What stands before '@' may hold a colon: MODULE:CLASS.
            _, options = parse(f"{method.partition(':')[0]}{at}{rest}")
        except ValueError as error:
            raise ValueError(f"condition {cut(str(error), 300)}") from None
        keep = options.pop("keep", None)
        condition = cls(method, keep, tuple(options.items()))
        condition.build()  # Raises: no such method or option.
        return condition

    @property
    def name(self) -> str:
        """The condition as `parse` reads it."""
        options = "".join(f":{name}={_written(value)}" for name, value in self.options)
        return self.method if self.keep is None else f"{self.method}@{self.keep}{options}"

    @property
    def label(self) -> str:
        """The condition for people."""
        if self.keep is None:
            return "all tokens"
        amount = f"{100 * self.keep:g} %" if isinstance(self.keep, float) else f"{self.keep} tokens"
        options = "".join(f", {name} {_written(value)}" for name, value in self.options)
        return f"{self.method}, {amount}{options}"

    def attach(self, policy: nn.Module) -> Session | None:
        """The session that brings the condition about; None leaves the model untouched."""
        return None if self.keep is None else prune(policy, self.build())

    @contextmanager
    def attached(
        self, policy: nn.Module, *, captured: str = ""
    ) -> Iterator[tuple[Any, Session | None]]:
        """The policy under this condition, and its session, which ends with the block.

        With `captured`, a backend, whole steps are compiled: the policy is then a copy over the
        same weights, which is kept with its graphs for the next time.

        Raises:
            TypeError, NotImplementedError: this policy or method cannot be captured.
        """
        if captured:
            own, session = self._captured(policy, captured)
            session.reset()
            yield own, session
            return
        session_now = self.attach(policy)
        try:
            yield policy, session_now
        finally:
            if session_now is not None:
                session_now.remove()

    def _captured(self, policy: nn.Module, backend: str) -> tuple[nn.Module, Session]:
        known = _captured.setdefault(policy, {})
        if self.name not in known:
            own = share(policy)
            session = self.attach(own) or prune(own, ALL_TOKENS)
            capture_policy(own, backend)
            known[self.name] = own, session
        return known[self.name]

    def build(self) -> Method:
        """The method with its options.

        Raises:
            ValueError: there is no such method, or an option that it does not take.
        """
        return make_method(self.method, keep=self.keep, **dict(self.options))


def make_method(method: str | Method, **options: Any) -> Method:
    """A method from its name, or from the class that MODULE:CLASS names.

    Args:
        method: as `vla-pruner methods` lists them, MODULE:CLASS of a subclass of `Method`, or an
            instance, which takes no options.
        options: fields of the method; None leaves an option at its default.

    Raises:
        ValueError: there is no such method, or an option that it does not take.
    """
    if not isinstance(method, str) or ":" not in method:
        return build(method, **options)
    module, _, name = method.partition(":")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except (ImportError, ValueError, TypeError) as error:
        raise ValueError(f"method {short(method)}: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Method)):
        what = f"has no {short(name)}" if found is None else f"has {short(found)} there"
        raise ValueError(
            f"method {short(method)}: module {module} {what}; expected a subclass of "
            "vla_pruner.methods.Method"
        )
    given = {key: value for key, value in options.items() if value is not None}
    try:
        return found(**given)
    except TypeError as error:
        raise ValueError(f"method {short(method)}: {error}") from error


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _written(value: Any) -> str:
    """A value as a condition spells it: one word, without spaces."""
    if isinstance(value, tuple):
        return "(" + ",".join(map(str, value)) + ("," if len(value) == 1 else "") + ")"
    return str(value)
