"""A server under hostile bytes: no crash, flat memory and descriptors, a canary answered exactly.

    python scripts/fuzz_serving.py --messages 100000

Starts `vla-pruner serve`, sends it damaged messages of vla-eval's protocol over several connections
at once (bytes changed, cut out, put in, bits flipped, whole messages of noise; some connections end
in the middle of one), and asks the same questions on one more connection all the while: its answers
must stay bit for bit what they were. Prints memory and descriptors at every tenth.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import time
from pathlib import Path

import websockets
from bench_serving import observations, packed, start

QUESTIONS = 5
LAST = 0x7EADBEEF


def damaged(dice: random.Random, good: list[bytes]) -> bytes:
    """One of the good messages with a few faults, or noise."""
    if dice.random() < 0.1:
        return dice.randbytes(dice.randint(0, 300))
    data = bytearray(dice.choice(good))
    for _ in range(dice.randint(1, 6)):
        if not data:
            break
        at = dice.randrange(min(len(data), 400))  # Heads are where faults tell.
        match dice.randrange(4):
            case 0:
                data[at] = dice.randrange(256)
            case 1:
                del data[at : at + dice.randint(1, 40)]
            case 2:
                data[at:at] = dice.randbytes(dice.randint(1, 40))
            case 3:
                data[at] ^= 1 << dice.randrange(8)
    return bytes(data)


async def attack(address: str, seed: int, count: int) -> int:
    """Send so many messages, over a new connection for every hundred; how many were answered."""
    dice, answers = random.Random(seed), 0
    good = [whole[:400] + bytes(len(whole) - 400) for whole in observations(0, 16)]
    good += [packed(kind, {"task": {"name": "x"}}) for kind in ("hello", "episode_start")]
    while count > 0:
        async with websockets.connect(f"ws://{address}", compression=None) as socket:
            reading = asyncio.create_task(_answers(socket))
            with contextlib.suppress(websockets.exceptions.ConnectionClosed):
                for _ in range(min(count, 100)):
                    await socket.send(damaged(dice, good))
                if dice.random() < 0.3:
                    socket.transport.abort()
                await socket.send(packed("hello", {}, LAST))
            count -= 100
            answers += await reading
    return answers


async def _answers(socket: websockets.ClientConnection) -> int:
    """How many came, the one to the last message included."""
    seen, last = 0, LAST.to_bytes(4, "big")
    with contextlib.suppress(websockets.exceptions.ConnectionClosed):
        async for answer in socket:
            seen += 1
            if isinstance(answer, bytes) and last in answer[-40:]:
                break
    return seen


async def canary(address: str) -> list[bytes]:
    """Answers to the same questions in a new episode; only what follows from them."""
    async with websockets.connect(f"ws://{address}", compression=None, max_size=None) as socket:
        await socket.send(packed("episode_start", {}))
        found = []
        for question in (observations(7, 160) * 2)[:QUESTIONS]:
            await socket.send(question)
            answer = await asyncio.wait_for(socket.recv(), 300)
            assert isinstance(answer, bytes)
            at = answer.index(b"\xa4data")  # The array of actions.
            found.append(answer[at : at + 40])
        return found


def used(pid: int) -> tuple[int, int]:
    """Resident MiB and open descriptors."""
    status = Path(f"/proc/{pid}/status").read_text()
    kib = int(status.split("VmRSS:")[1].split()[0])
    return kib >> 10, len(os.listdir(f"/proc/{pid}/fd"))


async def main() -> None:
    """Attack, and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policy", default="mini-oft")
    parser.add_argument("--messages", type=int, default=100_000)
    parser.add_argument("--connections", type=int, default=8)
    args = parser.parse_args()
    args.method, args.keep = "vla-pruner", 0.25
    process, address = start(args, 1)
    began = time.monotonic()
    try:
        wanted = await canary(address)
        answers = 0
        for tenth in range(10):
            each = args.messages // 10 // args.connections
            found = await asyncio.gather(
                *(attack(address, 100 * tenth + n, each) for n in range(args.connections))
            )
            answers += sum(found)
            same = await canary(address) == wanted
            mib, descriptors = used(process.pid)
            sent = (tenth + 1) * each * args.connections
            print(
                f"{sent} messages, {answers} answers, {time.monotonic() - began:.0f} s: {mib} MiB, "
                f"{descriptors} descriptors, canary {'exact' if same else 'WRONG'}",
                flush=True,
            )
            assert same and process.poll() is None
    finally:
        process.terminate()
        process.wait(60)
    print(f"exit code {process.returncode}")


if __name__ == "__main__":
    asyncio.run(main())
