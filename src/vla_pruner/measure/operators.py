"""Operators of a step: how many there are, and which of them a host would have to wait for."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from vla_pruner.kernels import native

_WAITING = frozenset(
    {
        "_local_scalar_dense",
        "_to_cpu",
        "argwhere",
        "equal",
        "is_nonzero",
        "item",
        "masked_select",
        "nonzero",
        "repeat_interleave.Tensor",
        "unique_consecutive",
        "unique_dim",
        "_unique2",
    }
)
"""Operators whose result, or its shape, the host has to know before it goes on."""

LAUNCHES = {"attention_column_mean": 2, "combine_then_filter": 5}
"""What an operator of ours starts on a GPU with Triton: its kernels, and PyTorch's around them."""


class Operators(TorchDispatchMode):
    """Counts what runs while it is entered; views are free and not counted.

    A call into compiled C counts as one, an operator of ours as what it starts on a GPU. What a GPU
    would make the host wait for is counted on any device: reading a number, shapes that depend on
    data, Python numbers that become a tensor (`torch.tensor(list)`), boolean masks as an index.
    """

    def __init__(self) -> None:
        super().__init__()
        self._operators = 0
        self._c_before: int | None = None
        self._c_calls = 0
        self.waits: Counter[str] = Counter()
        """What would be waited for, by the operator's name."""
        self._from_python = _FromPython(self.waits)

    def __enter__(self) -> Any:
        self._c_before = native.calls()
        self._from_python.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._from_python.__exit__(*error)
        self._c_calls = self._in_c()
        self._c_before = None

    def _in_c(self) -> int:
        return self._c_calls + (0 if self._c_before is None else native.calls() - self._c_before)

    @property
    def count(self) -> int:
        """Operators so far."""
        return self._operators + self._in_c()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = str(func._opname) if func._overloadname == "default" else _full_name(func)
        if name in _WAITING or func._opname in _WAITING:
            self.waits[name] += 1
        elif func._opname == "index" and any(
            isinstance(one, Tensor) and one.dtype in (torch.bool, torch.uint8)
            for one in (args[1] if len(args) > 1 else ())
        ):
            self.waits["index by a mask"] += 1
        free = func.is_view or func._opname in ("detach", "lift_fresh", "_local_scalar_dense")
        if not free and func.namespace != "prim":
            ours = func.namespace == "vla_pruner"
            self._operators += LAUNCHES.get(func._opname, 1) if ours else 1
        return func(*args, **(kwargs or {}))


class _FromPython(TorchFunctionMode):
    """Counts Python numbers that become a tensor, and tensors that become Python's."""

    def __init__(self, waits: Counter[str]) -> None:
        super().__init__()
        self._waits = waits

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], Tensor):
            self._waits["torch.tensor(...)"] += 1
        elif func in (Tensor.tolist, Tensor.numpy, Tensor.cpu):
            self._waits[func.__name__] += 1
        return func(*args, **(kwargs or {}))


def _full_name(func: Any) -> str:
    return f"{func._opname}.{func._overloadname}"
