"""What is attached to a model and taken off again."""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType
from typing import Self


class Attached:
    """A context manager whose `remove` undoes what was pushed on `_undo`, once."""

    _undo: ExitStack

    def remove(self) -> None:
        """Detach: the model is what it was before. Does nothing the second time."""
        self._undo.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()
