"""Prefix reuse: a flow policy runs its expert alone while nothing has changed."""

from __future__ import annotations

from collections.abc import Hashable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

from vla_pruner.core.cut import Cut
from vla_pruner.core.layout import Adapter
from vla_pruner.methods.base import Method
from vla_pruner.pruning.options import require_int


@dataclass(frozen=True, kw_only=True)
class PrefixReuse(Method):
    """Keep every token, and use the keys and values of an earlier call's prefix again.

    A prefix serves at most `calls` calls of the policy in a row, as long as the instruction stays
    and no camera's image has changed by `threshold` or more since the prefix was read (mean
    absolute difference of colours, 0..255, of the camera that changed most). The first call of an
    episode reads its own. The action expert runs in every call, from the robot's state of now.

    Args:
        keep: unused; nothing is cut.
        budget: unused.
        calls: calls that one prefix serves at most, at least 1; 1: every call reads its own.
        threshold: colours, positive; infinity: reuse whatever changes.

    Reference: the whole-prefix reuse of FlashRT for pi0.5 (`cache_frames`), which has no gate.

    Differences: the gate is our specification.
    """

    name: ClassVar[str] = "prefix-reuse"
    summary: ClassVar[str] = "a flow policy's prefix serves several calls"
    licence: ClassVar[str] = "Apache-2.0 (public code: Apache-2.0, not used)"

    keep: float | int = 1.0

    calls: int = 2
    threshold: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_int("calls", self.calls, 1)
        if not self.threshold > 0:
            raise ValueError(
                f"`threshold={self.threshold}` must be positive, in colours of 0..255."
            )

    def cuts(self, num_layers: int) -> tuple[int, ...]:
        """No layer."""
        return ()

    def hooks(self, adapter: Any) -> Any:
        """Hooks that hold a prefix.

        Raises:
            ValueError: a model that has none.
        """
        return HoldingCut(adapter, self)


class HoldingCut(Cut):
    """Cuts nowhere; the policy's own `read_prefix` is held by a gate (`gate`)."""

    def __init__(self, adapter: Adapter, method: PrefixReuse) -> None:
        super().__init__(adapter, method)
        self.options = method
        self.gate: Any = None
        if not hasattr(adapter, "hold_prefix"):
            raise ValueError(
                f"method {method.name!r} holds the prefix of a flow policy, and "
                f"{type(adapter).__name__} knows of none in this model; it is for this package's "
                "pi0 and pi0.5. Use another method."
            )

    def attach(self, undo: ExitStack) -> None:
        """Install the gate; `undo` takes it away."""
        super().attach(undo)
        hold: Any = getattr(self.adapter, "hold_prefix")  # noqa: B009 - not all adapters have it
        self.gate = hold(self.options.calls, self.options.threshold, undo)

    def forget(self, ids: tuple[Hashable, ...] | None) -> None:
        """An episode is over: the next call reads its own prefix."""
        if self.gate is not None:
            self.gate.reset()
