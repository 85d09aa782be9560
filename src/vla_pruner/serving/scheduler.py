"""Which of the waiting observations go into the next pass: rows of one kind, the oldest first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar


class Row(Protocol):
    """An observation that waits for a pass."""

    @property
    def warm_up(self) -> bool:
        """Whether its step runs on all tokens."""

    @property
    def text(self) -> int:
        """Bytes of its instruction."""


R = TypeVar("R", bound=Row)


def next_pass(waiting: Sequence[R], most: int) -> list[R]:
    """Rows of the next pass: at most `most`, all of the oldest one's kind, in order of arrival.

    A pass with warm-up rows among pruned ones would run on all tokens and hide those that are
    pruned; a long prompt would pad all others to its length. Either costs everybody, so such rows
    run by themselves. The oldest row is always in it: nobody starves.
    """
    if not waiting:
        return []
    wanted = kind(waiting[0])
    return [row for row in waiting if kind(row) == wanted][:most]


def kind(row: Row) -> tuple[bool, int]:
    """Rows of one kind share a pass: warm-up or not, and prompts of about one length."""
    return row.warm_up, max(row.text.bit_length(), 8)
