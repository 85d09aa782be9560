"""SmolVLA of lerobot, whose loop over layers is not made of module calls."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, cast
from weakref import WeakSet

from torch import Tensor, nn

from vla_pruner.core.hooks import Shown, replace
from vla_pruner.models.adapters.prefix import PrefixAdapter

_taken: WeakSet[nn.Module] = WeakSet()


class _Layer(nn.Module):
    """Stands for one layer of one stack, so that hooks can change what it gets."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index
        self.self_attn = Shown()
        self.result: Any = None

    def forward(
        self,
        hidden_states: Tensor,
        *,
        attention_mask: Tensor,
        position_ids: Tensor,
        call: Callable[[Tensor, Tensor, Tensor], Any],
    ) -> Tensor:
        """Run the policy's own code; `attention_mask` is `[B, 1, Q, N]`."""
        self.result = call(hidden_states, attention_mask[:, 0], position_ids)
        return hidden_states


class _Stack(nn.Module):
    """Stands for the vision-language model's layers, or the expert's."""

    def __init__(self, depth: int, config: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(index) for index in range(depth))
        self.config = config

    def forward(self, *, inputs_embeds: Tensor, call: Callable[[], Any], **_: Any) -> _Output:
        """Run the policy's own code; the cache that it fills is known by a mark."""
        return _Output(call())


class _Output:
    """What a pass of a stack made, shaped like the output of a decoder of transformers."""

    def __init__(self, result: Any) -> None:
        self.result = result
        self.past_key_values = _Mark()

    def __getitem__(self, index: int) -> Tensor:
        """0: the last hidden states `[B, n, D]`, of the stack that ran."""
        return [hidden for hidden in self.result[0] if hidden is not None][index]


class _Mark:
    """Stands for a filled cache: lerobot 0.4 has a dictionary there, 0.6 a `DynamicCache`."""

    def get_seq_length(self, layer: int = 0) -> int:
        """Not empty."""
        return 1


class SmolVLAAdapter(PrefixAdapter):
    """`SmolVLAPolicy` of lerobot or its `VLAFlowMatching`.

    The prefix (cameras, instruction, robot state) is pruned, the action expert reads what is left,
    and all of its rows are action queries in every flow step.

    Args:
        policy: the policy or its inner model.

    Raises:
        TypeError: `policy` is not built like this.
    """

    skips_layers = False

    def __init__(self, policy: nn.Module) -> None:
        core = _core(policy)
        model: Any = core.vlm_with_expert
        super().__init__(policy, core, model)
        depth, config = int(model.num_vlm_layers), model.config.text_config
        self.decoder, self.reader = _Stack(depth, config), _Stack(depth, config)
        if getattr(core, "add_image_special_tokens", False):
            self.special_before, self.special_behind = 2, 1
        self._mark: _Mark | None = None
        self._attending: Shown | None = None

    def attach(self, undo: ExitStack) -> None:
        """Route the model's passes, layers and attentions through stand-ins with hooks.

        Raises:
            RuntimeError: another session is attached to this policy.
        """
        model: Any = self.embedder
        if model in _taken:
            raise RuntimeError(
                "this policy already has a pruning session; call `session.remove()` on it, or "
                "leave its `with` block, before attaching another."
            )
        undo.callback(_taken.discard, model)
        _taken.add(model)
        super().attach(undo)
        for name, made in (
            ("forward", self._passes(model.forward)),
            ("forward_attn_layer", self._layered(model.forward_attn_layer)),
            ("forward_cross_attn_layer", self._layered(model.forward_cross_attn_layer)),
            ("eager_attention_forward", self._attends(model.eager_attention_forward)),
        ):
            replace(model, name, made, undo)

    def project(self, layer: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys of the real layer that a stand-in stands for."""
        assert isinstance(layer, _Layer)
        model: Any = self.embedder
        real: Any = model.get_vlm_model().text_model.layers[layer.index]
        return super().project(real, hidden.to(real.self_attn.q_proj.weight.dtype))

    # ------------------------------------------------------------------ stand-ins
    def _passes(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*, inputs_embeds: list[Tensor | None], **kwargs: Any) -> Any:
            prefix, suffix = inputs_embeds
            if (prefix is None) == (suffix is None):
                return original(inputs_embeds=inputs_embeds, **kwargs)
            stack = self.reader if prefix is None else self.decoder
            assert stack is not None
            output = stack(
                inputs_embeds=suffix if prefix is None else prefix,
                attention_mask=kwargs["attention_mask"][:, None],
                past_key_values=self._mark if prefix is None else None,
                call=lambda: original(inputs_embeds=inputs_embeds, **kwargs),
            )
            if prefix is not None:
                self._mark = output.past_key_values
                _crop_to_what_is_left(output.result[1], prefix.shape[1])
            return output.result

        return forward

    def _layered(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def run(
            model_layers: Any,
            inputs_embeds: list[Tensor | None],
            layer_idx: int,
            position_ids: Tensor,
            attention_mask: Tensor,
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            which = 1 if inputs_embeds[0] is None else 0
            stack, hidden = (self.decoder, self.reader)[which], inputs_embeds[which]
            if stack is None or hidden is None or inputs_embeds[1 - which] is not None:
                return original(
                    model_layers,
                    inputs_embeds,
                    layer_idx,
                    position_ids,
                    attention_mask,
                    *args,
                    **kwargs,
                )
            layer = cast(_Layer, cast(_Stack, stack).layers[layer_idx])

            def call(hidden: Tensor, mask: Tensor, positions: Tensor) -> Any:
                inputs_embeds[which] = hidden  # The caller's loop goes on with what is left.
                self._attending = layer.self_attn
                return original(
                    model_layers, inputs_embeds, layer_idx, positions, mask, *args, **kwargs
                )

            try:
                layer(
                    hidden,
                    attention_mask=attention_mask[:, None],
                    position_ids=position_ids,
                    call=call,
                )
                return layer.result
            finally:
                self._attending = layer.result = None

        return run

    def _attends(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def attend(
            mask: Tensor, batch: int, head_dim: int, query: Tensor, key: Tensor, value: Tensor
        ) -> Any:
            output = original(mask, batch, head_dim, query, key, value)
            if self._attending is not None:
                self._attending.show(
                    query.transpose(1, 2),
                    key.transpose(1, 2),
                    mask[:, None],
                    scaling=head_dim**-0.5,
                )
            return output

        return attend


def _crop_to_what_is_left(cache: Any, length: int) -> None:
    """Let `cache.crop(length)` take the suffix away from layers that hold less than the prefix."""
    for layer in getattr(cache, "layers", ()):
        removed = length - int(layer.get_seq_length())
        if removed > 0:
            crop = layer.crop
            layer.crop = lambda to, crop=crop, removed=removed: crop(to - removed if to > 0 else to)


def _core(policy: nn.Module) -> nn.Module:
    for found in (policy, getattr(policy, "model", None)):
        if isinstance(getattr(found, "vlm_with_expert", None), nn.Module):
            return cast(nn.Module, found)
    raise TypeError(
        f"{type(policy).__name__} has no `vlm_with_expert`; expected SmolVLA of lerobot, or its "
        "inner model."
    )


def adapter(model: nn.Module) -> SmolVLAAdapter:
    """The adapter of a SmolVLA policy."""
    return SmolVLAAdapter(model)
