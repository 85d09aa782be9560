"""What was tested on which family: the table that the tests write, read and rendered."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

FILE = Path(__file__).parent / "tested.json"

CHECKS = {
    "reference": "dropping tokens equals hiding them behind the cut, fp32, to 1e-5",
    "undo": "the model is what it was after the session",
    "keep=1.0": "keeping everything changes nothing, to the bit",
    "batch": "several episodes in one batch",
    "padding": "padded instructions",
    "cameras": "several cameras",
    "missing": "a missing camera",
    "no cache": "one pass, or all of them again for each token",
    "dynamic": "dynamic cache, or the policy's own",
    "static": "static cache",
    "compile": "torch.compile(fullgraph=True)",
}
"""Columns of the table, and what a mark in them means."""


@dataclass
class Row:
    """What the tests showed of one class.

    Args:
        family: a name of `vp.list_models()`, or "decoder" for `vp.models.Decoder`.
        model: the class.
        double: whether it is one of our own that stands for a class that cannot be installed.
        tests: for each check that passed, the tests that showed it.
        versions: packages it was tested with, the last time with this version of lerobot.
    """

    family: str
    model: str
    double: bool
    tests: dict[str, list[str]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, bool, str]:
        """What tells rows apart; the classes of two versions of lerobot are two classes."""
        return self.family, self.model, self.double, self.versions.get("lerobot", "")


def read(file: Path = FILE) -> list[Row]:
    """The rows of the table; none if it was never written."""
    if not file.is_file():
        return []
    return [Row(**row) for row in json.loads(file.read_text(encoding="utf-8"))]


def write(rows: list[Row], file: Path = FILE) -> None:
    """Put rows into the table: each replaces the one with the same key, others stay."""
    merged = {row.key: row for row in [*read(file), *rows]}
    found = [asdict(row) for _, row in sorted(merged.items())]
    file.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def cells(row: Row) -> list[str]:
    """The row as text, in the order of `heads`."""
    marks = ["yes" if check in row.tests else "-" for check in CHECKS]
    return [row.family, row.model, "double" if row.double else "real", *marks, _said(row.versions)]


def heads() -> list[str]:
    """Names of the columns."""
    return ["family", "class", "tested on", *CHECKS, "versions"]


def markdown(rows: list[Row], summaries: Mapping[str, str]) -> str:
    """The page `docs/models.md`.

    Args:
        rows: the table.
        summaries: what each family covers.
    """
    usual = Counter(_said(row.versions) for row in rows).most_common(1)
    common = usual[0][0] if usual else ""
    shown = [
        [*cells(row)[:-1], "" if _said(row.versions) == common else cells(row)[-1]] for row in rows
    ]
    lines = [
        "# Models",
        "",
        "Written by `vla-pruner models --markdown` from what the tests recorded; do not edit.",
        "",
        "| family | what it covers |",
        "|---|---|",
        *(f"| {name} | {summary} |" for name, summary in summaries.items()),
        "",
        "## What was tested",
        "",
        "Tiny models with random weights. *real*: the class of its own package. *double*: a small",
        "class of ours with the same names, structure and calls, where the real one cannot be",
        "installed. A dash: no test says so, which does not mean that it fails.",
        f"Where the last column is empty: {common}.",
        "",
        *(f"* **{check}**: {meaning}" for check, meaning in CHECKS.items()),
        "",
        "| " + " | ".join(heads()) + " |",
        "|" + "---|" * len(heads()),
        *("| " + " | ".join(row) + " |" for row in shown),
    ]
    return "\n".join(lines) + "\n"


def _said(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())
