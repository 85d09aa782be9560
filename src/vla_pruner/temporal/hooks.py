"""A cut whose method remembers: memories by episode, handed over when a step cuts."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vla_pruner.core import refusals, scores
from vla_pruner.core.arguments import take
from vla_pruner.core.cut import Cut
from vla_pruner.core.episodes import Step
from vla_pruner.core.layout import Adapter
from vla_pruner.core.tokens import Mode, Prefill
from vla_pruner.methods.base import Evidence, Method, ScoreSpec
from vla_pruner.pruning.frames import patch_size
from vla_pruner.temporal.memories import LastSteps, frames_of_rows
from vla_pruner.temporal.method import Memory, Now, Remembering, Seen


@dataclass(eq=False)
class Note:
    """What a prefill was told of the past, and what the next step will be told of it."""

    memories: tuple[Memory | None, ...]
    frames: Tensor | None
    expected: Mapping[str, Tensor] = field(default_factory=dict)
    features: Tensor | None = None
    scores: dict[str, Tensor] = field(default_factory=dict)
    late: Tensor | None = None


class RememberingCut(Cut):
    """The hooks of a method that remembers (`temporal.method.Remembering`)."""

    def __init__(self, adapter: Adapter, method: Method) -> None:
        super().__init__(adapter, method)
        assert isinstance(method, Remembering)
        self.remembering: Remembering = method
        self.memories: LastSteps[Memory] = LastSteps()

    def attach(self, undo: ExitStack) -> None:
        """Install the hooks; `undo` takes them away."""
        super().attach(undo)
        late = self.remembering.late_layer(self.plan.depth)
        if late is not None:
            scores.watch(self.attention(late), partial(self._see_late, late), undo)

    # ------------------------------------------------------------------ steps
    def begin(
        self, step: Step, mode: Mode, frames: Tensor | None, kwargs: Mapping[str, Any]
    ) -> Mode | None:
        """Look up what each row remembers; the method says which rows need all tokens."""
        memories = self.memories.of(step.ids)
        step.full = tuple(
            given or self.remembering.starts_full(memory)
            for given, memory in zip(step.full, memories, strict=True)
        )
        step.prefill.note = Note(memories, self._frames(frames, step.prefill, len(step.ids)))
        return None

    def again(self, prefill: Prefill, first: Prefill) -> None:
        """Another prefill of the step: the first one decided, and is what is remembered."""
        prefill.note = first.note

    def end(self, step: Step) -> None:
        """What the first prefill of a step saw is remembered once the step is over."""
        prefill, note = step.prefill, step.prefill.note
        if note.features is not None or prefill.features is None:
            return
        for name, reading in self.plan.asked[0].items():
            if reading not in prefill.scores:
                layer = self.plan.readings[reading].spec.layer
                raise refusals.unseen(layer, self.attention(layer))
            note.scores[name] = prefill.scores[reading].detach()
        note.features = prefill.features.detach()
        self.memories.hold(step, partial(self._remember, step, note))

    def forget(self, ids: tuple[Hashable, ...] | None) -> None:
        """These episodes are over, or all."""
        self.memories.forget(ids)

    def _remember(self, step: Step, note: Note, row: int) -> Memory:
        """What the next step is told of a row of one that is over."""
        assert note.features is not None
        action = step.action() if self.method.history is not None else None
        seen = Seen(
            features=note.features[row],
            scores={key: score[row] for key, score in note.scores.items()},
            expected={key: score[row] for key, score in note.expected.items()},
            action=None if action is None else action[row],
            frames=None if note.frames is None else note.frames[row],
            memory=note.memories[row],
            views=step.prefill.layout.views,
            late=None if note.late is None else note.late[row],
        )
        return self.remembering.remember(seen)

    def _frames(self, frames: Tensor | None, prefill: Prefill, batch: int) -> Tensor | None:
        """`[B, cameras, 3, H, W]` of a step, where the method compares them."""
        if "frame" not in self.method.needs:
            return None
        visual = prefill.layout.visual
        found = frames_of_rows(frames, batch, visual, self.method.name).float()
        _ = patch_size(found, visual.shape[1])  # Refuses images that the tokens do not tile.
        return found

    # ------------------------------------------------------------------ hooks on layers
    def _see_input(self, layer: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
        """Before layer 0: embeddings, which a step on all tokens leaves behind, too."""
        super()._see_input(layer, args, kwargs)
        prefill = self.prefill
        if prefill is None or self.phase != "prefill" or prefill.features is not None:
            return
        hidden = args[0] if args else self.signatures[layer].bind(args, kwargs)[0]
        prefill.features = take(hidden, prefill.layout.visual, dim=1)

    def _see_late(
        self,
        index: int,
        attention: nn.Module,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        kwargs: dict[str, Any],
    ) -> None:
        """After a late layer's attention in a step's first prefill: `Seen.late`."""
        prefill = self.prefill
        if prefill is None or self.phase != "prefill" or prefill.note.late is not None:
            return
        left = prefill.sets[0 if prefill.mode == "full" else self.plan.number[index]]
        assert left.places is not None
        shown = (attention, query, key, mask, kwargs)
        seen = scores.see(self, shown, left.offset + query.shape[2])
        rows, weight = scores.votes(ScoreSpec(layer=index, rows="text"), prefill, left, query)
        prefill.note.late = scores.column_mean(seen, left.places, rows, weight)

    def _evidence(self, number: int, prefill: Prefill, tokens: Tensor, hidden: Tensor) -> Evidence:
        """With what the method expects from its memory among the scores."""
        evidence = super()._evidence(number, prefill, tokens, hidden)
        note: Note = prefill.note
        if number == 0:
            memory, known = _stacked(note.memories, evidence.features.device)
            note.expected = self.remembering.expect(
                Now(
                    features=evidence.features,
                    scores=evidence.scores,
                    memory=memory,
                    known=known,
                    frames=note.frames,
                    views=evidence.views,
                    valid=evidence.valid,
                    text=evidence.text,
                    text_valid=evidence.text_valid,
                    motion=prefill.motion,
                )
            )
            expected = note.expected
        else:
            expected = {key: score.gather(1, tokens) for key, score in note.expected.items()}
        return replace(evidence, scores={**evidence.scores, **expected})


def _stacked(
    memories: Sequence[Memory | None], device: torch.device
) -> tuple[dict[str, Tensor], Tensor]:
    """`Now.memory` and `Now.known`; no row remembers anything: an empty memory."""
    known = torch.tensor([m is not None for m in memories], dtype=torch.bool, device=device)
    example = next((memory for memory in memories if memory is not None), None)
    if example is None:
        return {}, known
    stacked = {
        name: torch.stack([torch.zeros_like(blank) if m is None else m[name] for m in memories])
        for name, blank in example.items()
    }
    return stacked, known
