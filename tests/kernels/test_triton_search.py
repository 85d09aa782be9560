"""The Triton kernels pick what PyTorch's operators pick, and compile for the GPUs of policies.

Needs Triton beside PyTorch, no GPU: the kernels run in Triton's interpreter.
"""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed beside this PyTorch")

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vla_pruner.kernels.triton_search import greedy_kernel
signature = dict(distance="*fp32", score="*fp32", candidates="*u8", picks="*i64", n="i32", k="i32")
signature["BLOCK"] = "constexpr"
source = ASTSource(fn=greedy_kernel, signature=signature, constexprs={"BLOCK": 512})
built = triton.compile(source, target=GPUTarget("cuda", int(__import__("sys").argv[1]), 32))
print(len(built.asm["cubin"]), built.metadata.shared)
"""

INTERPRET = """
import torch
from vla_pruner.pruning.selection import _greedy_by_operators
from vla_pruner.kernels.triton_search import greedy
for seed, n in enumerate((2, 7, 16, 33, 100)):
    generator = torch.Generator().manual_seed(seed)
    unit = torch.nn.functional.normalize(torch.randn(2, n, 8, generator=generator), dim=-1)
    unit[:, n // 2] = unit[:, 0]  # A tie.
    distance = 1 - unit @ unit.transpose(1, 2)
    score = torch.rand(2, n, generator=generator)
    candidates = torch.rand(2, n, generator=generator) > 0.3
    candidates[:, :2] = True
    k = int(candidates.sum(dim=1).min())
    expected = _greedy_by_operators(distance, score, candidates, k)
    got = greedy(distance, score, candidates, k)
    assert got.dtype == torch.int64 and torch.equal(got, expected), (n, got, expected)
print("alike")
"""

COMPILE_DETERMINANT = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vla_pruner.kernels.triton_determinant import determinant_kernel
names = ("cosine", "quality", "last", "factor")
signature = {name: "*fp32" for name in names} | dict(picks="*i64", n="i32", k="i32", nothing="fp32")
constants = {"BLOCK": 512, "TILE": 8}
signature |= dict.fromkeys(constants, "constexpr")
source = ASTSource(fn=determinant_kernel, signature=signature, constexprs=constants)
built = triton.compile(source, target=GPUTarget("cuda", int(__import__("sys").argv[1]), 32))
print(len(built.asm["cubin"]), built.metadata.shared)
"""

INTERPRET_DETERMINANT = """
import torch
from vla_pruner.baselines.determinant import NOTHING_NEW, _search_on_device
from vla_pruner.kernels.triton_determinant import determinant
for seed, (n, k) in enumerate(((2, 2), (7, 3), (16, 16), (33, 20), (100, 25))):
    generator = torch.Generator().manual_seed(seed)
    unit = torch.nn.functional.normalize(torch.randn(2, n, 64, generator=generator), dim=-1)
    quality = 0.2 + 0.8 * torch.rand(2, n, generator=generator)
    if n > 4:
        unit[:, n // 2] = unit[:, 0]  # A twin.
        quality[:, 1] = 0.0
    cosine, last = unit @ unit.transpose(1, 2), quality - 2.0
    expected = _search_on_device(cosine, quality, last, k)
    got = determinant(cosine, quality, last, k, NOTHING_NEW)
    assert got.dtype == torch.int64 and torch.equal(got, expected), (n, got, expected)
print("alike")
"""


def run(code: str, *arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("code", [INTERPRET, INTERPRET_DETERMINANT], ids=["max-min", "determinant"])
def test_the_interpreter_picks_what_operators_pick(code: str) -> None:
    assert run(code, TRITON_INTERPRET="1").strip() == "alike"


@pytest.mark.parametrize("code", [COMPILE, COMPILE_DETERMINANT], ids=["max-min", "determinant"])
@pytest.mark.parametrize("capability", ["80", "89", "90"])
def test_it_compiles_ahead_of_time(code: str, capability: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("with a GPU the kernel itself is tried")
    size, shared = run(code, capability, TRITON_INTERPRET="0").split()
    assert int(size) > 1000 and int(shared) < 48 * 1024
