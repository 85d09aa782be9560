"""Which flow steps of an action expert count for the action score."""

from __future__ import annotations

from typing import Literal

Averaged = Literal["latter-half", "all"]


class FlowSteps:
    """Counts the passes of an expert in a call of the policy, and says which are averaged.

    Args:
        averaged: the "latter-half" of the steps (the paper's appendix B.1.1) or "all" (its section
            4.2).

    Raises:
        ValueError: another `averaged`.
    """

    def __init__(self, averaged: Averaged) -> None:
        if averaged not in ("latter-half", "all"):
            raise ValueError(f'`flow_steps={averaged!r}` is unknown; use "latter-half" or "all".')
        self.averaged = averaged
        self.begun = 0
        self.captured: bool | None = None
        """Whether the step in progress is averaged, where it is compiled by itself."""

    def restart(self, *_: object) -> None:
        """A call begins; also a hook of the decoder that prefills."""
        if self.captured is None:
            self.begun = 0

    def count(self, *_: object) -> None:
        """A step begins; also a hook of the expert."""
        if self.captured is None:
            self.begun += 1

    def counts(self, total: int) -> bool:
        """Whether the step in progress, of `total` in this call, is averaged."""
        if self.captured is not None:
            return self.captured
        return self.averaged == "all" or self.begun > total // 2
