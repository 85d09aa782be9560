"""What the ports of policies share: models of any size, and actions that are numbers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import nn

from .given.folder import CheckpointError

if TYPE_CHECKING:
    from .capture import Capture

__all__ = [
    "ATTENTION",
    "CheckpointError",
    "NonFiniteActionError",
    "Policy",
    "Port",
    "default_dtype",
    "share",
]

ATTENTION = ("sdpa", "eager")


class NonFiniteActionError(RuntimeError):
    """A policy worked out NaN or infinite numbers; none of them is handed on."""


class Policy(nn.Module):
    """What `vp.models.load` gives, for those who check types: a module that acts.

    The ports of this package are policies. A vision-language model of transformers is handed on as
    it is, and has no `predict_action`.
    """

    def predict_action(self, *args: Any, **kwargs: Any) -> np.ndarray:
        """Actions `[chunk, D]` or `[D]` for one observation, in the units of the robot."""
        raise NotImplementedError


class Port(Policy):
    """A policy whose sizes are a configuration; `reset_parameters` makes its weights random."""

    _one_pass = False
    """Whether a step is one pass of the decoder."""

    def capture(
        self, *, backend: str = "inductor", mode: str | None = None, bucket: int = 16
    ) -> Capture:
        """Compile whole steps, of the policy as it is pruned now, until `remove()` of the result.

        Args:
            backend: of `torch.compile`.
            mode: of `torch.compile`; on a GPU "reduce-overhead" replays CUDA graphs.
            bucket: prompts are padded to a multiple of so many tokens.

        Raises:
            RuntimeError, NotImplementedError, ValueError: see `models.capture.Capture`.
        """
        from .capture import Capture

        return Capture(self, backend=backend, mode=mode, bucket=bucket)

    def _attach(self, capture: Capture, undo: ExitStack) -> None:
        """Let captured passes take the place of eager ones, until `undo`."""
        raise NotImplementedError(
            f"{type(self).__name__} has no captured step; `session.compile()` compiles its decoder."
        )

    def reset_parameters(self) -> None:
        """Random weights, in place."""
        raise NotImplementedError

    @classmethod
    def build(
        cls,
        config: Any,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        attn_implementation: str = "sdpa",
        random: bool = True,
    ) -> Self:
        """A model of any size, allocated once, in its final dtype and place.

        With `random=False` the memory is left as it is, for weights that are loaded next.
        """
        made: Any = cls
        with torch.device("meta"), default_dtype(dtype):
            model: Self = made(config, attn_implementation=attn_implementation)
        model.eval()
        if torch.device(device).type == "meta":
            return model
        model.to_empty(device=device)
        if random:
            model.reset_parameters()
        return model


def share(policy: nn.Module) -> nn.Module:
    """The same modules once more, over the same weights: hooks of one do not touch the other."""
    kept = [*policy.parameters(), *policy.buffers(), getattr(policy, "tokenizer", None)]
    return copy.deepcopy(policy, {id(one): one for one in kept if one is not None})


def check_attention(name: Any) -> None:
    """Refuse an attention that the ports do not have. Errors: ValueError."""
    if name not in ATTENTION:
        raise ValueError(f"attn_implementation={name!r}: choose one of {', '.join(ATTENTION)}")


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Floating-point parameters made inside have this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def refuse_broken(broken: np.ndarray, what: str) -> None:
    """Stop if a row of a batch has no usable result. Looks at what is on the host already.

    Args:
        broken: bool `[B, ...]`, True where a number is none.
        what: which numbers, for the message.

    Raises:
        NonFiniteActionError: any is True.
    """
    if broken.any():
        rows = np.flatnonzero(broken.reshape(len(broken), -1).any(axis=1)).tolist()
        raise NonFiniteActionError(
            f"the policy's {what} are NaN or infinite (rows {rows} of the batch): no action is "
            "given. Its inputs were finite; look at the dtype (float16 overflows where bfloat16 "
            "does not), at the weights, and whether it happens without pruning."
        )
