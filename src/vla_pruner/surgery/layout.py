"""What the cut has to know about a model: where its decoder, images and action queries are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Layout:
    """Where things are in one prefill of S tokens.

    Return the same object for the same layout: what is derived from it is then computed once.

    Args:
        visual: `[B, M]` or `[1, M]` int64, positions of the visual tokens, ascending in each row.
        views: visual tokens of each camera, in order; they sum to M.
        valid_rows: `[B, S]`, False (0) for padding, which does not vote; None: no padding.
        action_rows: the prefill's rows that are action queries, as a slice; None for models that
            write the action token by token: the last prefill row and every decode step.
        visual_valid: `[B, M]` bool, False for the tokens of a missing camera.
    """

    visual: Tensor
    views: tuple[int, ...]
    valid_rows: Tensor | None = None
    action_rows: slice | None = None
    visual_valid: Tensor | None = None


class Adapter(ABC):
    """Tells a session where things are in one model; one subclass per model family.

    Set `decoder` in `__init__` or in `bind`.
    """

    decoder: nn.Module
    """Module whose `forward` runs all layers once, with `inputs_embeds` or `input_ids` [B, S, ...],
    `past_key_values` if it has a cache, as the decoders of transformers do."""

    earliest_cut: int = 0
    """First layer before which tokens may be cut: not before the last that gets image features."""

    def bind(self, model: nn.Module) -> None:  # noqa: B027 - optional
        """Find `decoder` in `model`. `vp.prune` calls it once, before anything else."""

    @property
    def layers(self) -> Sequence[nn.Module]:
        """The decoder layers, first to last; each gets the hidden states [B, S, D] first."""
        return cast(Sequence[nn.Module], self.decoder.layers)

    def attention(self, layer: nn.Module) -> nn.Module:
        """Attention module of a layer; its `config` names the attention implementation."""
        return cast(nn.Module, getattr(layer, "self_attn", layer))

    @abstractmethod
    def layout(self, inputs: Tensor, kwargs: Mapping[str, Any]) -> Layout | None:
        """Layout of a prefill.

        Args:
            inputs: `[B, S, D]` embeddings or, for a decoder that embeds itself, `[B, S]` token ids.
            kwargs: the decoder's keyword arguments.

        Returns:
            None if this pass shows no image: it is left alone.
        """

    def attach(self, undo: ExitStack) -> None:  # noqa: B027 - optional
        """Listen to other modules if need be; whatever is done is undone by what goes on `undo`."""

    def describe(self) -> str:
        """One line for people."""
        return f"{type(self).__name__}: {type(self.decoder).__name__}, {len(self.layers)} layers"
