"""What batching is worth to a server: clients that start at random, against one answer at a time.

    python scripts/bench_serving.py --policy mini-oft --clients 16 --rounds 5

Two servers, `vla-pruner serve --batch 1` and `--batch N`, take turns; clients of this process speak
vla-eval's protocol with raw images and ask again as soon as they are answered, in episodes of
random length. Printed for each: answers per second, per second of the server's CPU time, and
quantiles of latency; medians over rounds, as a table. `--batches 16,16x2,16x4` compares replicas.

    python scripts/bench_serving.py --passes

No server: CPU milliseconds per row of passes of one and of N rows, of warm-up rows, of pruned rows,
and of a pass where one of them is a warm-up row. CPU time does not depend on who else computes.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import torch
import websockets

CHUNK = 1


def start(
    args: argparse.Namespace, batch: int, replicas: int = 0
) -> tuple[subprocess.Popen[bytes], str]:
    """A server, warmed up, and its address."""
    words = f"-m vla_pruner serve --benchmark pickplace --port 0 --policy {args.policy}".split()
    words += ["--method", args.method, "--keep", str(args.keep), "--chunk-size", str(CHUNK)]
    with tempfile.NamedTemporaryFile("r+", suffix=".log", delete=False) as log:
        process = subprocess.Popen(
            [sys.executable, *words, "--batch", str(batch), "--replicas", str(replicas)],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        while process.poll() is None:
            said = Path(log.name).read_text()
            if "listening on" in said:
                return process, said.split("listening on ")[1].split()[0]
            time.sleep(0.2)
    raise SystemExit(f"the server did not start, see {log.name}")


def cpu_seconds(pid: int) -> float:
    """Processor time that a process and what it started have used so far."""
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    own = (int(words[11]) + int(words[12])) / 100
    below = [each.read_text().split() for each in Path(f"/proc/{pid}/task").glob("*/children")]
    return own + sum(cpu_seconds(int(child)) for found in below for child in found)


def packed(kind: str, payload: dict[str, Any], seq: int = 0) -> bytes:
    """A message of vla-eval's protocol."""

    def plain(value: np.ndarray) -> dict[str, Any]:
        entry = {"__ndarray__": True, "dtype": value.dtype.str, "shape": list(value.shape)}
        return {**entry, "data": value.tobytes()}

    sent = {"type": kind, "payload": payload, "seq": seq, "timestamp": 0.0}
    made: bytes = msgpack.packb(sent, default=plain)
    return made


def observations(number: int, side: int) -> list[bytes]:
    """A few observations of one client, as they are sent."""
    random = np.random.default_rng(number)
    made = []
    for _ in range(4):
        images = random.integers(0, 256, (2, side, side, 3), dtype=np.uint8)
        seen = {
            "images": {"agentview": images[0], "wrist": images[1]},
            "task_description": "pick up the milk and place it in its bin",
            "states": random.uniform(-0.2, 0.2, 8),
        }
        made.append(packed("observation", seen))
    return made


async def client(address: str, number: int, args: argparse.Namespace, until: float) -> list[float]:
    """Seconds of each answer."""
    random, took = np.random.default_rng(1000 + number), []
    sent = observations(number, args.side)
    await asyncio.sleep(float(random.uniform(0, args.spread)))
    async with websockets.connect(f"ws://{address}", compression=None, max_size=None) as socket:
        while time.monotonic() < until:
            await socket.send(packed("episode_start", {}))
            for step in range(int(random.integers(10, 30))):
                began = time.monotonic()
                await socket.send(sent[step % len(sent)])
                answer = await socket.recv()
                took.append(time.monotonic() - began)
                assert b"action" in answer[:40], answer[:300]
                if time.monotonic() > until:
                    break
    return took


async def measure(
    process: subprocess.Popen[bytes], address: str, args: argparse.Namespace
) -> dict[str, float]:
    """One round at one server."""
    began, used = time.monotonic(), cpu_seconds(process.pid)
    until = began + args.seconds
    found = await asyncio.gather(*(client(address, n, args, until) for n in range(args.clients)))
    wall, used = time.monotonic() - began, cpu_seconds(process.pid) - used
    took = sorted(value for one in found for value in one)
    p50, p95 = np.quantile(took, [0.5, 0.95])
    return {
        "answers": len(took),
        "per_s": len(took) / wall,
        "per_cpu_s": len(took) / used,
        "p50_ms": 1000 * float(p50),
        "p95_ms": 1000 * float(p95),
    }


def passes(args: argparse.Namespace) -> dict[str, float]:
    """CPU milliseconds per row, by kind of pass and number of rows."""
    from vla_pruner.models.loading import load
    from vla_pruner.serving.policy import ServedPolicy

    served = ServedPolicy(load(args.policy), args.method, keep=args.keep)
    random, found = np.random.default_rng(0), {}
    blank = served.blank()
    assert blank is not None
    size = (args.side, args.side, 3)
    views = [random.integers(0, 256, size, dtype=np.uint8) for _ in blank["images"]]

    def timed(keys: list[Any]) -> float:
        began = time.process_time()
        served.step(keys, [blank | {"images": views}] * len(keys))
        return 1000 * (time.process_time() - began) / len(keys)

    for rows in (int(size) for size in args.batches.split(",")):
        taken: dict[str, list[float]] = {"warm-up": [], "pruned": [], "one warm-up row": []}
        for _ in range(args.rounds):
            keys = [served.start(str(row)) for row in range(rows)]
            while served.warm_up(keys[0]):
                taken["warm-up"].append(timed(keys))
            taken["pruned"] += [timed(keys) for _ in range(3)]
            fresh = [served.start("fresh"), *keys[1:]]
            taken["one warm-up row"].append(timed(fresh))
            for key in {*keys, *fresh}:
                served.end(key)
        found |= {f"{kind}, {rows}": statistics.median(each) for kind, each in taken.items()}
    return found


def main() -> None:
    """Measure, and print a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policy", default="mini-oft")
    parser.add_argument("--method", default="vla-pruner")
    parser.add_argument("--keep", type=float, default=0.25)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument(
        "--batches", default="1,16", help="rows of a pass to compare; 16x2: with two replicas"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each round")
    parser.add_argument("--spread", type=float, default=2.0, help="seconds in which clients start")
    parser.add_argument("--side", type=int, default=160, help="pixels of an image's side")
    parser.add_argument("--passes", action="store_true", help="only passes, without a server")
    parser.add_argument("--csv", type=Path, help="also write each round there")
    args = parser.parse_args()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.partition(":")[2] for line in lines if "model name" in line), "?").strip()
    print(f"{cpu}, torch {torch.__version__}, Python {platform.python_version()}")
    if args.passes:
        print(f"{args.policy}, {args.method}@{args.keep}, CPU ms per row, {args.rounds} rounds")
        for kind, value in passes(args).items():
            print(f"{kind} rows in a pass: {value:.1f}")
        return
    sizes = args.batches.split(",")
    before, servers = os.getloadavg(), {}
    for size in sizes:
        batch, _, replicas = size.partition("x")
        servers[size] = start(args, int(batch), int(replicas or 0))
    rows: dict[str, list[dict[str, float]]] = {size: [] for size in sizes}
    try:
        for _ in range(args.rounds):
            for size, (process, address) in servers.items():
                rows[size].append(asyncio.run(measure(process, address, args)))
    finally:
        for process, _ in servers.values():
            process.terminate()
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(
                ["policy", "condition", "clients", "batches", "round", *rows[sizes[0]][0]]
            )
            for size, found in rows.items():
                for number, row in enumerate(found):
                    values = [f"{value:.6g}" for value in row.values()]
                    named = f"{args.method}@{args.keep:g}"
                    writer.writerow([args.policy, named, args.clients, size, number, *values])
    result = {
        size: {name: statistics.median(row[name] for row in found) for name in found[0]}
        for size, found in rows.items()
    }
    shown = " ".join(sys.argv[1:])
    first, last = result[sizes[0]], result[sizes[-1]]
    ratios = {name: last[name] / first[name] for name in ("per_s", "per_cpu_s", "p95_ms")}
    print(
        f"\n`python scripts/bench_serving.py {shown}`: {args.policy}, {args.method} "
        f"at {args.keep:g}, {args.clients} clients that start at random, medians of {args.rounds} "
        f"rounds of {args.seconds:g} s; {date.today()}, load before {before[0]:.1f}, after "
        f"{os.getloadavg()[0]:.1f}, {os.cpu_count()} cores, {torch.get_num_threads()} threads.\n"
    )
    print(
        "| rows of a pass (x replicas) | answers/s | answers per CPU second | p50, ms | p95, ms |"
    )
    print("|---|---|---|---|---|")
    for size, row in result.items():
        cells = [row[name] for name in ("per_s", "per_cpu_s", "p50_ms", "p95_ms")]
        print(f"| {size} | " + " | ".join(f"{value:.1f}" for value in cells) + " |")
    print("| ratio | " + " | ".join(f"{v:.2f}x" for v in list(ratios.values())[:2]), end="")
    print(f" | {last['p50_ms'] / first['p50_ms']:.2f}x | {ratios['p95_ms']:.2f}x |\n")
    print(json.dumps({"median": result, "ratios": ratios}))


if __name__ == "__main__":
    main()
