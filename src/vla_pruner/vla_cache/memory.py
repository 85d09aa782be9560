"""What a step leaves behind for the next one of its episode, where its keys are used again."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vla_pruner.core.arguments import take
from vla_pruner.core.episodes import Step
from vla_pruner.core.layout import Layout
from vla_pruner.core.plan import Plan
from vla_pruner.pruning.frames import patch_similarity, patches
from vla_pruner.temporal.memories import MOST_EPISODES, LastSteps, frames_of_rows
from vla_pruner.vla_cache.recall import Recall, Reuse


@dataclass(eq=False)
class Record:
    """One prefill of B rows, M visual tokens, as the next step will remember it.

    The first three are known when it begins, the others are filled in while the decoder runs.
    """

    patches: Tensor
    """[B, M, P] of the camera images."""
    places: Tensor
    """[B, M] or [axes, B, M] rotary positions of the visual tokens."""
    lengths: Tensor
    """[B] tokens of each row that are no padding."""
    keys: dict[int, Tensor] = field(default_factory=dict)
    """[B, Hkv, M, D] of the visual tokens by layer, rotated."""
    values: dict[int, Tensor] = field(default_factory=dict)
    relevance: Tensor | None = None
    """[B, M], see `Recall`."""
    entropy: dict[int, Tensor] = field(default_factory=dict)
    """[B] by layer."""

    def row(self, row: int) -> Memory:
        """What one row leaves behind."""
        assert self.relevance is not None
        return Memory(
            patches=self.patches[row],
            place=self.places[..., row, :],
            length=self.lengths[row],
            keys={layer: keys[row] for layer, keys in self.keys.items()},
            values={layer: values[row] for layer, values in self.values.items()},
            relevance=self.relevance[row],
            entropy=torch.stack([self.entropy[layer][row] for layer in sorted(self.entropy)]),
        )


@dataclass(frozen=True, eq=False)
class Memory:
    """A row of a `Record`."""

    patches: Tensor
    place: Tensor
    length: Tensor
    keys: Mapping[int, Tensor]
    values: Mapping[int, Tensor]
    relevance: Tensor
    entropy: Tensor

    def fits(self, record: Record, row: int) -> bool:
        """Whether a new prefill has its visual tokens where this one had them."""
        return (
            self.patches.shape == record.patches[row].shape
            and torch.equal(self.place, record.places[..., row, :])
            and bool(self.length == record.lengths[row])
        )


@dataclass(frozen=True, eq=False)
class Recalled:
    """The last step of each row, and what is used of it."""

    memories: tuple[Memory | None, ...]
    reuse: Reuse

    def keys_values(self, layer: int) -> tuple[Tensor, Tensor]:
        """`[B, Hkv, M, D]` each of a layer; zeros for rows that recall nothing."""
        known = next(memory for memory in self.memories if memory is not None)
        nothing = torch.zeros_like(known.keys[layer]), torch.zeros_like(known.values[layer])
        pairs = [
            nothing if memory is None else (memory.keys[layer], memory.values[layer])
            for memory in self.memories
        ]
        keys, values = zip(*pairs, strict=True)
        return torch.stack(keys), torch.stack(values)


class Memories:
    """The last step of every episode, by name."""

    def __init__(
        self, reuse: Callable[[Recall], Reuse], plan: Plan, *, most: int = MOST_EPISODES
    ) -> None:
        self.reuse = reuse
        self.plan = plan
        self.last: LastSteps[Memory] = LastSteps(most)

    def reset(self, names: Iterable[Hashable] | None = None) -> None:
        """Forget these episodes, or all."""
        self.last.forget(names)

    def open(
        self,
        frames: Tensor | None,
        layout: Layout,
        batch: int,
        length: int,
        kwargs: Mapping[str, Any],
    ) -> Record:
        """The record of a prefill of `batch` rows and `length` tokens that begins.

        Args:
            frames: `[B, cameras, 3, H, W]`, or fewer rows if several rows are one (beams).
            layout: of the prefill.
            kwargs: the decoder's keyword arguments.

        Raises:
            ValueError: no frames, or frames that do not fit the batch or the visual tokens.
        """
        frames = frames_of_rows(frames, batch, layout.visual, "vla-cache")
        cut = patches(frames, layout.visual.shape[1])
        visual = layout.visual.expand(batch, -1)
        places, ids = visual, kwargs.get("position_ids")
        if ids is not None:
            places = take(ids, visual, dim=-1, batch_dim=ids.ndim - 2)
        lengths = torch.full((batch,), length, dtype=torch.int64, device=visual.device)
        if layout.valid_rows is not None:
            lengths = (layout.valid_rows > 0).sum(dim=1).expand(batch)
        return Record(cut, places, lengths)

    def recall(
        self,
        ids: Sequence[Hashable],
        record: Record,
        layout: Layout,
        free: Tensor | None,
        wanted: Sequence[bool],
    ) -> Recalled | None:
        """What each row's episode reuses of its last step; None: no row reuses anything.

        Args:
            ids: episode of each row.
            record: of the prefill that begins.
            layout: of the prefill that begins.
            free: `[B|1, M]` bool, False for tokens that have to be computed; None: all may recall.
            wanted: False for rows that compute everything whatever they could recall.
        """
        last = zip(self.last.of(ids), wanted, strict=True)
        memories = [
            memory if use and memory is not None and memory.fits(record, row) else None
            for row, (memory, use) in enumerate(last)
        ]
        if all(memory is None for memory in memories):
            return None
        before = [self._or(memory, record) for memory in memories]
        reuse = self.reuse(
            Recall(
                similarity=patch_similarity(torch.stack([b[0] for b in before]), record.patches),
                relevance=torch.stack([b[1] for b in before]),
                entropy=torch.stack([b[2] for b in before]),
                views=layout.views,
                cuts=self.plan.cuts,
                valid=free,
            )
        )
        knows = torch.tensor(
            [memory is not None for memory in memories],
            dtype=torch.bool,
            device=reuse.counts.device,
        )
        return Recalled(tuple(memories), Reuse(reuse.order, reuse.counts * knows[:, None]))

    def close(self, step: Step, record: Record) -> None:
        """A prefill is through: remembered instead of the one before once its step is over."""
        self.last.hold(step, record.row)

    def _or(self, memory: Memory | None, record: Record) -> tuple[Tensor, Tensor, Tensor]:
        """Patches, relevance and entropy of a row; zeros for one that recalls nothing."""
        if memory is not None:
            return memory.patches, memory.relevance, memory.entropy
        blank = torch.zeros_like(record.patches[0])
        return blank, blank[:, 0], blank.new_zeros(self.plan.depth)
