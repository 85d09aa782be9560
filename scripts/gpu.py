"""Everything that a GPU has to show, in one go of at most ten minutes.

    python scripts/gpu.py --out bench-results/gpu       # on a GPU: `make gpu`
    python scripts/gpu.py --out rehearsal --rehearse    # on the CPU: `make gpu-rehearsal`

Parts run in this order, each prints when it is done and writes its own files. One that fails is
written down with its reason, and the next one runs; the exit status then is 1. The rehearsal runs
the same lines with models of a few kilobytes, so that nothing is debugged on the clock.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import vla_pruner as vp
from vla_pruner.commands import bench
from vla_pruner.measure import workloads
from vla_pruner.measure.environment import stamp
from vla_pruner.models.openvla import OpenVLAConfig, OpenVLAOFT, OpenVLAOFTConfig, TowerConfig
from vla_pruner.models.pi0 import Pi0Config, StackConfig, VisionConfig

SECONDS = 600
KEEPS = ("0.5", "0.25", "0.125")
ROUNDS = "20"


def main(words: list[str] | None = None) -> int:
    """Run all parts; 1 if one failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--rehearse", action="store_true", help="tiny models, on the CPU")
    parser.add_argument("--only", nargs="+", default=[], help="names of parts")
    args = parser.parse_args(words)
    if not args.rehearse and not torch.cuda.is_available():
        sys.exit(
            f"make gpu needs an NVIDIA GPU that torch can use; torch {torch.__version__} sees none "
            "here. On the CPU, run: make test bench gpu-rehearsal"
        )
    parts = parts_of(args.rehearse, args.out)
    if unknown := sorted(set(args.only) - set(parts)):
        sys.exit(f"--only {' '.join(unknown)}: the parts are {', '.join(parts)}")
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cpu" if args.rehearse else "cuda")
    done: dict[str, dict[str, Any]] = {}
    started = time.perf_counter()
    for name in args.only or parts:
        began, failed = time.perf_counter(), None
        if began - started > SECONDS:
            failed = f"not begun: {SECONDS} s are over"
        else:
            try:
                parts[name]()
            except Exception as error:
                traceback.print_exc()
                failed = f"{type(error).__name__}: {error}"
        done[name] = {"seconds": round(time.perf_counter() - began, 1), "failed": failed}
        whole = {"environment": stamp(device), "rehearsal": args.rehearse, "parts": done}
        (args.out / "gpu.json").write_text(json.dumps(whole, indent=2) + "\n")
        print(f"== {name}: {failed or 'done'} ({done[name]['seconds']} s)", flush=True)
    return int(any(part["failed"] for part in done.values()))


def parts_of(rehearse: bool, out: Path) -> dict[str, Callable[[], None]]:
    """The parts by name, in order: what is right first, then what is fast."""
    device, backend = ("cpu", "eager") if rehearse else ("cuda", "inductor")
    common = ["--repeats", ROUNDS]
    if rehearse:
        workloads.PUBLISHED.update(tiny())
        workloads.PROMPTS.update(dict.fromkeys(workloads.PROMPTS, 12))
        common = ["--layers", "4", "--repeats", "1", "--dtype", "fp32"]
    few = ("0.25",)
    many = few if rehearse else KEEPS

    def table(model: str, how: str, methods: str, keep: tuple[str, ...]) -> Callable[[], None]:
        extra = ["--capture", backend] if how == "captured" else []
        files = [f"--out={out / f'{model}-{how}{end}'}" for end in (".json", ".md")]
        words = ["--model", model, "--device", device, "--methods", methods, "--keep", *keep]
        return lambda: run_bench([*words, *common, *extra, *files])

    return {
        "tests": lambda: run_tests(out, rehearse),
        "captured-is-right": lambda: check_capture(device, backend, out),
        "oft-eager": table("openvla-oft-7b", "eager", "vla-pruner,fastv", many),
        "oft-captured": table("openvla-oft-7b", "captured", "vla-pruner", many),
        "pi05-eager": table("pi05", "eager", "vla-pruner", few),
        "pi05-captured": table("pi05", "captured", "vla-pruner", few),
        "openvla-eager": table("openvla-7b", "eager", "vla-pruner", few),
    }


def run_bench(words: list[str]) -> None:
    """`vla-pruner bench` in this process."""
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    if bench.run(parser.parse_args(words)):
        raise RuntimeError("the bench failed")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def run_tests(out: Path, rehearse: bool) -> None:
    """The tests that need a GPU; in a rehearsal, those of the kernels. Writes tests.txt."""
    kernels = ["tests/kernels/test_triton_step.py", "tests/kernels/test_triton_search.py"]
    what = kernels if rehearse else ["-m", "gpu", "tests"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rs", *what],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=False,
    )
    said = done.stdout + done.stderr
    (out / "tests.txt").write_text(said)
    print(*said.strip().splitlines()[-1:])
    if done.returncode not in (0, 5):  # 5: nothing was collected.
        raise RuntimeError(f"tests failed, see {out / 'tests.txt'}")


def check_capture(device: str, backend: str, out: Path) -> None:
    """A captured step against an eager one, of a small policy. Writes captured.json."""
    policy = OpenVLAOFT.build(tiny()["openvla-oft-7b"], device=device).requires_grad_(False)
    step, _ = workloads._step(policy, 12)
    found: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
    for captured in (False, True):
        with vp.prune(policy, "vla-pruner", keep=0.25) as session:
            if captured:
                graphs = device == "cuda"
                policy.capture(backend=backend, mode="reduce-overhead" if graphs else None)
            found.append([])
            for _ in range(6):
                actions = step(policy).clone()
                assert session.last is not None
                found[-1].append((actions, session.last.kept_mask.clone()))
    pairs = list(zip(*found, strict=True))
    worst = max(float((a[0] - b[0]).abs().max() / a[0].abs().max()) for a, b in pairs)
    alike = all(torch.equal(a[1], b[1]) for a, b in pairs)
    (out / "captured.json").write_text(json.dumps({"worst": worst, "kept_alike": alike}) + "\n")
    print(f"captured against eager: {worst:.1e} of the largest action; same tokens kept: {alike}")
    if worst > 1e-3 or not alike:
        raise RuntimeError("a captured step is not the eager one")


def tiny() -> dict[str, Any]:
    """The published models, at a size for a rehearsal."""
    tower = TowerConfig(width=16, depth=2, heads=1, mlp=16, patch=8, image_size=32)
    shared: dict[str, Any] = {
        "towers": (tower, tower),
        "text": {
            "model_type": "llama",
            "vocab_size": 512,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "pad_token_id": 3,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        "empty_token_id": 4,
        "pad_token_id": 3,
    }
    stack = StackConfig(width=32, mlp=48, depth=4, heads=4, kv_heads=2, head_dim=8)
    return {
        "openvla-oft-7b": OpenVLAOFTConfig(**shared, chunk=2),
        "openvla-7b": OpenVLAConfig(**shared),
        "pi05": Pi0Config(
            kind="pi05",
            vision=VisionConfig(width=16, depth=2, heads=1, mlp=16, image_size=42),
            prefix=stack,
            expert=stack,
            vocab_size=512,
            cameras=("front", "wrist"),
            chunk=4,
            flow_steps=2,
        ),
    }


if __name__ == "__main__":
    sys.exit(main())
