"""Whether runs gave the same episodes, one for one, and where those that differ part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from vla_pruner.episodes.episode import Episode
from vla_pruner.episodes.policy_runner import Call
from vla_pruner.reports.compare import Group, read_runs
from vla_pruner.reports.document import Block, Heading, Items, Table, Text

_SHOWN = 10


@dataclass(frozen=True)
class Pairs:
    """Episodes of one condition that two runs have in common.

    Args:
        title: policy and suite.
        label: the condition, for people.
        common: number of scenes that both have finished.
        differences: by scene, where the two episodes part.
    """

    title: str
    label: str
    common: int
    differences: dict[int, str]


def parting(first: Episode, second: Episode) -> str | None:
    """Where two episodes part, latencies apart; None: nowhere.

    Raises:
        ValueError: an episode without the digests that tell.
    """
    calls = [*first.calls, *second.calls]
    if not all(call.saw and call.did for call in calls):
        raise ValueError(
            f"scene {first.seed} was run by a version that kept no digests of what a policy saw "
            "and did; run it again"
        )
    if (first.target, first.instruction) != (second.target, second.instruction):
        return "another task"
    for number, (one, other) in enumerate(zip(first.calls, second.calls, strict=False), start=1):
        if one.saw != other.saw:
            return f"from call {number} on the policy saw something else"
        if one.did != other.did:
            return f"in call {number} the policy saw the same and did something else"
        for field in fields(Call):
            if field.name != "latency_ms" and (
                getattr(one, field.name) != getattr(other, field.name)
            ):
                return f"in call {number} {field.name} differs"
    ends = [(episode.success, episode.steps, len(episode.calls)) for episode in (first, second)]
    return None if ends[0] == ends[1] else "the same calls, another end"


def compare_runs(first: str | Path, second: str | Path) -> list[Pairs]:
    """The episodes that two runs have in common, condition by condition.

    Raises:
        FileNotFoundError, ValueError: a folder without episodes, runs of different weights or
            control, or without a common episode.
    """
    before = {(group.setup.policy, group.setup.suite): group for group in read_runs([first])}
    found = []
    for group in read_runs([second]):
        partner = before.get((group.setup.policy, group.setup.suite))
        if partner is None:
            continue
        if partner.setup != group.setup:
            mine, other = group.setup.as_dict(), partner.setup.as_dict()
            names = ", ".join(name for name in mine if mine[name] != other[name])
            raise ValueError(f"{group.title}: {first} and {second} differ in {names}")
        found += _pairs(partner, group)
    if not any(pairs.common for pairs in found):
        raise ValueError(f"{first} and {second} have no episode in common")
    return found


def _pairs(before: Group, after: Group) -> list[Pairs]:
    partners = {(episode.condition, episode.seed): episode for episode in before.episodes}
    found = []
    for condition in after.conditions:
        own = [
            episode
            for episode in after.episodes
            if episode.condition == condition.name and (condition.name, episode.seed) in partners
        ]
        parted = {
            episode.seed: where
            for episode in own
            if (where := parting(partners[condition.name, episode.seed], episode))
        }
        found.append(Pairs(after.title, condition.label, len(own), parted))
    return found


def blocks_of(found: Sequence[Pairs]) -> list[Block]:
    """A table, and the first episodes that differ."""
    rows = [
        [pairs.title, pairs.label, str(pairs.common), str(pairs.common - len(pairs.differences))]
        for pairs in found
        if pairs.common
    ]
    header = ["policy and suite", "condition", "episodes of both", "identical"]
    blocks: list[Block] = [
        Heading("Episodes run twice", 1),
        Table("Episodes run twice", header, rows),
        Text(
            "Identical: every image and state that the policy was given, every action that it "
            "answered, and all counts are the same, call for call; latencies are left out."
        ),
    ]
    parted = [
        f"{pairs.title}, {pairs.label}, scene {seed}: {where}"
        for pairs in found
        for seed, where in pairs.differences.items()
    ]
    if parted:
        more = [f"and {len(parted) - _SHOWN} more"] if len(parted) > _SHOWN else []
        blocks.append(Items([*parted[:_SHOWN], *more]))
    return blocks
