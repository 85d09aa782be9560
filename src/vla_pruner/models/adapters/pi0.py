"""pi0, pi0.5 and pi0-FAST as lerobot and openpi ship them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace as replace_fields
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from vla_pruner.core.hooks import replace
from vla_pruner.core.layout import Layout
from vla_pruner.core.session import Session
from vla_pruner.models.adapters.patching import one_step, run_hooks_on_forward
from vla_pruner.models.adapters.prefix import PrefixAdapter
from vla_pruner.models.flow_steps import Averaged, FlowSteps
from vla_pruner.models.towers import of_transformers
from vla_pruner.towers.reading import Tower


class FlowPolicyAdapter(PrefixAdapter):
    """`PI0Policy`, `PI05Policy` of lerobot, `PI0Pytorch` of both.

    PaliGemma's prefix is pruned; the Gemma expert reads what is left, and the rows of its action
    chunk are the action queries. Both stacks run with eager attention, which the policies ask for
    in their first call.

    Args:
        policy: the policy or its inner model.
        flow_steps: Euler steps whose action attention is averaged: the "latter-half" (the paper's
            appendix B.1.1) or "all" (its section 4.2).

    Raises:
        TypeError: `policy` is not built like these.
        ValueError: another `flow_steps`.
    """

    def __init__(self, policy: nn.Module, *, flow_steps: Averaged = "latter-half") -> None:
        self._steps = FlowSteps(flow_steps)
        core = _core(policy)
        stacks: Any = core.paligemma_with_expert
        super().__init__(policy, core, stacks)
        self.paligemma: nn.Module = stacks.paligemma
        self.decoder, self.reader = _language_model(stacks.paligemma), stacks.gemma_expert.model
        config: Any = core.config
        # lerobot and openpi have their own names for the same two numbers.
        self._chunk = int(getattr(config, "chunk_size", None) or config.action_horizon)
        self._default_steps = int(getattr(config, "num_inference_steps", None) or 10)
        self._flow_steps = self._default_steps

    def attach(self, undo: ExitStack) -> None:
        """Listen; let direct calls of `forward` run hooks; count the flow steps of each call."""
        super().attach(undo)
        sample: Any = getattr(self.core, "sample_actions")  # noqa: B009

        def sampled(*args: Any, **kwargs: Any) -> Any:
            self._flow_steps = kwargs.get("num_steps") or self._default_steps
            return sample(*args, **kwargs)

        replace(self.core, "sample_actions", sampled, undo)
        for stack, count in ((self.decoder, self._steps.restart), (self.reader, self._steps.count)):
            assert stack is not None
            use_eager_attention(stack, undo)
            run_hooks_on_forward(stack, undo)
            undo.callback(stack.register_forward_pre_hook(count).remove)

    def towers(self) -> tuple[Tower, ...]:
        """PaliGemma's SigLIP."""
        return of_transformers(self.paligemma)

    def reader_rows(self, length: int) -> slice | None:
        """The chunk, behind pi0's state token; None in flow steps that are not averaged."""
        if not self._steps.counts(self._flow_steps):
            return None
        return slice(length - self._chunk, length)


class FastPolicyAdapter(PrefixAdapter):
    """`PI0FastPolicy` of lerobot: PaliGemma writes the action token by token."""

    embed_prefix = "embed_prefix_fast"
    samplers = ("sample_actions_fast", "sample_actions_fast_kv_cache")

    def __init__(self, policy: nn.Module) -> None:
        core = _core(policy)
        stacks: Any = core.paligemma_with_expert
        super().__init__(policy, core, stacks)
        self.paligemma: nn.Module = stacks.paligemma
        self.decoder = _language_model(stacks.paligemma)

    def attach(self, undo: ExitStack) -> None:
        """Listen; let direct calls of `forward` run hooks."""
        super().attach(undo)
        run_hooks_on_forward(self.decoder, undo)

    def towers(self) -> tuple[Tower, ...]:
        """PaliGemma's SigLIP."""
        return of_transformers(self.paligemma)

    def layout(self, inputs: Tensor, kwargs: Mapping[str, Any]) -> Layout | None:
        """The prefix, and behind it the tokens written so far where there is no cache."""
        found = self._layout
        if found is None or found.valid_rows is None or inputs.ndim != 3:
            return None
        written = inputs.shape[1] - found.valid_rows.shape[1]
        if written < 0:
            return None
        return replace_fields(found, valid_rows=F.pad(found.valid_rows, (0, written), value=True))

    def follow(self, session: Session, undo: ExitStack) -> None:
        """One call is one step: without a cache, every new token is another prefill."""
        super().follow(session, undo)
        for name in self.samplers:
            one_step(self.core, name, session, undo)


def use_eager_attention(stack: nn.Module, undo: ExitStack) -> None:
    """Before it is pruned, what the policies set in their first call: eager attention."""
    config = cast(Any, stack.config)
    own, name = vars(config), "_attn_implementation_internal"
    undo.callback(own.__setitem__, name, own[name])
    own[name] = "eager"


def adapter(model: nn.Module) -> PrefixAdapter:
    """The adapter of a pi0, pi0.5 or pi0-FAST policy."""
    core = _core(model)
    return (
        FastPolicyAdapter(model) if hasattr(core, "embed_prefix_fast") else FlowPolicyAdapter(model)
    )


def _core(policy: nn.Module) -> nn.Module:
    for found in (policy, getattr(policy, "model", None)):
        if isinstance(getattr(found, "paligemma_with_expert", None), nn.Module):
            return cast(nn.Module, found)
    raise TypeError(
        f"{type(policy).__name__} has no `paligemma_with_expert`; expected a pi0 policy of lerobot "
        "or openpi, or its inner model."
    )


def _language_model(paligemma: Any) -> nn.Module:
    """Gemma inside PaliGemma; older transformers keep it one level higher, inside a head."""
    found = getattr(getattr(paligemma, "model", None), "language_model", None)
    found = paligemma.language_model if found is None else found
    return cast(nn.Module, getattr(found, "model", found))
