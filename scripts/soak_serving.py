"""Many episodes at once for a long time: every answer must be that of its own episode, by value.

    python scripts/soak_serving.py --episodes 200 --minutes 30

Each connection runs episode after episode of one of a few scripts of observations, at its own pace.
What a script's answers are is asked first, one episode at a time. Answers of another episode's
history, or of another step, differ by far more than rounding does in a batch (`--tolerance`).
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections import Counter

import msgpack
import numpy as np
import websockets
from bench_serving import observations, packed, start
from fuzz_serving import used


def actions(answer: str | bytes) -> np.ndarray:
    """Of one answer. Errors: AssertionError for an answer that is none."""
    found = msgpack.unpackb(answer)
    assert found["type"] == "action", found
    entry = found["payload"]["actions"]
    return np.frombuffer(entry["data"], entry["dtype"])


async def script(address: str, number: int, steps: int) -> list[np.ndarray]:
    """A script's answers, when nobody else asks."""
    async with websockets.connect(f"ws://{address}", compression=None, max_size=None) as socket:
        await socket.send(packed("episode_start", {}))
        found = []
        for step in range(steps):
            await socket.send(observations(number, 160)[step % 4])
            found.append(actions(await socket.recv()))
        return found


async def episodes(
    address: str, seed: int, wanted: list[list[np.ndarray]], until: float, pause_s: float
) -> list[float]:
    """Episode after episode on one connection; how far each answer was from its own."""
    dice, off = random.Random(seed), []
    await asyncio.sleep(seed / 10)  # Not all at once at the door.
    async with websockets.connect(
        f"ws://{address}", compression=None, max_size=None, open_timeout=None, ping_timeout=None
    ) as socket:
        while time.monotonic() < until:
            number = dice.randrange(len(wanted))
            sent = observations(number, 160)
            await socket.send(packed("episode_start", {}))
            for step in range(dice.randint(2, len(wanted[number]))):
                await asyncio.sleep(dice.expovariate(1 / pause_s))
                await socket.send(sent[step % 4])
                got = actions(await socket.recv())
                off.append(float(np.abs(got - wanted[number][step]).max()))
            if dice.random() < 0.5:
                await socket.send(packed("episode_end", {}))
    return off


async def main() -> None:
    """Soak, and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policy", default="mini-oft")
    parser.add_argument("--episodes", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--scripts", type=int, default=8)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--pause-s", type=float, default=20.0, help="between answer and question")
    parser.add_argument("--tolerance", type=float, default=1e-4)
    args = parser.parse_args()
    args.method, args.keep = "vla-pruner", 0.25
    process, address = start(args, 16)
    try:
        wanted = [await script(address, n, args.steps) for n in range(args.scripts)]
        apart = min(
            float(np.abs(a - b).max())
            for n, one in enumerate(wanted)
            for other in wanted[n + 1 :]
            for a, b in zip(one, other, strict=True)
        )
        before, until = used(process.pid), time.monotonic() + 60 * args.minutes
        found = await asyncio.gather(
            *(episodes(address, seed, wanted, until, args.pause_s) for seed in range(args.episodes))
        )
        off = np.array([value for one in found for value in one])
        wrong = Counter(bool(value > args.tolerance) for value in off)[True]
        after = used(process.pid)
        print(
            f"{args.episodes} episodes at once, {args.minutes:g} min: {len(off)} answers, {wrong} "
            f"further than {args.tolerance:g} from their own (largest {off.max():.1e}; two scripts "
            f"differ by {apart:.1e} or more); MiB {before[0]} -> {after[0]}, "
            f"descriptors {before[1]} -> {after[1]}"
        )
    finally:
        process.terminate()
        process.wait(60)


if __name__ == "__main__":
    asyncio.run(main())
