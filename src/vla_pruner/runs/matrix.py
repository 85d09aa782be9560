"""The matrix of a sweep: its cells, and the YAML file that describes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vla_pruner._short import cut, short, word
from vla_pruner._yaml import read_yaml
from vla_pruner.episodes.condition import Condition


@dataclass(frozen=True)
class Cell:
    """One cell of the matrix.

    Args:
        policy: name or folder.
        suite: name.
        condition: what is done to the policy.
        episodes: number of scenes.
        first: number of the first held-out scene.
    """

    policy: str
    suite: str
    condition: Condition
    episodes: int
    first: int = 0

    def __str__(self) -> str:
        return f"{self.policy} in {self.suite}, {self.condition.name}"


_KEYS = ("policies", "suites", "keep", "methods", "conditions", "episodes", "seed")


def read_config(path: str | Path) -> list[Cell]:
    """The cells of a sweep's file; docs/evaluating.md describes it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not YAML, or says something that is not understood.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; docs/evaluating.md shows what it holds")
    found = read_yaml(path)
    try:
        return read_matrix(found)
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_matrix(values: Any) -> list[Cell]:
    """The cells that a sweep's file describes.

    Raises:
        ValueError: something is missing, unknown or impossible.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"expected the entries {', '.join(_KEYS)}; got {type(values).__name__}")
    if unknown := [word(key) for key in values if key not in _KEYS]:
        named = cut(", ".join(unknown), 200)
        raise ValueError(f"unknown entry {named}; there are {', '.join(_KEYS)}")
    policies, suites = (_names(values, key) for key in ("policies", "suites"))
    default, first = _counts(values.get("episodes", 50), suites), values.get("seed", 0)
    wanted: dict[str, tuple[Condition, dict[str, int]]] = {}
    for text, episodes in [*_method_conditions(values), *_listed_conditions(values)]:
        condition = Condition.parse(text)
        if condition.name in wanted:
            raise ValueError(f"condition {condition.name} is asked for twice")
        counts = default if episodes is None else _counts(episodes, suites)
        wanted[condition.name] = condition, counts
    if not wanted:
        raise ValueError("nothing to run: name `methods` or `conditions`")
    if not isinstance(first, int) or isinstance(first, bool) or first < 0:
        raise ValueError(f"seed: {short(first)} must be the number of a held-out scene, from 0")
    return [
        Cell(policy, suite, condition, counts[suite], first)
        for suite in suites
        for policy in policies
        for condition, counts in wanted.values()
    ]


def _names(values: Mapping[str, Any], key: str) -> list[str]:
    found = values.get(key)
    names = [found] if isinstance(found, str) else found
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise ValueError(f"{key}: expected a list of names, got {short(found)}")
    if len(set(names)) < len(names):
        raise ValueError(f"{key}: a name is there twice")
    return names


def _counts(value: Any, suites: Sequence[str]) -> dict[str, int]:
    """Scenes by suite, from one number for all or from one for each."""
    counts = dict(value) if isinstance(value, Mapping) else dict.fromkeys(suites, value)
    if set(counts) != set(suites):
        wanted = ", ".join(suites)
        raise ValueError(f"episodes: expected a number for each of {wanted}; got {short(value)}")
    for count in counts.values():
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ValueError(f"episodes: {short(count)} must be a number of scenes, at least 1")
    return counts


def _method_conditions(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """`methods`: each with every ratio of `keep`, unless it has its own."""
    methods = values.get("methods") or {}
    if isinstance(methods, list) and all(isinstance(name, str) for name in methods):
        if len(set(methods)) < len(methods):
            raise ValueError("methods: a name is there twice")
        methods = dict.fromkeys(methods)
    if not isinstance(methods, Mapping):
        raise ValueError(f"methods: expected names, got {short(methods)}")
    for name, own in methods.items():
        own = own or {}
        if not isinstance(own, Mapping) or not set(own) <= {"keep", "episodes", "options"}:
            raise ValueError(
                f"methods: {word(name)} may say keep, episodes and options; got {short(own)}"
            )
        options = own.get("options") or {}
        if not isinstance(options, Mapping):
            raise ValueError(f"methods: {name} has options {short(options)}; expected name: value")
        suffix = "".join(f":{key}={_scalar(name, value)}" for key, value in options.items())
        keeps = own.get("keep", values.get("keep"))
        if name == "none":
            yield "none", own.get("episodes")
            continue
        if keeps is None or keeps == []:
            raise ValueError(f"methods: {word(name)} has no `keep`, such as [0.5, 0.25]")
        for keep in keeps if isinstance(keeps, list) else [keeps]:
            yield f"{name}@{_scalar(name, keep)}{suffix}", own.get("episodes")


def _scalar(name: str, value: Any) -> str:
    """A value as a condition spells it: one word, or a list of such."""
    parts = value if isinstance(value, list) and len(value) <= 1000 else [value]
    if not all(isinstance(part, str | int | float) for part in parts):
        raise ValueError(f"methods: {word(name)} says {short(value)}; expected a number or a word")
    return str(value)


def _listed_conditions(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """`conditions`: names as everywhere, with their number of episodes if it is another."""
    for entry in values.get("conditions") or []:
        if isinstance(entry, str):
            yield entry, None
        elif isinstance(entry, Mapping) and len(entry) == 1:
            yield from ((_scalar("a condition", n), episodes) for n, episodes in entry.items())
        else:
            raise ValueError(
                f"conditions: {short(entry)} must be a name such as vla-pruner@0.25, or a name and "
                "its episodes such as `vla-pruner@0.25: 100`"
            )
