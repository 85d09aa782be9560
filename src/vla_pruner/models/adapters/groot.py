"""GR00T of lerobot: a vision-language model, and a diffusion head that reads its output."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, cast

from torch import Tensor, nn

from vla_pruner.core.arguments import take
from vla_pruner.core.hooks import Shown, replace
from vla_pruner.core.layout import Layout
from vla_pruner.core.session import Session
from vla_pruner.models.adapters.patching import reset_with
from vla_pruner.models.flow_steps import Averaged, FlowSteps
from vla_pruner.models.hf_vlm import ImageTokenVLM

_PER_TOKEN = ("backbone_features", "backbone_attention_mask", "image_mask")


class GrootAdapter(ImageTokenVLM):
    """`GrootPolicy` of lerobot or its inner model.

    Tokens are cut in the vision-language model. Its output reaches the head without them: the
    head's self-attention over it has no mask, so zeros in their place would be seen. The rows of
    the action chunk are the action queries, in those blocks of the diffusion transformer that
    attend to image tokens; `action_layers` of a method count these blocks alone.

    Args:
        policy: the policy or its inner model.
        flow_steps: flow steps whose action attention is averaged: the "latter-half" (the paper's
            appendix B.1.1) or "all" (its section 4.2).

    Raises:
        TypeError: `policy` is not built like this.
        NotImplementedError: the head numbers the tokens that it gets.
        ValueError: another `flow_steps`.
    """

    reads_output = True

    def __init__(self, policy: nn.Module, *, flow_steps: Averaged = "latter-half") -> None:
        self._steps = FlowSteps(flow_steps)
        core: Any = _core(policy)
        super().__init__(core.backbone.get_submodule(_vlm_name(core.backbone)))
        self.policy, self.head = policy, core.action_head
        self.reader = cast(nn.Module, self.head.model)
        self._blocks = _image_blocks(self.reader)
        self._mixers = list(getattr(self.head.vl_self_attention, "transformer_blocks", ()))
        if any(block.pos_embed is not None for block in self._mixers):
            raise NotImplementedError(
                f"{type(self.head).__name__}.vl_self_attention adds positions to the tokens that "
                "it gets, which removed tokens would shift; this configuration cannot be pruned."
            )
        self._shown = {block: Shown() for block in self._blocks}
        self._present: Tensor | None = None
        self._prompt: int | None = None

    @property
    def reader_layers(self) -> Sequence[nn.Module]:
        """The blocks that attend to image tokens, first to last."""
        return self._blocks

    def attention(self, layer: nn.Module) -> nn.Module:
        """For a block of the head, what stands for its attention."""
        shown = self._shown.get(layer)
        return super().attention(layer) if shown is None else shown

    def reader_rows(self, length: int) -> slice | None:
        """The chunk, behind the state; None in flow steps that are not averaged."""
        if not self._steps.counts(self.head.num_inference_timesteps):
            return None
        return slice(length - self.head.action_horizon, length)

    def attach(self, undo: ExitStack) -> None:
        """Listen to the ids, count the flow steps, and show the head's attentions."""
        super().attach(undo)
        assert self.reader is not None
        undo.callback(self.reader.register_forward_pre_hook(self._steps.count).remove)
        for block, shown in self._shown.items():
            _show(cast(nn.Module, block.attn1), shown, undo)

    def layout(self, inputs: Tensor, kwargs: Mapping[str, Any]) -> Layout | None:
        """As of every vision-language model; the head is asked for as many tokens later."""
        self._prompt = inputs.shape[1]
        return super().layout(inputs, kwargs)

    def follow(self, session: Session, undo: ExitStack) -> None:
        """Give the head what each cut left; `reset` of the policy begins new episodes."""
        process: Callable[[Any], Any] = self.head.process_backbone_output

        def processed(output: Any) -> Any:
            self._steps.restart()
            left = session.left
            self._present = None if left is None else left.present
            if left is not None and left.rows is not None:
                self._shorten(output, left.rows)
            return process(output)

        replace(self.head, "process_backbone_output", processed, undo)
        undo.callback(setattr, self, "_present", None)
        for block in (*self._mixers, *self._blocks):
            hide = block.attn1.register_forward_pre_hook(self._hide, with_kwargs=True)
            undo.callback(hide.remove)
        if hasattr(self.policy, "reset"):
            reset_with(self.policy, session, undo)

    def _shorten(self, output: Any, positions: Tensor) -> None:
        """Take what is at `positions` `[B, n]` of all that the backbone says of each token.

        Raises:
            ValueError: the backbone says something of other tokens than it was given.
        """
        length = output["backbone_features"].shape[1]
        if length != self._prompt:
            raise ValueError(
                f"{type(self.head).__name__} gets {length} tokens of a prompt of {self._prompt}; "
                "this version of the policy is not known."
            )
        for name in _PER_TOKEN:
            if name in output:
                features = output[name]
                index = positions.to(features.device)
                output[name] = take(features, index, dim=1)

    def _hide(self, attention: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Where tokens are hidden instead of removed, hide them here too."""
        if self._present is None:
            return None
        mask = kwargs.get("attention_mask")
        mask = self._present if mask is None else mask.bool() & self._present
        return args, {**kwargs, "attention_mask": mask}


def _show(attention: nn.Module, shown: Shown, undo: ExitStack) -> None:
    """Let `shown` tell what an attention of diffusers compares, `[B, H, n, d]` each."""
    found: dict[str, Tensor] = {}

    def note(name: str) -> Callable[..., None]:
        def noted(module: nn.Module, args: Any, output: Tensor) -> None:
            heads = cast(int, attention.heads)
            found[name] = output.unflatten(-1, (heads, -1)).transpose(1, 2)

        return noted

    def show(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        mask, scale = kwargs.get("attention_mask"), attention.scale
        query, key = found.pop("query"), found.pop("key")
        shown.show(query, key, mask, scaling=scale, is_causal=False)

    for name, linear in (("query", attention.to_q), ("key", attention.to_k)):
        undo.callback(cast(nn.Module, linear).register_forward_hook(note(name)).remove)
    undo.callback(attention.register_forward_hook(show, with_kwargs=True).remove)


def _image_blocks(transformer: Any) -> list[nn.Module]:
    """Blocks that attend to image tokens: all with cross-attention, but for those to text alone."""
    every = getattr(transformer, "attend_text_every_n_blocks", None)
    return [
        block
        for index, block in enumerate(transformer.transformer_blocks)
        if block.attn1.is_cross_attention and (every is None or index % (2 * every))
    ]


def _core(policy: nn.Module) -> nn.Module:
    for found in (policy, getattr(policy, "_groot_model", None)):
        if all(hasattr(found, name) for name in ("backbone", "action_head")):
            return cast(nn.Module, found)
    raise TypeError(
        f"{type(policy).__name__} has no `backbone` and `action_head`; expected GR00T of lerobot, "
        "or its inner model."
    )


def _vlm_name(backbone: nn.Module) -> str:
    """N1.7 calls the vision-language model `model`, N1.5 `eagle_model`."""
    return "eagle_model" if hasattr(backbone, "eagle_model") else "model"


def adapter(model: nn.Module) -> GrootAdapter:
    """The adapter of a GR00T policy."""
    return GrootAdapter(model)
