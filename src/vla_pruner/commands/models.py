"""`vla-pruner models`: the model families, and what was tested on each."""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.table import Column, Table

from vla_pruner.commands.shared.options import pick
from vla_pruner.models import list_models, matrix
from vla_pruner.models.base import built_in
from vla_pruner.models.loading import shipped


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `vla-pruner models`."""
    parser.add_argument("name", nargs="?", help="tell more about this one")
    parser.add_argument(
        "--markdown", action="store_true", help="print the page docs/models.md instead"
    )


def run(args: argparse.Namespace) -> int:
    """Print the families, or one, or the page of the documentation."""
    if args.markdown:
        if args.name is not None:
            raise ValueError("--markdown is the page of all families; leave the name out")
        summaries = {family.name: family.summary for family in built_in()}
        print(matrix.markdown(matrix.read(), summaries), end="")
        return 0
    console, known = Console(), list_models()
    chosen = known if args.name is None else {args.name: pick(args.name, known, "model family")}
    table = Table("family", "what it covers")
    for name, family in chosen.items():
        table.add_row(name, family.summary)
    console.print(table)
    rows = [row for row in matrix.read() if args.name in (None, row.family)]
    tested = Table(Column("class", no_wrap=True), "tested on", "what was tested", "with")
    for row in rows:
        _, model, on, *_, versions = matrix.cells(row)
        tested.add_row(model, on, ", ".join(c for c in matrix.CHECKS if c in row.tests), versions)
    console.print(tested)
    console.print("What the checks mean: docs/models.md", style="dim")
    if args.name is None:
        console.print(f"Policies that ship with this package: {', '.join(shipped()) or 'none'}")
    return 0
