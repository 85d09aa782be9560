"""What torch's default dtype is changes nothing: scripts that load big models set it to bf16."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import vla_pruner as vp
from vla_pruner.kernels import native
from vla_pruner.models.port import default_dtype
from vla_pruner.pruning.selection import max_min_filter

SOURCES = Path(vp.__file__).parent
MAKERS = {"empty", "zeros", "ones", "full", "rand", "randn", "linspace", "logspace", "eye"}
MAKERS |= {"tensor", "as_tensor", "scalar_tensor", "normal", "hann_window", "complex"}


def undecided(tree: ast.Module) -> Iterator[ast.Call]:
    """Calls that make a tensor of torch's default dtype, or may.

    Parameters of a port are meant to have it (`port.default_dtype`).
    """
    parameters = {
        inner
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and ast.unparse(call.func).endswith("Parameter")
        for inner in ast.walk(call)
    }
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call) or call in parameters:
            continue
        room, _, name = ast.unparse(call.func).rpartition(".")
        said = {keyword.arg for keyword in call.keywords} & {"dtype", None}
        if room == "torch" and name in MAKERS and not said:
            yield call
        if room == "torch" and name == "Tensor":
            yield call
        if room == "torch" and name == "arange" and not said:
            numbers = [part for argument in call.args for part in ast.walk(argument)]
            if any(isinstance(n, ast.Constant) and isinstance(n.value, float) for n in numbers):
                yield call
        # A number in both branches: nothing says what it becomes.
        numbers = [isinstance(branch, ast.Constant) for branch in call.args[1:]]
        if room == "torch" and name == "where" and len(numbers) == 2 and all(numbers):
            yield call


def test_the_rule_finds_what_it_is_for() -> None:
    bad = "torch.zeros(3)\ntorch.tensor([1.0])\ntorch.arange(0.0, 1)\ntorch.where(m, 0.0, 1.0)"
    good = "torch.zeros(3, dtype=d)\nx.new_zeros(3)\ntorch.arange(3)\nnn.Parameter(torch.empty(3))"
    assert len(list(undecided(ast.parse(bad)))) == 4
    assert not list(undecided(ast.parse(good)))


def test_no_source_leaves_a_dtype_to_torch() -> None:
    """A buffer of the default dtype that C code fills as fp32 is a crash."""
    found = []
    for file in sorted(SOURCES.rglob("*.py")):
        for call in undecided(ast.parse(file.read_text(encoding="utf-8"))):
            found.append(f"{file.relative_to(SOURCES)}:{call.lineno}: {ast.unparse(call)}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_search_writes_into_memory_of_its_size(default, dtype):
    features = torch.randn(512, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = max_min_filter(features, 64)
    with default_dtype(default):
        for _ in range(20):
            assert torch.equal(max_min_filter(features, 64), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_default_device_does_not_move_what_the_search_works_on(dtype, monkeypatch):
    """C code would write to an address on another device."""
    features = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = max_min_filter(features, 16)
    for compiled in (True, False):
        if not compiled:
            monkeypatch.setattr(native, "max_min_search", lambda *given: None)
        native._library.cache_clear()
        monkeypatch.setattr(native, "_memory", native._Memory())
        with torch.device("meta"):
            found = max_min_filter(features, 16)
        assert found.device.type == "cpu" and found.tolist() == expected.tolist()
