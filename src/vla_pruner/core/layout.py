"""What the cut has to know about a model: where its decoder, images and action queries are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from vla_pruner.core.hooks import queries_and_keys

if TYPE_CHECKING:
    from vla_pruner.core.session import Session


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
        text_rows: `[B, T]` or `[1, T]` int64, positions of the instruction's tokens; None: unknown.
            Entries that are -1, or padding according to `valid_rows`, are left out.
        read: visual tokens (0..M-1, ascending) whose own output rows the caller reads, such as one
            that ends the prompt or stands before a label. They take their places of the budget.
    """

    visual: Tensor
    views: tuple[int, ...]
    valid_rows: Tensor | None = None
    action_rows: slice | None = None
    visual_valid: Tensor | None = None
    text_rows: Tensor | None = None
    read: tuple[int, ...] = ()


_ATTENTIONS = ("self_attn", "attention", "attn", "self_attention", "multi_head_attention")


class Adapter(ABC):
    """Tells a session where things are in one model; one subclass per model family.

    Set `decoder` in `__init__` or in `bind`.
    """

    decoder: nn.Module
    """Module whose `forward` runs all layers once, with `inputs_embeds` or `input_ids` [B, S, ...],
    `past_key_values` if it has a cache, as the decoders of transformers do."""

    earliest_cut: int = 0
    """First layer before which tokens may be cut: not before the last that gets image features."""

    reader: nn.Module | None = None
    """A second stack of as many layers (an action expert): its layer i attends to the keys and
    values that the decoder's layer i left in `past_key_values`, and then to its own. Tokens are cut
    in the decoder; the reader's rows are the action queries."""

    reads_output: bool = False
    """Whether `reader` attends to the decoder's output instead, as a diffusion head with
    cross-attention does, in as many layers as it has. The adapter then hands it what is left
    (`Session.left`) and shows its attention (`core.hooks.Shown`)."""

    skips_layers: bool = True
    """Whether layers can be left out, for methods that skip some."""

    gives_frames: bool = False
    """Whether the camera images of two steps can be compared, token by token: the visual tokens of
    a camera are the patches of its image, row by row. See `send_frames`."""

    def bind(self, model: nn.Module) -> None:  # noqa: B027 - optional
        """Find `decoder` in `model`. `vp.prune` calls it once, before anything else."""

    @property
    def layers(self) -> Sequence[nn.Module]:
        """The decoder layers, first to last; each gets the hidden states [B, S, D] first."""
        return cast(Sequence[nn.Module], self.decoder.layers)

    @property
    def reader_layers(self) -> Sequence[nn.Module]:
        """The layers of `reader`, first to last; none without one."""
        return () if self.reader is None else cast(Sequence[nn.Module], self.reader.layers)

    def reader_rows(self, length: int) -> slice | None:
        """Rows of the reader's pass in progress, of `length`, that are action queries.

        None: this pass is not watched.
        """
        return slice(0, length)

    def attention(self, layer: nn.Module) -> nn.Module:
        """Attention of a layer, or itself; its `config` names the attention implementation."""
        found = next((getattr(layer, name) for name in _ATTENTIONS if hasattr(layer, name)), layer)
        return cast(nn.Module, found)

    @abstractmethod
    def layout(self, inputs: Tensor, kwargs: Mapping[str, Any]) -> Layout | None:
        """Layout of a prefill.

        Args:
            inputs: `[B, S, D]` embeddings or, for a decoder that embeds itself, `[B, S]` token ids.
            kwargs: the decoder's keyword arguments.

        Returns:
            None if this pass shows no image: it is left alone.
        """

    def continued(self, inputs: Tensor, kwargs: Mapping[str, Any], past: int) -> Layout | None:
        """Layout of a pass that continues a cache of `past` tokens; the default: no image.

        Positions count from the pass's own first row.
        """
        return None

    def left_alone(self) -> str | None:
        """Why an image may have been in the last pass although `layout` found none; None: none was.

        The session warns once, and says it in `session.last`.
        """
        return None

    def project(self, layer: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Queries `[B, Hq, n, d]` and keys `[B, Hkv, n, d]` of a layer before rotary positions.

        Args:
            layer: a decoder layer.
            hidden: `[B, n, D]`, what it gets.

        Raises:
            NotImplementedError: a layer that is not built like those of Llama.
        """
        return queries_and_keys(layer, self.attention(layer), hidden)

    def attach(self, undo: ExitStack) -> None:  # noqa: B027 - optional
        """Listen to other modules if need be; whatever is done is undone by what goes on `undo`."""

    def cache_flow(self, interval: int, undo: ExitStack) -> None:
        """Run the layers of an action expert in every `interval`-th flow step only, until `undo`.

        Raises:
            ValueError: the model has no such expert.
        """
        raise ValueError(
            f"`flow_interval={interval}` leaves out flow steps of an action expert, and "
            f"{type(self).__name__} knows of none in this model; use `flow_interval=1`."
        )

    def send_frames(self, take: Callable[[Tensor], None], undo: ExitStack) -> None:  # noqa: B027
        """Call `take` with the camera images of each call, before the decoder runs.

        `[B, cameras, 3, H, W]`, raw colours from 0 up, as the vision tower sees them. The default
        does nothing: the caller then hands them over with `session.frame(images)`.
        """

    def follow(self, session: Session, undo: ExitStack) -> None:  # noqa: B027 - optional
        """Let the model's own calls begin episodes and steps of the session."""

    def describe(self) -> str:
        """One line for people."""
        return f"{type(self).__name__}: {type(self.decoder).__name__}, {len(self.layers)} layers"
