"""`vla-pruner methods`: the pruning methods, or the options of one."""

from __future__ import annotations

import argparse
import inspect
import re
from dataclasses import MISSING, Field, fields
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from vla_pruner.commands.shared.options import pick
from vla_pruner.episodes.condition import make_method
from vla_pruner.methods import Method, list_methods


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `vla-pruner methods`."""
    parser.add_argument("name", nargs="?", help="tell more about this one; also MODULE:CLASS")


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
    own = ":" in args.name
    method = type(make_method(args.name)) if own else pick(args.name, known, "method")
    console.print(f"[bold]{args.name}[/bold]: {method.summary}", highlight=False)
    if method.paper:
        console.print(method.paper)
    console.print(f"licence: {method.licence}", highlight=False)
    table = Table(Column("option", no_wrap=True), "default", "what it does")
    explained = explain(method)
    for option in fields(method):
        if option.init:
            default = _shown(option)
            table.add_row(option.name, Text(default), Text(explained.get(option.name, "-")))
    console.print(table)
    console.print(f"On the command line: {args.name}@0.25:OPTION=VALUE", style="dim", markup=False)
    console.print(f'vp.prune(model, "{args.name}", keep=0.25)', style="dim", highlight=False)
    return 0


def explain(method: type[Method]) -> dict[str, str]:
    """What each option does, from the `Args:` of the class and of those that it inherits from."""
    found: dict[str, str] = {}
    for kind in reversed(method.__mro__):
        lines = inspect.cleandoc(vars(kind).get("__doc__") or "").splitlines()
        if "Args:" not in lines:
            continue
        names: list[str] = []
        for line in lines[lines.index("Args:") + 1 :]:
            if line and not line.startswith(" "):
                break
            start = re.fullmatch(r" {4}(\w+(?:, \w+)*): (.*)", line)
            if start is not None:
                names = start[1].split(", ")
                found |= dict.fromkeys(names, start[2].strip())
            elif line.strip() and names:
                text = f"{found[names[0]]} {line.strip()}"
                found |= dict.fromkeys(names, text)
    return found


def _shown(option: Field[Any]) -> str:
    """The default of an option."""
    return "(needed)" if option.default is MISSING else repr(option.default)
