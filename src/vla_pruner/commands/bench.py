"""`vla-pruner bench`: arguments, progress, the table, and the files it is written to."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vla_pruner._arguments import a_path, at_least
from vla_pruner.commands.shared.options import (
    add_capture,
    add_device,
    add_keeps,
    add_methods,
    check_capture,
    device_of,
    keep_of,
    words_of,
)
from vla_pruner.commands.shared.output_folder import check_file
from vla_pruner.commands.shared.progress import progress_bar
from vla_pruner.episodes.condition import ALL_TOKENS, Condition, make_method
from vla_pruner.measure.comparison import (
    Comparison,
    VariantRow,
    compare,
    ideals_of,
    steps_to_prepare,
)
from vla_pruner.measure.parts import SCORING, SELECTION
from vla_pruner.measure.timing import keep_freed_memory
from vla_pruner.measure.workloads import PUBLISHED, build_workload
from vla_pruner.methods import Method
from vla_pruner.models.loading import DTYPES

SUFFIXES = (".json", ".md")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `vla-pruner bench`."""
    parser.add_argument(
        "--model",
        default="openvla-oft-7b",
        help=f"{', '.join(PUBLISHED)} (published sizes, random weights), a policy that ships "
        "with the package (such as mini-oft), or a folder or hub id of a checkpoint",
    )
    add_methods(parser, ["vla-pruner"])
    add_keeps(parser, ["0.5", "0.25", "0.125"])
    parser.add_argument(
        "--layer", type=at_least(0), help="layers that see every token (default: each method's own)"
    )
    add_device(parser)
    parser.add_argument("--repeats", type=int, help="rounds (default: 5 on the CPU, 30 on a GPU)")
    parser.add_argument(
        "--layers",
        type=at_least(1),
        help="decoder layers to build, for published sizes (default: 8 on the CPU, all on a GPU)",
    )
    parser.add_argument(
        "--vision",
        action=argparse.BooleanOptionalAction,
        help="real vision towers, or toy ones so that the language model is what is measured "
        "(default: real ones on a GPU)",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="default: bf16 for published sizes (fp32 on a CPU without AVX-512), else as stored",
    )
    parser.add_argument("--compile", action="store_true", help="compile every variant's decoder")
    add_capture(parser)
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's own choice)")
    parser.add_argument(
        "--out",
        type=a_path,
        action="append",
        default=[],
        metavar="FILE",
        help="write the result to FILE.json or, as a table, to FILE.md; may be given twice",
    )


def run(args: argparse.Namespace) -> int:
    """Measure, print and write."""
    device = device_of(args.device)
    check_capture(args.capture)
    on_gpu = device.type == "cuda"
    repeats = args.repeats if args.repeats is not None else 30 if on_gpu else 5
    if repeats < 1:
        raise ValueError(f"--repeats {repeats}: at least one round is needed")
    for path in args.out:
        if path.suffix not in SUFFIXES:
            raise ValueError(f"--out {path}: the name must end in {' or '.join(SUFFIXES)}")
        check_file(path)
    if args.compile and args.capture:
        raise ValueError("--compile: --capture compiles the decoder, too; give one of them")
    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"--threads {args.threads}: at least one thread is needed")
        torch.set_num_threads(args.threads)
    keep_freed_memory()
    named = variants_of(words_of("--methods", args.methods), args.keep, args.layer)
    methods = list(named.values())

    console = Console()
    layers = args.layers
    if layers is None and args.model in PUBLISHED and not on_gpu:
        layers = 8
    with console.status(f"building {args.model}"):
        workload = build_workload(
            args.model,
            layers=layers,
            vision=on_gpu if args.vision is None else args.vision,
            dtype=DTYPES[args.dtype] if args.dtype else None,
            device=device,
        )
    measured = [None, *methods, *ideals_of(workload, methods).values()]
    steps = sum(
        repeats + steps_to_prepare(method, args.compile or args.capture) for method in measured
    )
    with progress_bar(console) as bar:
        task = bar.add_task("measuring", total=steps)
        result = compare(
            workload,
            methods,
            names=list(named),
            repeats=repeats,
            compile_decoder=args.compile,
            capture=args.capture,
            ideals=True,
            tick=lambda: bar.advance(task),
        )
    console.print(_headline(result), markup=False, highlight=False)
    console.print(_table(result, wide=console.width >= WIDE))
    console.print(_notes(result), style="dim", markup=False, highlight=False)
    for path in args.out:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_json(result) if path.suffix == ".json" else _markdown(result))
        console.print(f"written: {path}", highlight=False, markup=False)
    return 0


def variants_of(
    words: Sequence[str], keeps: Sequence[str], layer: int | None = None
) -> dict[str, Method]:
    """The methods to measure, by the names of their rows.

    Args:
        words: names of methods, each measured at every budget of `keeps`, or conditions such as
            vla-pruner@0.25:window=1.
        keeps: budgets, as on the command line.
        layer: K, for all of them; None: each method's own.

    Raises:
        ValueError: an unknown method, an option that it does not take, or an impossible budget.
    """
    amounts = words_of("--keep", keeps)
    for amount in amounts:
        keep_of(amount)  # Raises: it is none.
    found: dict[str, Method] = {}
    for word in words:
        if word == ALL_TOKENS:
            found[word] = make_method(word)
            continue
        texts = [word] if "@" in word else [f"{word}@{keep}" for keep in amounts]
        for text in texts:
            condition = Condition.parse(text)
            options = dict(condition.options) | ({} if layer is None else {"layer": layer})
            name = " ".join(text.replace("@", " ", 1).split(":"))
            found[name] = make_method(condition.method, keep=condition.keep, **options)
    return found


# -- what is shown -------------------------------------------------------------------------------


NARROW = (
    "variant",
    "tokens",
    "prefill ms",
    "speed-up",
    "bound",
    "of bound",
    "of ideal",
    "share",
    "step ms",
)
"""Columns for a terminal of 80 characters; all of them need `WIDE`."""
WIDE = 120


def _cells(row: VariantRow, full: VariantRow) -> dict[str, str]:
    """Column and content; a column that is empty in every row is left out."""
    parts = [part.median for part in (row.scoring_ms, row.selection_ms) if part is not None]
    passes = full.prefill_ms.median + (full.decode_ms.median if full.decode_ms else 0.0)
    beyond_prefill = full.total_ms.median > 1.05 * full.prefill_ms.median
    return {
        "variant": row.name,
        "tokens": str(row.visual),
        "prefill ms": str(row.prefill_ms),
        "speed-up": f"{row.speedup}",
        "bound": f"{row.bound:.2f}",
        "of bound": f"{row.of_bound:.3f}",
        "of ideal": f"{row.of_ideal.median:.3f}" if row.of_ideal else "",
        "score ms": f"{row.scoring_ms.median:.2f}" if row.scoring_ms else "",
        "select ms": f"{row.selection_ms.median:.2f}" if row.selection_ms else "",
        "share": f"{100 * sum(parts) / passes:.2f} %" if parts else "",
        "decode ms": str(row.decode_ms) if row.decode_ms else "",
        "step ms": str(row.total_ms) if beyond_prefill else "",
        "step speed-up": f"{row.total_speedup}" if beyond_prefill else "",
        "ops": _operators(row, full),
        "waits": "" if row.waits is None else str(sum(row.waits.values())),
        "peak MB": "" if row.memory_mb is None else f"{row.memory_mb:.0f}",
    }


def _operators(row: VariantRow, full: VariantRow) -> str:
    """Operators of the full model's step; of others, what is added to it (scoring + selection)."""
    if row.operators is None or full.operators is None:
        return ""
    if row is full:
        return str(row.operators)
    parts = " + ".join(str(row.operators_by_part.get(part, 0)) for part in (SCORING, SELECTION))
    return f"{row.operators - full.operators:+d} ({parts})"


def _grid(result: Comparison) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table."""
    cells = [_cells(row, result.rows[0]) for row in result.rows]
    header = [column for column in cells[0] if any(row[column] for row in cells)]
    rows = [[row[column] or "-" for column in header] for row in cells]
    if result.settings.get("captured"):  # One graph: its time is that of the whole step.
        header = ["step ms" if column == "prefill ms" else column for column in header]
    return header, rows


def _headline(result: Comparison) -> str:
    model, settings = result.model, result.settings
    towers = "" if model["vision"] else ", toy vision towers"
    compiled = "compiled" if settings["compiled"] else "eager"
    compiled = "captured" if settings.get("captured") else compiled
    return (
        f"{model['name']}: {model['layers']} layers x {model['hidden']}, {model['tokens']} tokens "
        f"({model['visual']} visual), {model['dtype']}, {compiled}, {settings['device']}{towers}; "
        f"{settings['repeats']} interleaved rounds"
    )


def _table(result: Comparison, *, wide: bool) -> Table:
    table, (header, rows) = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0)), _grid(result)
    shown = [column for column in header if wide or column in NARROW]
    for column in shown:
        first = column == "variant"
        table.add_column(column, justify="left" if first else "right", no_wrap=first)
    for row in rows:  # quartiles go below their median, or the table is too wide for a terminal
        cells = dict(zip(header, row, strict=True))
        table.add_row(*(Text(cells[column].replace(" [", "\n[")) for column in shown))
    if len(shown) < len(header):
        table.caption = f"{WIDE} columns, or --out FILE.md, show more"
    return table


def _notes(result: Comparison) -> str:
    stamp = ", ".join(f"{key} {value}" for key, value in result.environment.items() if value)
    searches = ", ".join(
        f"{dtype} {spread} ms" for dtype, spread in result.selection_128_of_512_ms.items()
    )
    return (
        "Median [quartiles]; speed-up: ratio of the medians [95 % interval]. "
        "Bound: prefill FLOPs of the full model over those of the variant. "
        "Ideal: the same cut, its tokens chosen beforehand, nothing scored. "
        "Share: scoring and selection alone, of the full model's passes. "
        "Ops: operators of a step, or added to it (of these, in scoring + selection); waits: those "
        "that a host with a GPU would wait for. "
        "Peak: held on top of the weights.\n"
        f"Greedy search, 128 of 512 candidates, 4096 wide: {searches}.\n"
        f"{stamp}"
    )


def _command() -> str:
    return shlex.join(["vla-pruner", *sys.argv[1:]])


def _json(result: Comparison) -> str:
    values: dict[str, Any] = {"command": _command(), **result.as_dict()}
    return json.dumps(values, indent=2) + "\n"


def _markdown(result: Comparison) -> str:
    header, rows = _grid(result)
    lines = [
        _headline(result),
        "",
        f"`{_command()}`",
        "",
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
        _notes(result),
    ]
    return "\n".join(lines) + "\n"
