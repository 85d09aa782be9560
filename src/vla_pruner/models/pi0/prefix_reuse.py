"""Let a prefix serve several calls while nothing has changed in front of the cameras."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from vla_pruner.core import hooks

from .modeling import Pi0, Prefix
from .processing import Inputs


@dataclass(eq=False)
class PrefixGate:
    """Decides call by call whether the prefix is read anew; `prefix_reuse` makes one.

    Args:
        calls: most calls that one prefix serves.
        threshold: the prefix is held while `change` stays below this.
        age: calls since the prefix of the last call was read, 0 if it was read in that call: how
            stale what the policy sees is.
        change: mean absolute difference of colours, 0..255, between the images of the last call and
            those that the held prefix was read from, of the camera and row that changed most;
            infinite where nothing could be compared.
        computed, reused: calls so far that read their prefix, and that did not.
    """

    calls: int
    threshold: float
    age: int = 0
    change: float = float("inf")
    computed: int = 0
    reused: int = 0
    _held: tuple[Inputs, tuple[str, ...] | None, Prefix, bool] | None = None
    _said: tuple[str, ...] | None = None

    def reset(self) -> None:
        """Forget the prefix: a new episode begins with a call of its own."""
        self._held = self._said = None
        self.age, self.change = 0, float("inf")

    def holds(self, inputs: Inputs) -> Prefix | None:
        """The held prefix, if it may stand for that of `inputs`."""
        said, held = self._said, self._held
        self.change = float("inf")
        if held is None or self.age + 1 >= self.calls:
            return None
        before, words, prefix, inference = held
        if inference != torch.is_inference_mode_enabled() or not _same(before, inputs):
            return None
        if said != words or (said is None and not torch.equal(before.tokens, inputs.tokens)):
            return None
        difference = (inputs.images - before.images).abs().flatten(2).mean(dim=2) * 127.5
        self.change = float((difference * inputs.image_mask).max())
        return prefix if self.change < self.threshold else None

    def read(self, inputs: Inputs, prefix: Prefix) -> None:
        """A prefix was computed from `inputs`."""
        # Whoever fills the same tensors with the next image must not change what is compared.
        own = replace(inputs, images=inputs.images.clone(), tokens=inputs.tokens.clone())
        self._held = (own, self._said, prefix, torch.is_inference_mode_enabled())
        self.age = 0
        self.computed += 1


def _same(one: Inputs, other: Inputs) -> bool:
    """Whether two inputs have the same shapes and the same cameras."""
    return one.images.shape == other.images.shape and torch.equal(one.image_mask, other.image_mask)


@contextmanager
def prefix_reuse(policy: Pi0, *, calls: int = 2, threshold: float = 2.0) -> Iterator[PrefixGate]:
    """Inside, calls reuse keys and values of an earlier call's prefix, and run the expert alone.

    A prefix serves at most `calls` calls in a row, as long as batch, cameras and instruction stay
    the same and no camera's image has changed by `threshold` or more since the prefix was read. In
    a batch all rows are held, or none. The expert still gets the robot's state of now and new noise
    (pi0); pi0.5 writes the state into its prompt, so that a held prefix holds the state of then.

    Comparing images waits for the device, once per call.

    Args:
        policy: pi0 or pi0.5, with or without a pruning session.
        calls: at least 1; 1 changes nothing.
        threshold: colours, 0..255; see `PrefixGate`. Infinity: whatever changes.

    Raises:
        ValueError: an option out of range.

    With a session, `gate.reset()` belongs beside each `session.reset()`.
    """
    if isinstance(calls, bool) or not isinstance(calls, int) or calls < 1:
        raise ValueError(f"`calls={calls!r}` must be an integer of at least 1.")
    if not threshold > 0:
        raise ValueError(f"`threshold={threshold!r}` must be positive, in colours of 0..255.")
    gate = PrefixGate(calls, threshold)
    read, prepare = policy.read_prefix, policy.prepare

    def preparing(observations: Sequence[Mapping[str, Any]]) -> Inputs:
        inputs = prepare(observations)
        gate._said = tuple(str(observation["instruction"]) for observation in observations)
        return inputs

    def reading(inputs: Inputs) -> Prefix:
        held = gate.holds(inputs)
        if held is None:
            held = read(inputs)
            gate.read(inputs, held)
        else:
            gate.age += 1
            gate.reused += 1
        gate._said = None
        return held

    with ExitStack() as undo:
        undo.callback(gate.reset)
        hooks.replace(policy, "read_prefix", reading, undo)
        hooks.replace(policy, "prepare", preparing, undo)
        yield gate
