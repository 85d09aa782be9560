"""A method with every feature of the interface as a field, and a slow decoder beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vla_pruner.methods import Choice, Evidence, HistorySpec, Method, ScoreSpec
from vla_pruner.pruning.selection import top_k

VISUAL, M = slice(1, 21), 20
SEMANTIC = {"rows": "last", "heads": "mean", "kind": "attention"}


@dataclass(frozen=True, kw_only=True)
class Ladder(Method):
    """Cuts before the layers `at`, leaving `left` tokens each time, ranked by one score."""

    name: ClassVar[str] = "ladder"
    summary: ClassVar[str] = "several cuts, for tests"
    sees_hidden: ClassVar[bool] = True

    at: tuple[int, ...] = (2, 4)
    left: tuple[int, ...] = (12, 5)
    spec: tuple[tuple[str, str], ...] = ()
    score_layer: int | None = None
    merging: bool = False
    places: Any = "keep"
    skip: tuple[int, ...] = ()
    watch: Any = None
    first_full: int = 0
    seen: tuple[list[Evidence], ...] = ()

    @property
    def positions(self) -> Any:
        return self.places

    @property
    def history(self) -> HistorySpec | None:
        return None if self.watch is None else HistorySpec(layers=self.watch)

    @property
    def warmup(self) -> int:
        return self.first_full

    def cuts(self, num_layers: int) -> tuple[int, ...]:
        return self.at

    def scores(self, cut: int) -> Mapping[str, ScoreSpec]:
        layer = cut - 1 if self.score_layer is None else self.score_layer
        options: dict[str, Any] = {**SEMANTIC, **dict(self.spec)}
        return {"semantic": ScoreSpec(layer=layer, **options)}

    def schedule(self, views: tuple[int, ...], num_layers: int) -> tuple[int, ...]:
        return self.left

    def skipped(self, num_layers: int) -> tuple[int, ...]:
        return self.skip

    def query_weights(self, visual: Tensor, text: Tensor, text_valid: Tensor) -> Tensor:
        return (text @ visual.mean(1, keepdim=True).transpose(1, 2))[..., 0].sigmoid()

    def select(self, evidence: Evidence) -> Tensor | Choice:
        for log in self.seen:
            log.append(evidence)
        assert evidence.keep_count is not None and evidence.semantic is not None
        if evidence.keep_count == 0:
            kept = torch.empty(len(evidence.features), 0, dtype=torch.int64)
        else:
            kept = top_k(evidence.semantic, evidence.keep_count)
        return Choice(kept, merging(evidence.hidden, kept)) if self.merging else kept

    def choose(self, *args: Any, **kwargs: Any) -> Tensor:
        raise NotImplementedError


def merging(hidden: Tensor | None, kept: Tensor) -> Tensor:
    """Each kept token becomes a mean of all, weighted by similarity: `[B, k, m]`."""
    assert hidden is not None
    every = torch.nn.functional.normalize(hidden.float(), dim=-1)
    centre = every.gather(1, kept[..., None].expand(-1, -1, every.shape[-1]))
    return torch.softmax(3 * centre @ every.transpose(1, 2), dim=-1)


@dataclass
class Slow:
    """What the slow decoder gives: one sequence at a time, nothing removed, tokens hidden by masks.

    `logits` [S, vocab], `attention` per layer [H, S, S] (None: skipped), `inputs` per layer [S, D].
    """

    logits: Tensor
    attention: list[Tensor | None]
    inputs: list[Tensor]


def slow(
    model: nn.Module,
    embeds: Tensor,
    tokens: list[int],
    *,
    cuts: tuple[int, ...] = (),
    kept: list[list[int]] = (),  # type: ignore[assignment]
    visual: slice = VISUAL,
    merge: bool = False,
    compact: bool = False,
    skipped: tuple[int, ...] = (),
) -> Slow:
    """Prefill `embeds` [S, D] and the decoded `tokens` in one pass of an eager decoder.

    `kept` names, for each cut, the visual tokens (0..M-1) that are left.
    """
    later = model.get_input_embeddings()(torch.tensor(tokens, dtype=torch.int64))
    x = torch.cat([embeds, later])[None]
    total, start = x.shape[1], visual.start
    present = torch.ones(total, dtype=torch.bool)
    left = list(range(visual.stop - visual.start))
    attention: list[Tensor | None] = []
    inputs = []
    for index, layer in enumerate(model.model.layers):
        if index in cuts:
            stay = kept[cuts.index(index)]
            if merge:
                at = [start + token for token in left]
                local = torch.tensor([[left.index(token) for token in stay]])
                mixed = merging(x[:, at], local) @ x[:, at]
                x = x.clone()
                x[0, [start + token for token in stay]] = mixed[0]
            for token in left:
                present[start + token] = token in stay
            left = list(stay)
        if index in skipped:
            inputs.append(x[0])
            attention.append(None)
            continue
        number = present.long().cumsum(0) - 1 if compact else torch.arange(total)
        rotary = model.model.rotary_emb(x, number.clamp_min(0)[None])
        sees = torch.ones(total, total).tril().bool() & present
        sees |= torch.eye(total, dtype=torch.bool)
        mask = torch.zeros(1, 1, total, total).masked_fill(~sees, torch.finfo(torch.float32).min)
        inputs.append(x[0])
        hook = layer.self_attn.register_forward_hook(
            lambda module, args, output: attention.append(output[1][0])
        )
        x = layer(x, attention_mask=mask, position_embeddings=rotary, position_ids=None)
        x = x[0] if isinstance(x, tuple) else x
        hook.remove()
    return Slow(model.lm_head(model.model.norm(x))[0], attention, inputs)
