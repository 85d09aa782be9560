"""Any decoder of transformers, with visual tokens at known positions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vla_pruner.core.calls import by_name
from vla_pruner.core.hooks import after, before
from vla_pruner.core.layout import Adapter, Layout

_LABELS = {"labels", "shift_labels"}


class Decoder(Adapter):
    """Adapter for a decoder stack that no family file knows.

    Args:
        layers: path of the layer list in the model ("model.layers"), or the list itself. The module
            that holds the list must be the decoder, whose forward runs all layers.
        visual: positions of the visual tokens in the prefill: a slice, or `[M]` or `[B, M]` int64,
            ascending. They count from the first real token where an attention mask marks padding
            on the left.
        action_rows: "decode" for models that write the action token by token, or a slice of the
            prefill's rows (counting from the end is safest).
        views: visual tokens of each camera; None: one camera.

    Methods that compare camera images get them from `session.frame`, and take the visual tokens of
    a camera for the patches of its image, row by row.

    The visual token that ends a prompt, those before a label, and those that `logits_to_keep` names
    stay: their own rows are read. Rows of other dropped tokens come out as zeros.

    Raises:
        TypeError, ValueError: `visual`, `views` or `action_rows` does not make sense, or the model
            has no such `layers`.
    """

    gives_frames = True

    def __init__(
        self,
        layers: str | nn.ModuleList = "model.layers",
        *,
        visual: slice | Tensor,
        action_rows: Literal["decode"] | slice = "decode",
        views: Sequence[int] | None = None,
    ) -> None:
        self._where = layers
        self._positions = _positions(visual)
        if action_rows != "decode" and not isinstance(action_rows, slice):
            raise TypeError(f'`action_rows` must be "decode" or a slice; got {action_rows!r}.')
        self._action_rows = None if action_rows == "decode" else action_rows
        if isinstance(action_rows, slice) and not _whole(action_rows):
            raise TypeError(f"`action_rows={action_rows}` must hold whole numbers.")
        count = self._positions.shape[1]
        self._views = _views(views, count)
        self._name = ""
        self._known: tuple[int, torch.device, Layout] | None = None
        self._model: nn.Module | None = None
        self._call: Mapping[str, Any] = {}

    def bind(self, model: nn.Module) -> None:
        """Find the decoder: the module that holds the layers."""
        self._model = model
        if isinstance(self._where, str):
            path, _, self._name = self._where.rpartition(".")
            try:
                self.decoder = model.get_submodule(path)
                if not all(isinstance(layer, nn.Module) for layer in self.layers):
                    raise TypeError(self._name)
            except (AttributeError, TypeError):
                raise ValueError(
                    f"{type(model).__name__} has no layer list at {self._where!r}; it has "
                    f"{', '.join(map(repr, _layer_lists(model))) or 'none'}."
                ) from None
            return
        for module in model.modules():
            for name, child in module.named_children():
                if child is self._where:
                    self.decoder, self._name = module, name
                    return
        raise ValueError(f"the given layers are not part of this {type(model).__name__}.")

    @property
    def layers(self) -> Sequence[nn.Module]:
        return cast(Sequence[nn.Module], getattr(self.decoder, self._name))

    def attach(self, undo: ExitStack) -> None:
        """Read the labels that the model is called with."""
        if self._model is not None and self._model is not self.decoder:
            before(self._model, self._called, undo)
            after(self._model, self._returned, undo, always=True)

    def _called(self, model: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        self._call = by_name(model.forward, args, kwargs) if args else kwargs

    def _returned(self, model: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._call = {}

    def layout(self, inputs: Tensor, kwargs: Mapping[str, Any]) -> Layout | None:
        """The same positions in every prefill, moved right by padding; all text is behind them.

        None for a prefill that ends before the first of them: it is a prefix.

        Raises:
            ValueError: the prefill ends among the visual positions.
        """
        length, device = inputs.shape[1], inputs.device
        mask = _padding(kwargs)
        told, asked = not _LABELS.isdisjoint(self._call), self._call.get("logits_to_keep", 1)
        plain = mask is None and not told and isinstance(asked, int) and asked < 2
        if plain and self._known is not None and self._known[:2] == (length, device):
            return self._known[2]
        layout = self._made(length, mask, device)
        if plain and layout is not None:
            self._known = (length, device, layout)
        return layout

    def _made(self, length: int, mask: Tensor | None, device: torch.device) -> Layout | None:
        first, last = self._span()
        if length <= first:
            return None
        if last >= length:
            raise ValueError(
                f"`visual` reaches position {last}, but this prefill has {length} tokens."
            )
        with torch.inference_mode(False):  # What is known may be saved for a backward pass later.
            return self._at(length, 0, mask, device)

    def continued(self, inputs: Tensor, kwargs: Mapping[str, Any], past: int) -> Layout | None:
        """The visual tokens, if this pass brings them all.

        Raises:
            NotImplementedError: a pass that brings some of them.
        """
        length, (first, last) = inputs.shape[1], self._span()
        if first < past or first >= past + length:
            return None
        if last >= past + length:
            raise NotImplementedError(
                f"visual tokens stand at {first}..{last}, and a pass brings {past}.."
                f"{past + length - 1}; an image that is split over several passes cannot be pruned "
                "as a whole. Give the prompt at once, or all of the image in one pass."
            )
        mask = _padding(kwargs)
        with torch.inference_mode(False):
            return self._at(length, past, mask, inputs.device)

    def _span(self) -> tuple[int, int]:
        return int(self._positions[:, 0].min()), int(self._positions[:, -1].max())

    def _at(self, length: int, past: int, mask: Tensor | None, device: torch.device) -> Layout:
        visual = self._positions.to(device) - past
        if mask is not None:
            mask = (mask != 0).to(device, torch.int8)  # Packed sequences may count from 1.
            visual = visual + mask.argmax(dim=1, keepdim=True)
            mask = mask[:, past : past + length]
        self._check_action_rows(length, past)
        first = int(self._positions[:, -1].min()) + 1 - past
        text = text_behind(visual, length, earliest=first)
        return Layout(
            visual,
            self._views,
            valid_rows=mask,
            action_rows=self._action_rows,
            text_rows=text,
            read=self._read(visual, length, mask),
        )

    def _check_action_rows(self, length: int, past: int) -> None:
        """Action queries stand behind the image, so that no cut moves or removes them."""
        if self._action_rows is None:
            return
        named = range(length)[self._action_rows]
        if not named or min(named) <= self._span()[1] - past:
            raise ValueError(
                f"`action_rows={self._action_rows}` must name rows behind the visual tokens, which "
                f"end at {self._span()[1] - past} of {length}; count from the end: "
                "`slice(-8, None)`."
            )

    def _read(self, visual: Tensor, length: int, mask: Tensor | None) -> tuple[int, ...]:
        """Visual tokens that end the prompt, stand before a label, or are asked for."""
        last = torch.tensor([[length - 1]], dtype=torch.int64, device=visual.device)
        if mask is not None:
            last = length - 1 - mask.flip(1).to(torch.int8).argmax(dim=1, keepdim=True)
        hit = (visual == last).any(dim=0)
        asked = self._call.get("logits_to_keep")
        if isinstance(asked, Tensor) or asked:
            where = asked.to(visual.device) if isinstance(asked, Tensor) else slice(-asked, None)
            named = torch.arange(length, device=visual.device)[where]
            hit = hit | torch.isin(visual, named).any(dim=0)
        for before_label in rows_before_labels(self._call, length, visual.device):
            hit = hit | before_label.any(dim=0)[visual].any(dim=0)
        return tuple(hit.nonzero()[:, 0].tolist())


def _padding(kwargs: Mapping[str, Any]) -> Tensor | None:
    """`[B, S]` mask of real tokens, if the decoder is given one."""
    mask = kwargs.get("attention_mask")
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None


def _positions(visual: slice | Tensor) -> Tensor:
    """Positions `[1 or B, M]` int64."""
    if isinstance(visual, slice):
        if not _whole(visual):
            raise TypeError(f"`visual={visual}` must hold whole numbers.")
        if visual.start is None or visual.stop is None or visual.start < 0 or visual.stop < 0:
            raise ValueError(f"`visual={visual}` needs a start and a stop that are not negative.")
        positions = torch.arange(visual.start, visual.stop, visual.step or 1)[None]
    elif isinstance(visual, Tensor):
        positions = visual[None] if visual.ndim == 1 else visual
    else:
        raise TypeError(f"`visual` must be a slice or a tensor; got {type(visual).__name__}.")
    if positions.dtype == torch.bool:
        raise TypeError("`visual` must be positions, no mask; use `mask.nonzero()[:, 0]`.")
    if positions.ndim != 2 or positions.shape[1] == 0 or positions.is_floating_point():
        raise ValueError("`visual` must name at least one position, as [M] or [B, M] integers.")
    positions = positions.long()
    if bool((positions[:, 1:] <= positions[:, :-1]).any()) or int(positions.min()) < 0:
        raise ValueError("`visual` positions must be ascending, without repetition.")
    return positions


def _whole(where: slice) -> bool:
    return all(one is None or isinstance(one, int) for one in (where.start, where.stop, where.step))


def _views(views: Sequence[int] | None, count: int) -> tuple[int, ...]:
    if views is None:
        return (count,)
    if not isinstance(views, Sequence) or not all(isinstance(one, int) for one in views):
        raise TypeError(f"`views={views!r}` must be whole numbers, the visual tokens per camera.")
    if sum(views) != count or min(views) < 1:
        raise ValueError(
            f"`views={tuple(views)}` must be positive and sum to the {count} visual tokens."
        )
    return tuple(views)


def _layer_lists(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]


def rows_before_labels(
    call: Mapping[str, Any], length: int, device: torch.device
) -> Iterator[Tensor]:
    """Rows `[B, S]` bool whose output a loss reads, by each argument of a model that says so."""
    for name in sorted(_LABELS):
        labels = call.get(name)
        if isinstance(labels, Tensor) and labels.ndim == 2 and labels.shape[1] == length:
            wanted = (labels != -100).to(device)
            # A label stands at the place that it names; a shifted one at the row before.
            yield wanted if name == "shift_labels" else F.pad(wanted[:, 1:], (0, 1))


def text_behind(
    visual: Tensor, length: int, *, earliest: int, skip: int = 0, until: int = 0
) -> Tensor | None:
    """`Layout.text_rows` where the instruction stands behind the visual tokens.

    Args:
        visual: `[B|1, M]`, see `Layout`.
        length: S.
        earliest: first position of text in any row.
        skip: positions right behind the visual tokens that are no text (a robot state).
        until: positions at the end that are no text (action slots).

    Returns:
        `[B|1, length - until - earliest]` int64, or None if nothing stands there.
    """
    end = max(earliest, length - until)
    rows = torch.arange(earliest, end, device=visual.device)[None]
    if rows.shape[1] == 0:
        return None
    return torch.where(rows > visual[:, -1:] + skip, rows, -1)
