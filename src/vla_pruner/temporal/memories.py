"""What steps of episodes leave behind for the next ones, by name; the camera images of a step."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from typing import Generic, TypeVar

from torch import Tensor

from vla_pruner.core.episodes import Step

MOST_EPISODES = 64
"""Episodes that are remembered at once; the oldest are forgotten first."""

M = TypeVar("M")


class LastSteps(Generic[M]):
    """The last whole step of every episode: what was made of it, once it was over."""

    def __init__(self, most: int = MOST_EPISODES) -> None:
        self.most = most
        self.known: OrderedDict[Hashable, M] = OrderedDict()
        self._pending: dict[Hashable, tuple[Step, Callable[[int], M], int]] = {}

    def of(self, ids: Iterable[Hashable]) -> tuple[M | None, ...]:
        """What each row of a step that begins remembers; the steps before it are over."""
        ids = tuple(ids)
        for name in dict.fromkeys(ids):
            self._settle(name)
        return tuple(self.known.get(name) for name in ids)

    def hold(self, step: Step, make: Callable[[int], M]) -> None:
        """Remember `make(row)` of a step instead of the one before, once it is over."""
        for row, name in enumerate(step.ids):
            if name not in step.ids[:row]:
                self._pending[name] = (step, make, row)

    def forget(self, names: Iterable[Hashable] | None = None) -> None:
        """These episodes are over, or all."""
        for known in (self.known, self._pending):
            for name in list(known) if names is None else list(names):
                known.pop(name, None)

    def _settle(self, name: Hashable) -> None:
        """An episode's last step is over: remember it, unless it was interrupted."""
        if name not in self._pending:
            return
        step, make, row = self._pending.pop(name)
        if not step.whole or step.failed:
            return
        self.known[name] = make(row)
        self.known.move_to_end(name)
        while len(self.known) > self.most:
            self.known.popitem(last=False)


def frames_of_rows(frames: Tensor | None, batch: int, visual: Tensor, method: str) -> Tensor:
    """Camera images `[B, cameras, 3, H, W]` of each row of a step, beside its visual tokens.

    Args:
        frames: what the caller gave, or fewer rows where several rows are one (beams).
        batch: B.
        visual: a tensor on the device of the visual tokens.
        method: who compares them.

    Raises:
        ValueError: no frames, or frames that do not fit the batch.
    """
    if frames is None:
        raise ValueError(
            f"method {method!r} compares the camera images of two steps, and none "
            "came with this call; call `session.frame(images)` before each call of the model."
        )
    if len(frames) == 0 or batch % len(frames):
        raise ValueError(f"there are frames of {len(frames)} rows for a batch of {batch}.")
    return frames.detach().to(visual.device).repeat_interleave(batch // len(frames), dim=0)
