"""`vla-pruner methods`: the pruning methods, or the options of one."""

from __future__ import annotations

import argparse
from dataclasses import fields

from rich.console import Console
from rich.table import Column, Table

from vla_pruner.commands.options import pick
from vla_pruner.methods import list_methods


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `vla-pruner methods`."""
    parser.add_argument("name", nargs="?", help="tell more about this one")


def run(args: argparse.Namespace) -> int:
    """Print the list, or what one of them takes."""
    console, known = Console(), list_methods()
    if args.name is None:
        table = Table(Column("method", no_wrap=True), "what it keeps", "from", "licence")
        for name, method in known.items():
            paper = (method.paper or "").removeprefix("https://").replace("/abs/", "/abs/\n")
            table.add_row(name, method.summary, paper, method.licence)
        console.print(table)
        console.print("Options of one method: vla-pruner methods NAME", style="dim")
        return 0
    method = pick(args.name, known, "method")
    console.print(f"[bold]{args.name}[/bold]: {method.summary}", highlight=False)
    if method.paper:
        console.print(method.paper)
    console.print(f"licence: {method.licence}", highlight=False)
    table = Table("option", "type", "default")
    for option in fields(method):
        table.add_row(option.name, str(option.type), repr(option.default))
    console.print(table)
    console.print(f'vp.prune(model, "{args.name}", keep=0.25)', style="dim", highlight=False)
    return 0
