"""How much of this package one pruned step runs through: files, moves between them, lines.

    python scripts/core_walk.py            # a table
    python scripts/core_walk.py --check    # fails where a step is longer than docs/map.md promises

A 6-layer Llama with random weights, VLA-Pruner with one cut, after the warm-up. A move is a call
into another file of the package, or a return from one; lines are those of all functions that ran,
docstrings included.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import sys
from collections import Counter
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import vla_pruner as vp
from vla_pruner.kernels import native

ROOT = Path(vp.__file__).parent
MOST = {True: (80, 900), False: (94, 1208)}
"""Moves and lines, whether or not scores and search are compiled on this machine."""


def walk() -> tuple[list[CodeType], Counter[tuple[str, str]]]:
    """Code objects that one pruned prefill runs, in order, and the moves between files."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=4,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config).eval()
    ran: list[CodeType] = []
    path: list[str] = []  # The file that runs, after each call and each return.
    inside: list[str] = []

    def note(frame: FrameType, event: str, argument: Any) -> None:
        file = frame.f_code.co_filename
        if event not in ("call", "return") or not file.startswith(str(ROOT)):
            return
        if event == "call":
            ran.append(frame.f_code)
            inside.append(file)
        elif inside:
            inside.pop()
        path.extend(inside[-1:])

    decoder = vp.models.Decoder("model.layers", visual=slice(1, 25))
    with torch.no_grad(), vp.prune(model, "vla-pruner", keep=0.25, adapter=decoder) as session:
        for _ in range(4):
            model(inputs_embeds=torch.randn(1, 36, 32), use_cache=True)
        assert not bool(session.last.warm_up.any())
        sys.setprofile(note)
        model(inputs_embeds=torch.randn(1, 36, 32), use_cache=True)
        sys.setprofile(None)
    files = [str(Path(file).relative_to(ROOT)) for file in path]
    moves = Counter((a, b) for a, b in itertools.pairwise(files) if a != b)
    return ran, moves


def lines(code: CodeType) -> int:
    """Lines of a function's source; a comprehension belongs to the function around it."""
    return 0 if code.co_name.startswith("<") else len(inspect.getsourcelines(code)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail where a step is too long")
    arguments = parser.parse_args()
    ran, moves = walk()
    functions = {code for code in ran if not code.co_name.startswith("<")}
    total = sum(map(lines, functions))
    calls = Counter(str(Path(code.co_filename).relative_to(ROOT)) for code in functions)
    print(f"{len(functions)} functions, {len(calls)} files, {moves.total()} moves, {total} lines\n")
    for file, count in calls.most_common():
        length = sum(lines(c) for c in functions if c.co_filename.endswith(file))
        print(f"  {file:32} {count:3} functions {length:4} lines")
    print()
    for (one, other), count in moves.most_common(12):
        print(f"  {count:3} {one} -> {other}")
    most_moves, most_lines = MOST[native.state().startswith("compiled")]
    if arguments.check and (moves.total() > most_moves or total > most_lines):
        sys.exit(f"a pruned step should take at most {most_moves} moves and {most_lines} lines")


if __name__ == "__main__":
    main()
