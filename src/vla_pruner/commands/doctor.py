"""`vla-pruner doctor`: does a model see its images, and can it be pruned faithfully?"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table
from torch import nn

from vla_pruner._arguments import a_path
from vla_pruner.commands.shared.options import add_device, device_of
from vla_pruner.episodes.control import said_by
from vla_pruner.measure.doctor import Finding, act_of, examine
from vla_pruner.measure.environment import stamp
from vla_pruner.measure.preflight import preflight
from vla_pruner.models.base import find_adapter
from vla_pruner.models.loading import DTYPES, load, locate, shipped
from vla_pruner.runs.job import fingerprint
from vla_pruner.tuning.receipt import Receipt, load_receipt


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `vla-pruner doctor`."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help=f"a policy that ships here ({', '.join(shipped())}), or a folder or hub id of an "
        "OpenVLA, OpenVLA-OFT, pi0 or vision-language model",
    )
    add_device(parser)
    parser.add_argument("--dtype", choices=DTYPES, help="default: as stored")
    parser.add_argument("--keep", type=float, default=0.25, help="fraction kept when dropping")
    parser.add_argument(
        "--receipt", type=a_path, help="of `vla-pruner tune`: is it of this model and this machine?"
    )
    parser.add_argument("--instruction", default="pick up the can", help="what the model is told")


def run(args: argparse.Namespace) -> int:
    """Examine and report; 1 if something is wrong."""
    if not 0 < args.keep <= 1:
        raise ValueError(f"--keep {args.keep:g}: expected a fraction in (0, 1]")
    if args.receipt is not None:
        load_receipt(args.receipt)  # Raises: it cannot be read.
    device, console = device_of(args.device), Console()
    with console.status(f"loading {args.model}") as status:
        model = load(args.model, device=device, dtype=args.dtype)
        act = act_of(model, args.model, args.instruction)
        findings = examine(
            model, act, keep=args.keep, tick=lambda check: status.update(f"checking: {check}")
        )
        if findings[0].well:
            status.update("checking: conventions")
            folder = Path(locate(args.model))
            folder_of = folder if folder.is_dir() else None
            adapter = find_adapter(model)
            adapter.bind(model)
            findings += preflight(model, adapter, act, said_by(folder_of), folder_of)
    if args.receipt is not None:
        findings.append(_of_receipt(load_receipt(args.receipt), model, str(device)))
    wrong = sum(finding.well is False for finding in findings)
    table = Table("check", "", "found", "a mistake costs", *(["what to do"] if wrong else []))
    marks = {True: "[green]pass[/green]", False: "[red]FAIL[/red]", None: "skipped"}
    for finding in findings:
        cells = (finding.check, marks[finding.well], finding.found, finding.cost, finding.advice)
        table.add_row(*cells[: len(table.columns)])
    console.print(table)
    versions = ", ".join(f"{key} {value}" for key, value in stamp(device).items() if value)
    console.print(versions, style="dim", highlight=False)
    if wrong:
        console.print(f"[red]{wrong} of {len(findings)} checks failed[/red]")
        return 1
    console.print("[green]nothing wrong found[/green]")
    return 0


def _of_receipt(receipt: Receipt, model: nn.Module, device: str) -> Finding:
    """Whether a receipt of `vla-pruner tune` holds for this model, here."""
    found = f"{receipt.recommended} within a deviation of {receipt.tolerance:g}"
    try:
        receipt.check(fingerprint(model))
    except ValueError as error:
        return Finding("receipt", False, found, str(error))
    if other := receipt.differences(device):
        found += f"; latencies are of another machine: {', '.join(other)}"
    return Finding("receipt", True, found)
