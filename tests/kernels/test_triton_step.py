"""Triton kernels find what PyTorch's operators find, and compile for the GPUs of policies.

Needs Triton beside PyTorch, no GPU: the kernels run in Triton's interpreter.
"""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed beside this PyTorch")

COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vla_pruner.kernels import triton_scores, triton_search

def build(kernel, types, constants):
    names = kernel.arg_names
    signature = dict(zip(names, types.split(), strict=False)) | {n: "constexpr" for n in constants}
    assert list(signature) == names, (names, signature)
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    built = triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32))
    print(kernel.__name__, len(built.asm["cubin"]), built.metadata.shared)

build(triton_search.pool_kernel, "*fp32 *fp32 *u8 *u8 *u8 i32 i32", {"VALID": True, "BLOCK": 512})
build(triton_search.choose_kernel, "*fp32 *u8 *i64 *u8 i32 i32", {"NEAREST": False, "BLOCK": 512})
for dtype in ("fp32", "bf16"):
    pointers = f"*{dtype} *{dtype} *i64 *i64 *fp32 *{dtype} *{dtype} *fp32"
    options = dict(LISTED=False, WEIGHTED=True, MASK=2, SINKS=True, CAUSAL=True, CAP=True)
    sizes = dict(WIDTH=128, ROWS=16, KEYS=64)
    numbers = " ".join(["i32"] * 21 + ["fp32"] * 3)
    build(triton_scores.column_kernel, f"{pointers} {numbers}", options | sizes)
"""

CHOOSE = """
import torch
from vla_pruner.kernels.triton_search import choose
from vla_pruner.pruning.selection import combine_then_filter
for seed, n in enumerate((3, 16, 33, 70)):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(2, n, 8, generator=generator)
    semantic, action = torch.rand(2, 2, n, generator=generator)
    action[:, : n // 2] = 0  # Ties.
    k, valid = max(1, n // 4), torch.rand(2, n, generator=generator) > 0.2
    for first in ("nearest", "second-nearest"):
        for mask in (None, valid):
            expected = combine_then_filter(features, semantic, action, k, first=first, valid=mask)
            got, broken = choose(semantic, action, features, mask, k, first == "nearest")
            assert torch.equal(got, expected) and not broken.any(), (n, got, expected)
features[0, :], semantic[1, 2] = float("nan"), float("nan")
got, broken = choose(semantic, action, features, None, k, False)
assert broken.all() and got.min() >= 0 and got.max() < n
print("alike")
"""

SCORES = """
import torch
from vla_pruner.kernels.triton_scores import column_mean
from vla_pruner.kernels.native import Attention
from vla_pruner.pruning.scores import _by_operators
generator = torch.Generator().manual_seed(0)
def draw(*shape):
    return torch.randn(*shape, generator=generator)
lowest = torch.finfo(torch.float32).min
for batch, heads, shared, queries, keys, width, asked, kind in (
    (1, 4, 4, 20, 20, 8, 6, "plain"), (2, 4, 2, 33, 40, 16, 9, "listed"),
    (1, 2, 1, 5, 70, 24, 70, "causal"), (2, 4, 2, 18, 18, 8, 7, "padded"),
    (2, 4, 4, 20, 20, 8, 6, "additive"), (2, 2, 2, 17, 17, 16, 5, "sinks"),
):
    query, key = draw(batch, heads, queries, width), draw(batch, shared, keys, width)
    columns = torch.stack([torch.randperm(keys, generator=generator)[:asked] for _ in range(batch)])
    columns[0, 0] = -1
    rows, mask, weight, sinks, softcap = slice(None), None, None, None, None
    if kind in ("listed", "sinks"):
        rows = torch.stack([torch.randperm(queries, generator=generator)[:5] for _ in range(batch)])
        weight = torch.rand(batch, queries, generator=generator)
    if kind == "padded":
        mask, softcap = torch.rand(batch, 1, 1, keys, generator=generator) > 0.3, 5.0
        rows = slice(-6, None)
    if kind == "additive":
        hidden = torch.rand(batch, 1, queries, keys, generator=generator) > 0.7
        mask = draw(batch, 1, queries, keys).masked_fill(hidden, lowest)
        mask[0, 0, 2] = lowest
        weight = (torch.rand(batch, queries, generator=generator) > 0.3).float()
    if kind == "sinks":
        sinks = draw(heads)
    options = dict(mask=mask, row_weight=weight, sinks=sinks, scale=0.3, causal=kind == "causal",
                   softcap=softcap)
    chosen = rows if isinstance(rows, torch.Tensor) else range(queries)[rows]
    got = column_mean(query, key, columns, chosen, **options)
    seen = Attention(query, key, 0.3, mask, kind == "causal", softcap, sinks)
    expected = _by_operators(seen, columns, rows, weight, 1 << 20)
    worst = (got - expected).abs().max() / expected.abs().max()
    assert worst < 1e-5, (kind, worst)
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


@pytest.mark.parametrize("code", [CHOOSE, SCORES], ids=["choice", "scores"])
def test_the_interpreter_finds_what_operators_find(code: str) -> None:
    assert run(code, TRITON_INTERPRET="1").strip() == "alike"


@pytest.mark.parametrize("capability", ["80", "89", "90"])
def test_they_compile_ahead_of_time(capability: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("with a GPU the kernels themselves are tried")
    built = [line.split() for line in run(COMPILE, capability, TRITON_INTERPRET="0").splitlines()]
    assert [name for name, *_ in built] == [
        "pool_kernel",
        "choose_kernel",
        "column_kernel",
        "column_kernel",
    ]
    assert all(int(size) > 1000 and int(shared) < 100 * 1024 for _, size, shared in built)
