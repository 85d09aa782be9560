"""Is a pruned step slower than it was? Two checkouts of this repository, step by step in turn.

    python scripts/side_by_side.py OLD NEW    # folders of two checkouts

One process per checkout, set up alike: a Llama with random weights (8 layers, 512 wide, 512 visual
tokens and 91 others, fp32, one thread). Both run the same step, one after the other, in an order
that changes from round to round. Printed are medians, and the median of the rounds' ratios new/old
with a 95 % bootstrap interval; seconds of the processor change less than those of the clock where
other work runs on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

WORKER = """
import json, sys, time
import torch
from transformers import LlamaConfig, LlamaForCausalLM
import vla_pruner as vp

torch.manual_seed(0)
torch.set_num_threads(1)
model = LlamaForCausalLM(LlamaConfig(vocab_size=97, hidden_size=512, intermediate_size=1024,
    num_hidden_layers=8, num_attention_heads=8)).eval()
frames = torch.randn(8, 1, 603, 512)

def step(number):
    wall, own = time.perf_counter(), time.process_time()
    model(inputs_embeds=frames[number % 8], use_cache=True)
    return time.perf_counter() - wall, time.process_time() - own

with torch.no_grad():
    decoder = vp.models.Decoder("model.layers", visual=slice(1, 513))
    full = [step(number) for number in range(3)]
    session = vp.prune(model, "vla-pruner", keep=0.25, adapter=decoder)
    for number in range(6):
        step(number)
    print(json.dumps(session.last.tokens_kept), flush=True)
    for line in sys.stdin:
        print(json.dumps(step(int(line))), flush=True)
"""


def start(checkout: str) -> subprocess.Popen[str]:
    """A process that runs a step whenever it is told a number, and says what the step took."""
    source = Path(checkout) / "src"
    environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WORKER]
    pipe: Any = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)


def told(worker: subprocess.Popen[str], line: str | None = None) -> Any:
    """What a worker says next, or to a line."""
    assert worker.stdin is not None and worker.stdout is not None
    if line is not None:
        worker.stdin.write(line + "\n")
        worker.stdin.flush()
    return json.loads(worker.stdout.readline())


def interval(values: list[float]) -> tuple[float, float]:
    """95 % bootstrap interval of a median."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(2000))
    return medians[50], medians[-51]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("--rounds", type=int, default=60)
    arguments = parser.parse_args()
    workers = {"old": start(arguments.old), "new": start(arguments.new)}
    kept = {name: told(worker) for name, worker in workers.items()}
    if len(set(kept.values())) != 1:
        sys.exit(f"the checkouts keep different numbers of tokens: {kept}")
    took: dict[str, list[list[float]]] = {"old": [], "new": []}
    for number in range(arguments.rounds):
        for name in sorted(workers, reverse=bool(number % 2)):
            took[name].append(told(workers[name], str(number)))
    for worker in workers.values():
        assert worker.stdin is not None
        worker.stdin.close()
        worker.wait()
    for clock, what in enumerate(("clock", "processor")):
        old, new = ([1e3 * both[clock] for both in took[name]] for name in ("old", "new"))
        ratios = [b / a for a, b in zip(old, new, strict=True)]
        low, high = interval(ratios)
        print(
            f"{what:9}: old {statistics.median(old):.1f} ms, new {statistics.median(new):.1f} ms, "
            f"new/old {statistics.median(ratios):.3f} [{low:.3f}, {high:.3f}]"
        )


if __name__ == "__main__":
    main()
