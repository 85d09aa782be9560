"""Broken numbers that only the device has seen: noted during a step, refused when one may wait."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

HOST = ("cpu",)
"""Devices whose values are there already: looking at them makes nobody wait."""

_open: ContextVar[Flags | None] = ContextVar("vla_pruner_flags", default=None)


class Flags:
    """What a step found broken, on the device until somebody asks."""

    def __init__(self) -> None:
        self.noted: list[tuple[Tensor, str]] = []

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Inside, `refuse` notes what it would have to wait for."""
        before = _open.set(self)
        try:
            yield
        finally:
            _open.reset(before)

    def note(self, broken: Tensor, message: str) -> None:
        """Remember a bool `[]` and what it means."""
        self.noted.append((broken, message))

    def raise_noted(self) -> None:
        """Wait for the device, once, and forget what was noted.

        Raises:
            ValueError: the first thing that is broken.
        """
        noted, self.noted = self.noted, []
        if not noted:
            return
        found = torch.stack([broken for broken, _ in noted]).tolist()
        for broken, (_, message) in zip(found, noted, strict=True):
            if broken:
                raise ValueError(message)


def may_read(tensor: Tensor) -> bool:
    """Whether values may be looked at: not while a graph is compiled or captured."""
    if torch.compiler.is_compiling():
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def refuse(broken: Tensor, message: str) -> None:
    """Refuse what is broken: at once, or once the flags of the step in progress are read.

    Args:
        broken: bool `[]`.
        message: what is wrong.

    Raises:
        ValueError: `message`.
    """
    if not may_read(broken):
        return
    flags = _open.get()
    if flags is not None and broken.device.type not in HOST:
        flags.note(broken, message)
    elif bool(broken):
        raise ValueError(message)
