"""What a prefill holds, and what each cut leaves of it, for the passes that follow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from vla_pruner.core.layout import Layout
from vla_pruner.methods.base import Choice

Mode = Literal["full", "drop", "hide"]
"""What happens to tokens that are not kept: nothing, they are removed, or nobody sees them."""


@dataclass(frozen=True, eq=False)
class TokenIndex:
    """What follows from a layout; a batch of 1 where all rows agree."""

    tokens: Tensor
    """[1, M] 0..M-1."""
    others: Tensor
    """[B, S - M] rows of everything but visual tokens, ascending."""
    last_row: Tensor | None
    """[B, 1] last real row, None: row S - 1 in every sequence."""
    text_rows: Tensor | None
    """[B, T] rows of text, 0 where there is none."""
    text_valid: Tensor | None
    """[B, T] bool, False where there is none."""
    read: Tensor | None
    """[1, M] bool, visual tokens that always stay; None: there is none."""

    @staticmethod
    def of(layout: Layout, batch: int, length: int) -> TokenIndex:
        """For a prefill of `batch` rows and `length` tokens.

        Raises:
            ValueError: a layout that contradicts itself.
        """
        visual = layout.visual
        if visual.ndim != 2 or visual.shape[0] not in (1, batch):
            raise ValueError(
                f"Layout.visual must be [B, M] with B={batch} (or 1); got {tuple(visual.shape)}."
            )
        if sum(layout.views) != visual.shape[1]:
            raise ValueError(
                f"Layout.views {layout.views} must sum to the {visual.shape[1]} visual tokens."
            )
        rows, remaining = visual.shape[0], length - visual.shape[1]
        place = torch.arange(length, device=visual.device).expand(rows, -1)
        is_visual = torch.zeros(rows, length, dtype=torch.bool, device=visual.device)
        is_visual = is_visual.scatter(1, visual, True)
        others = torch.where(is_visual, place + length, place).sort(dim=1).values[:, :remaining]
        last_row = text_rows = text_valid = read = None
        if layout.valid_rows is not None:
            newest_first = layout.valid_rows.flip(1).to(torch.int8)
            last_row = length - 1 - newest_first.argmax(dim=1, keepdim=True)
        if layout.text_rows is not None:
            text_rows = layout.text_rows.clamp_min(0)
            text_valid = layout.text_rows >= 0
            if layout.valid_rows is not None:
                text_rows = text_rows.expand(batch, -1)
                real = layout.valid_rows.expand(batch, -1) > 0
                text_valid = text_valid & real.gather(1, text_rows)
        tokens = torch.arange(visual.shape[1], device=visual.device)[None]
        if layout.read:
            named = torch.tensor(layout.read, dtype=torch.int64, device=visual.device)
            read = torch.isin(tokens, named)
        return TokenIndex(tokens, others, last_row, text_rows, text_valid, read)


@dataclass(eq=False)
class TokenSet:
    """What the layers between two cuts see: m visual tokens, n tokens of this pass in all.

    Set 0 is the whole prefill. The others are filled in when the prefill reaches their cut.
    """

    views: tuple[int, ...] = ()
    """Visual tokens left of each camera, or (m,)."""
    tokens: Tensor | None = None
    """[B, m] visual tokens, indices in 0..M-1, ascending."""
    columns: Tensor | None = None
    """[B, m] where they are among the rows that these layers get."""
    places: Tensor | None = None
    """[B|1, M] where each visual token is among the keys of these layers, -1 if it was cut."""
    rows: Tensor | None = None
    """[B, n] rows of the prefill that these layers get; None: all S of them."""
    retained: Tensor | None = None
    """[B, N] positions since the cache began whose keys these layers hold; None: all so far."""
    offset: int = 0
    """Keys that these layers held before the prefill."""
    present: Tensor | None = None
    """[B, past + S] bool, what nobody hides, where tokens are hidden instead of removed."""
    kept: Tensor | None = None
    """[B, m] the choice that led here, among the tokens of the set before."""
    merge: Tensor | None = None
    """[B, m, m'] how hidden states were joined on the way, m' tokens before."""
    reused: Tensor | None = None
    """[B, M] bool, tokens whose keys are those of the last step (hooks of a method of its own)."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of these layers in this pass, instead of some that the decoder gives."""
    given: Mapping[str, Any] | None = None
    """What the decoder gave the layer that they were made for; another kind gets other tables."""


@dataclass(eq=False)
class Prefill:
    """One prefill: what its decoder pass needs, what it found, and what later passes need of it.

    S is the length of the prefill, M its visual tokens, `past` the tokens that the cache held.
    """

    layout: Layout
    mode: Mode
    index: TokenIndex
    sets: tuple[TokenSet, ...]
    """Before the first cut, and after each."""
    counts: tuple[int, ...] = ()
    """Visual tokens to leave at each cut."""
    past: int = 0
    acting: int = 1
    """Action queries that it holds; the last row, if it holds none."""
    before: Prefill | None = None
    """An earlier prefill in the same cache, from which tokens were removed."""
    forecast: Tensor | None = None
    """[B, M] action score predicted from the episode."""
    seeds: Tensor | None = None
    """[B] one number per episode and step."""
    motion: tuple[tuple[float, ...], ...] = ()  # Reported of each row's episode, oldest first.
    full_rows: Tensor | None = None
    """[B] bool, rows that keep everything in a batch where others do not; None: no such row."""
    leader: Tensor | None = None
    """[B] row whose choice each row follows (beams of one episode); None: each its own."""
    given: tuple[Choice, ...] | None = None
    """Choices made earlier, one per cut; None: this pass decides."""

    features: Tensor | None = None
    """[B, M, D] visual tokens entering layer 0, until the last choice is made."""
    text: Tensor | None = None
    """[B, T, D] text entering layer 0, as long."""
    query_weights: Tensor | None = None
    """[B, T] weights of the rows of text."""
    scores: dict[int, Tensor] = field(default_factory=dict)
    """[B, M] scores by number of reading, 0 at tokens that had left."""
    observed: Tensor | None = None
    """[B, M] attention of this pass's action queries, summed over the watched layers."""
    watched: int = 0
    """Layers that have added to `observed`."""
    note: Any = None
    """What the hooks of a method of its own remember of this prefill."""

    @property
    def length(self) -> int:
        """S. Read off tensors, so that compiled code need not be made anew for another length."""
        return self.index.others.shape[1] + self.layout.visual.shape[1]

    @property
    def total(self) -> int:
        """Tokens in the cache after this prefill, had none been removed."""
        return self.past + self.length

    @property
    def choices(self) -> tuple[Choice, ...] | None:
        """What was decided at each cut, once the prefill is through; None if nothing was."""
        made = [Choice(s.kept, s.merge) for s in self.sets[1:] if s.kept is not None]
        return tuple(made) if made and len(made) == len(self.sets) - 1 else None

    def length_at(self, number: int) -> int:
        """Tokens that the layers after `number` cuts compute."""
        rows = self.sets[number].rows
        return self.length if rows is None else rows.shape[1]

    def forget_pass(self) -> None:
        """Let go of what only a pass itself needed, whether it came to its end or not."""
        self.observed, self.watched = None, 0
        self.features = self.text = self.query_weights = self.before = None
        for one in self.sets:
            one.arguments, one.given = {}, None

    def own_results(self) -> None:
        """Copy what stays: the next replay of a CUDA graph writes over what the last one gave."""
        for one in self.sets[1:]:
            for name, result in vars(one).items():
                if isinstance(result, Tensor):
                    setattr(one, name, result.clone())
        self.scores = {number: score.clone() for number, score in self.scores.items()}
