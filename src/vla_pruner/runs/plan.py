"""What cells mean on loaded policies, what can be wrong with them, and what is missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from hashlib import sha256
from inspect import signature
from typing import Any

from torch import nn

from vla_pruner._short import cut
from vla_pruner.episodes.condition import Condition
from vla_pruner.measure.doctor import check_budget
from vla_pruner.models.capture import check_method
from vla_pruner.models.loading import load
from vla_pruner.runs.job import Job, Planned, Setup
from vla_pruner.runs.matrix import Cell
from vla_pruner.runs.runner import OpenPolicy
from vla_pruner.runs.store import Store
from vla_pruner.scenes.clock import Clock
from vla_pruner.scenes.scene import Suite


def plan(
    cells: Sequence[Cell],
    suites: Mapping[str, Suite],
    open_policy: OpenPolicy = load,
    control: Mapping[str, Any] | None = None,
) -> dict[Planned, Suite]:
    """What the cells mean, after all that can be wrong with them has been checked.

    Args:
        cells: the matrix.
        suites: by the names that the cells use.
        open_policy: loads a policy by name; each is loaded once.
        control: overrides how policies are driven, see `Control.of`.

    Raises:
        ValueError: cells that cannot be run; the message names each of them, and why.
    """
    found: dict[Cell, Planned] = {}
    problems: dict[str, str] = {}
    for cell in cells:  # what needs no policy comes before any is loaded
        try:
            suites[cell.suite].held_out(cell.episodes, cell.first)  # Raises: not so many.
        except ValueError as error:
            problems[str(cell)] = str(error)
    if problems:
        raise ValueError(_cannot_run(problems))
    for name in dict.fromkeys(cell.policy for cell in cells):
        own = [cell for cell in cells if cell.policy == name]
        try:
            policy = open_policy(name)
        except _REFUSALS as error:
            problems[f"policy {name}"] = str(error)
            continue
        for suite in dict.fromkeys(cell.suite for cell in own):
            try:
                setup = Setup.of(name, policy, suites[suite], **(control or {}))
            except _REFUSALS as error:
                problems[f"{name} in {suite}"] = str(error)
                continue
            for cell in (cell for cell in own if cell.suite == suite):
                try:
                    found[cell] = _planned(cell, setup, policy, suites[suite])
                except _REFUSALS as error:
                    problems[str(cell)] = str(error)
    if problems:
        raise ValueError(_cannot_run(problems))
    return {found[cell]: suites[cell.suite] for cell in cells}


_REFUSALS = (ValueError, TypeError, NotImplementedError, OSError)
_SHOWN = 8


def _planned(cell: Cell, setup: Setup, policy: nn.Module, suite: Suite) -> Planned:
    if suite.clock is not None:
        _check_clock(suite.clock, cell.condition, policy)
    if setup.captured and cell.condition.keep is not None:
        check_method(cell.condition.build())
    settings, recipe = settings_of(cell.condition, policy)
    return Planned(setup, cell.condition, settings, recipe, cell.first, cell.episodes)


def _check_clock(clock: Clock, condition: Condition, policy: nn.Module) -> None:
    if clock.latencies is not None:
        clock.latency_of(condition.name)  # Raises: they do not tell.
    takes = signature(getattr(policy, "predict_action", policy.forward)).parameters
    if clock.pace.startswith("rtc") and "guide" not in takes:
        raise ValueError(
            f"--pace {clock.pace}: {type(policy).__name__} cannot continue a chunk: its "
            "`predict_action` takes no `guide`; flow policies (pi0) do. Use --pace ahead"
        )


def _cannot_run(problems: Mapping[str, str]) -> str:
    lines = [f"{what}: {cut(why, 1000)}" for what, why in problems.items()]
    if len(lines) == 1:
        return f"{lines[0]} (nothing was run)"
    more = [f"... and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    return "\n  ".join(
        [f"{len(lines)} things cannot be run, so nothing was:", *lines[:_SHOWN], *more]
    )


def settings_of(condition: Condition, policy: nn.Module) -> tuple[dict[str, Any], str | None]:
    """All options of the method on this policy, and the digest of the recipe that it follows."""
    session = condition.attach(policy)
    if session is None:
        return {}, None
    method = session.method
    try:
        check_budget(session)
    finally:
        session.remove()
    settings = {f.name: getattr(method, f.name) for f in fields(method) if f.init}
    recipe = settings.pop("recipe", None)
    digest = None
    if recipe is not None:
        said = repr((recipe.method, recipe.keep, recipe.model, sorted(recipe.values.items())))
        digest = sha256(said.encode()).hexdigest()[:12]
    return settings, digest


def missing_jobs(planned: Mapping[Planned, Suite], store: Store, *, record: int = 0) -> list[Job]:
    """What is left to run: scene by scene, under all conditions, each scene in another order.

    Neighbours in time are thus the same scene, and no condition always comes first. The first
    `record` scenes of each are recorded.
    """
    groups: dict[tuple[str, str], list[Planned]] = {}
    for item in planned:
        groups.setdefault((item.setup.suite, item.setup.policy), []).append(item)
    jobs = []
    for items in groups.values():
        suite, setup = planned[items[0]], items[0].setup
        done = store.finished(setup)
        seeds = {item: suite.held_out(item.episodes, item.first) for item in items}
        for number, seed in enumerate(sorted(set().union(*seeds.values()))):
            present = [item for item in items if seed in seeds[item]]
            turn = number % len(present)
            jobs += [
                Job(item, suite, seed, record=seed in seeds[item][:record])
                for item in present[turn:] + present[:turn]
                if (item.condition.name, seed) not in done
            ]
    return jobs
