"""What a method that remembers sees when a step begins, and what it keeps when the step is over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vla_pruner.methods.base import Method

Memory = Mapping[str, Tensor]
"""What one episode remembers; tensors of the same names and shapes at every step."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Now:
    """A step that is about to cut for the first time: B rows, M visual tokens.

    Args:
        features: `[B, M, D]`, projected visual embeddings as they enter layer 0.
        scores: `[B, M]` fp32, what `Method.scores` asks for at the first cut.
        memory: `[B, ...]`, the memory of each row; zeros in rows that remember nothing.
        known: `[B]` bool, rows that remember something.
        frames: `[B, cameras, 3, H, W]` camera images in raw colours, for methods that need "frame".
        views: visual tokens of each camera; they sum to M.
        valid: `[B, M]` bool, False for the tokens of a missing camera; None: none is missing.
        text, text_valid: `[B, T, D]` and `[B, T]`, see `Evidence`; for methods that need "text".
        motion: what the caller reported of each row's episode, oldest first.
    """

    features: Tensor
    scores: Mapping[str, Tensor]
    memory: Memory
    known: Tensor
    frames: Tensor | None
    views: tuple[int, ...]
    valid: Tensor | None = None
    text: Tensor | None = None
    text_valid: Tensor | None = None
    motion: tuple[tuple[float, ...], ...] = ()


@dataclass(frozen=True, eq=False, kw_only=True)
class Seen:
    """A step of one episode that is over: M visual tokens.

    Args:
        features: `[M, D]`, see `Now`.
        scores: `[M]`, what was read for the first cut.
        expected: `[M]`, what `RememberingMethod.expect` said; empty if the step ran on all tokens.
        action: `[M]`, mean attention of the action queries over `Method.history`'s layers; None:
            the method has no history.
        frames: `[cameras, 3, H, W]`, see `Now`.
        memory: before the step; None: nothing.
        views: visual tokens of each camera.
        late: `[M]`, the instruction's mean attention in layer `Remembering.late_layer`, 0 at tokens
            that had left; None: no such layer.
    """

    features: Tensor
    scores: Mapping[str, Tensor]
    expected: Mapping[str, Tensor]
    action: Tensor | None
    frames: Tensor | None
    memory: Memory | None
    views: tuple[int, ...]
    late: Tensor | None = None


class Remembering:
    """What a `Method` with a memory defines besides; write `class Mine(Remembering, OneCut)`.

    What `expect` returns is in `Evidence.scores` of every cut.
    """

    def hooks(self, adapter: Any) -> Any:
        """Hooks that remember."""
        from vla_pruner.temporal.hooks import RememberingCut

        assert isinstance(self, Method)
        return RememberingCut(adapter, self)

    def starts_full(self, memory: Memory | None) -> bool:
        """Whether a step with this memory (None: nothing yet) runs on all tokens."""
        return memory is None

    def late_layer(self, num_layers: int) -> int | None:
        """A layer behind the cuts whose attention from the instruction is remembered (`Seen.late`).

        None: no such layer. One that nothing else reads, neither a score nor `Method.history`.
        """
        return None

    def expect(self, now: Now) -> Mapping[str, Tensor]:
        """Scores `[B, M]` fp32 that follow from the memory, by name; finite in every row."""
        raise NotImplementedError(f"{type(self).__name__} has to define `expect`.")

    def remember(self, seen: Seen) -> Memory:
        """The memory of an episode after a step; detached, and in its own storage."""
        raise NotImplementedError(f"{type(self).__name__} has to define `remember`.")
