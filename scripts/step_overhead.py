"""Processor time of one step, variant by variant in turn: what scoring and choosing add to it.

    python scripts/step_overhead.py mini-oft 0.25 100

One thread, whose own processor time is counted: what others run on the machine at the same time
is not in it, as it would be in a time on the wall.
"""

from __future__ import annotations

import statistics
import sys
import time

import torch

import vla_pruner as vp
from vla_pruner.measure.environment import stamp
from vla_pruner.measure.timing import keep_freed_memory
from vla_pruner.measure.workloads import build_workload

METHODS = ("random", "fastv", "vla-pruner")


def main(model: str, keep: float, rounds: int) -> None:
    """Prints a row per variant: fastest step, lower quartile, median, in ms."""
    torch.set_num_threads(1)
    keep_freed_memory()
    cpu = torch.device("cpu")
    workload = build_workload(model, layers=None, vision=True, dtype=None, device=cpu)
    policies = {"all tokens": workload.copy()}
    for name in METHODS:
        policies[name] = workload.copy()
        vp.prune(policies[name], name, keep=keep)
    for policy in policies.values():
        for _ in range(4):  # The three steps of the warm-up, and one more.
            workload.step(policy)
    taken: dict[str, list[float]] = {name: [] for name in policies}
    for _ in range(rounds):
        for name, policy in policies.items():
            started = time.thread_time()
            workload.step(policy)
            taken[name].append(1e3 * (time.thread_time() - started))
    print(", ".join(f"{key} {value}" for key, value in stamp(cpu).items() if value))
    print(f"{model}, keep {keep}, {rounds} rounds, ms of processor time, one thread")
    for name, samples in taken.items():
        lower, median, _ = statistics.quantiles(samples, n=4, method="inclusive")
        print(f"{name:12}{min(samples):9.2f}{lower:9.2f}{median:9.2f}")


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]))
