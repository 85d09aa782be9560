"""Hooks that take visual tokens out of a decoder stack before one of its layers.

Everything here works on tensors and can be compiled; `session.py` decides, outside of the compiled
code, what each pass is.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vla_pruner.methods.base import Evidence, Method
from vla_pruner.pruning.scores import attention_column_mean, attention_rows
from vla_pruner.surgery import probe
from vla_pruner.surgery.layout import Adapter, Layout

Mode = Literal["full", "drop", "mask"]
"""What happens to tokens that are not kept: nothing, they are removed, or nobody sees them."""

_PER_TOKEN = ("attention_mask", "position_ids", "position_embeddings", "cache_position")


@dataclass(eq=False)
class Prompt:
    """One prefill: what its decoder pass needs, what it found, and what later steps need of it.

    S is the length of the prefill, M its visual tokens, k those that are kept, n = S - M + k.
    """

    layout: Layout
    length: int
    mode: Mode
    others: Tensor
    """[B, S - M] positions of everything but visual tokens, ascending."""
    last_row: Tensor | None = None
    """[B, 1] last real row, None: row S - 1 in every sequence."""
    forecast: Tensor | None = None
    """[B, M] action score predicted from the episode."""
    seeds: Tensor | None = None
    """[B] one number per episode and step."""
    warming: Tensor | None = None
    """[B] bool, rows that keep everything in a batch where others do not; None: no such row."""
    leader: Tensor | None = None
    """[B] row whose choice each row follows (beams of one episode); None: each its own."""
    given: Tensor | None = None
    """[B, k] kept tokens decided earlier; None: this pass decides."""

    semantic: Tensor | None = None
    """[B, M] prefill score."""
    kept: Tensor | None = None
    """[B, k] kept visual tokens, indices in 0..M-1, ascending."""
    positions: Tensor | None = None
    """[B, n] positions of the tokens that stay."""
    columns: Tensor | None = None
    """[B, k] where in `positions` the kept visual tokens are."""
    features: Tensor | None = None
    """[B, M, D] visual tokens entering layer 0, until the choice is made."""
    observed: Tensor | None = None
    """[B, M] attention of this pass's action queries, summed over the watched layers."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the layers behind the cut in this pass."""

    def own(self) -> None:
        """Copy the results: the next replay of a CUDA graph writes over what the last one gave."""
        for name in ("semantic", "kept", "positions", "columns"):
            result = getattr(self, name)
            if result is not None:
                setattr(self, name, result.clone())


class Cut:
    """Hooks on one decoder; `phase` and `prompt` say what the pass in progress is."""

    def __init__(self, adapter: Adapter, method: Method) -> None:
        self.adapter = adapter
        self.method = method
        self.layers = list(adapter.layers)
        self.depth = len(self.layers)
        cuts = method.cuts(self.depth)
        if len(cuts) > 1:
            raise NotImplementedError(
                f"method {method.name!r} cuts before layers {cuts}; one cut is supported."
            )
        self.at = cuts[0] if cuts else None
        self.semantic_layer = self._semantic_layer()
        self.action_layers = method.history.resolve_layers(self.depth) if method.history else ()
        self.phase: Literal["prefill", "decode"] = "decode"
        self.prompt: Prompt | None = None
        self.static_cache = False
        self.eager = False
        if self.at is not None:
            self._check_layers(self.at)

    def attach(self, undo: ExitStack) -> None:
        """Install the hooks; `undo` takes them away."""
        watched = set(self.action_layers)
        if self.semantic_layer is not None:
            watched.add(self.semantic_layer)
        config = getattr(self._attention(0), "config", None)
        self.eager = getattr(config, "_attn_implementation", None) == "eager"
        for index in sorted(watched):
            probe.install(self._attention(index), partial(self._observe, index), undo)
        if self.at is None:
            return

        def before(index: int, hook: Any) -> None:
            handle = self.layers[index].register_forward_pre_hook(hook, with_kwargs=True)
            undo.callback(handle.remove)

        before(0, self._keep_features)
        before(self.at, self._cut)
        for index in range(self.at + 1, self.depth):
            before(index, self._behind_cut)
        undo.callback(self.layers[-1].register_forward_hook(self._restore_length).remove)

    # ------------------------------------------------------------------ checks
    def _semantic_layer(self) -> int | None:
        if self.at is None or self.method.semantic_rows is None:
            return None
        return self.method.semantic_layer(self.at)

    def _attention(self, index: int) -> nn.Module:
        return self.adapter.attention(self.layers[index])

    def _check_layers(self, at: int) -> None:
        if at < self.adapter.earliest_cut:
            raise ValueError(
                f"`layer={at}`: {type(self.adapter.decoder).__name__} adds image features to its "
                f"first {self.adapter.earliest_cut} layers; use `layer` >= "
                f"{self.adapter.earliest_cut}."
            )
        config = getattr(self.adapter.decoder, "config", None)
        kinds = getattr(config, "layer_types", None)
        sliding = getattr(config, "sliding_window", None) is not None and getattr(
            config, "use_sliding_window", True
        )
        for index in range(at, self.depth):
            if isinstance(kinds, list | tuple):
                limited = kinds[index] != "full_attention"
            else:
                window = getattr(self._attention(index), "sliding_window", None)
                limited = sliding or window is not None
            if limited:
                raise NotImplementedError(
                    f"layer {index} attends within a sliding window or chunk, which removed tokens "
                    "would shift; tokens can be cut only where all later layers see everything."
                )

    # ------------------------------------------------------------------ hooks on layers
    def _keep_features(self, layer: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
        prompt = self.prompt
        if prompt is not None and self.phase == "prefill" and prompt.mode != "full":
            prompt.features = _take(_hidden(args, kwargs), prompt.layout.visual, dim=1)

    def _cut(self, layer: nn.Module, args: tuple[Any, ...], kwargs: Any) -> Any:
        """Before layer K: choose what stays, and work out the arguments of layers >= K."""
        prompt = self.prompt
        if prompt is None or prompt.mode == "full":
            return None
        hidden = _hidden(args, kwargs)
        if self.phase == "prefill":
            self._choose(prompt)
            if prompt.mode == "drop":
                _refuse_unknown(kwargs, prompt.length)
                prompt.overrides = self._shortened(prompt, kwargs)
                assert prompt.positions is not None
                hidden = _take(hidden, prompt.positions, dim=1)
            else:
                prompt.overrides = {"attention_mask": self._masked(prompt, hidden, kwargs)}
        elif prompt.mode == "drop":
            prompt.overrides = self._shifted(prompt, kwargs)
        else:
            prompt.overrides = {"attention_mask": self._masked(prompt, hidden, kwargs)}
        kwargs = {**kwargs, **prompt.overrides}
        if args:
            return (hidden, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden}

    def _behind_cut(self, layer: nn.Module, args: tuple[Any, ...], kwargs: Any) -> Any:
        """Before layers > K: the arguments that layer K got."""
        prompt = self.prompt
        if prompt is None or prompt.mode == "full" or not prompt.overrides:
            return None
        return args, {**kwargs, **prompt.overrides}

    def _restore_length(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """After the last layer of a prefill: every token back in its row, zeros where one left."""
        prompt = self.prompt
        if prompt is None or self.phase != "prefill" or prompt.mode != "drop":
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        assert prompt.positions is not None
        index = prompt.positions[..., None].expand(-1, -1, hidden.shape[-1])
        full = hidden.new_zeros(hidden.shape[0], prompt.length, hidden.shape[-1])
        full = full.scatter(1, index, hidden)
        return (full, *output[1:]) if isinstance(output, tuple) else full

    # ------------------------------------------------------------------ the choice
    def _choose(self, prompt: Prompt) -> None:
        kept = prompt.given
        if kept is None:
            assert prompt.features is not None and self.at is not None
            layout = prompt.layout
            evidence = Evidence(
                features=prompt.features,
                semantic=prompt.semantic,
                forecast=prompt.forecast,
                views=layout.views,
                layer=self.at,
                valid=layout.visual_valid,
                seeds=prompt.seeds,
            )
            kept = self.method.select(evidence)
            if prompt.leader is not None:
                kept = kept.index_select(0, prompt.leader)
        prompt.kept, prompt.features = kept, None
        if prompt.mode == "drop":
            visual = prompt.layout.visual.expand(kept.shape[0], -1).gather(1, kept)
            others = prompt.others.expand(kept.shape[0], -1)
            prompt.positions = torch.cat([others, visual], dim=1).sort(dim=1).values
            prompt.columns = torch.searchsorted(prompt.positions, visual)

    # ------------------------------------------------------------------ arguments behind the cut
    def _shortened(self, prompt: Prompt, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Prefill arguments of the n tokens that stay."""
        positions = prompt.positions
        assert positions is not None
        short: dict[str, Any] = {}
        rotary = kwargs.get("position_embeddings")
        if rotary is not None:
            short["position_embeddings"] = tuple(_take_rotary(table, positions) for table in rotary)
        if kwargs.get("position_ids") is not None:
            # With rotary tables at hand the ids only mislead: gaps look like packed sequences.
            short["position_ids"] = (
                None if rotary is not None else _take(kwargs["position_ids"], positions, dim=-1)
            )
        mask = kwargs.get("attention_mask")
        if mask is not None:
            if mask.ndim == 4 and mask.shape[2] == prompt.length:
                mask = _take(mask, positions, dim=2)
            short["attention_mask"] = self._short_columns(mask, prompt)
        if kwargs.get("cache_position") is not None:
            short["cache_position"] = kwargs["cache_position"][: positions.shape[1]]
        return short

    def _shifted(self, prompt: Prompt, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Decode arguments for caches that are shorter than the unpruned ones."""
        shifted: dict[str, Any] = {}
        if kwargs.get("attention_mask") is not None:
            shifted["attention_mask"] = self._short_columns(kwargs["attention_mask"], prompt)
        if kwargs.get("cache_position") is not None:
            assert prompt.positions is not None
            removed = prompt.length - prompt.positions.shape[1]
            shifted["cache_position"] = kwargs["cache_position"] - removed
        return shifted

    def _short_columns(self, mask: Tensor, prompt: Prompt) -> Tensor:
        """Keys behind the cut: what stayed of the prefill, what came later, unused static slots."""
        positions = prompt.positions
        assert positions is not None
        later = torch.arange(prompt.length, mask.shape[-1], device=mask.device)
        columns = torch.cat([positions, later.expand(positions.shape[0], -1)], dim=1)
        mask = _take(mask, columns, dim=-1)
        if not self.static_cache:
            return mask
        forbidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        return F.pad(mask, (0, prompt.length - positions.shape[1]), value=forbidden)

    def _masked(self, prompt: Prompt, hidden: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        """The layer's mask `[B, 1, Q, N]`, with tokens that are not kept hidden from everybody."""
        assert prompt.kept is not None and self.at is not None
        mask = kwargs.get("attention_mask")
        if mask is None:
            mask = self._implied_mask(hidden, kwargs)
        elif mask.ndim != 4:
            raise NotImplementedError(
                'hiding tokens (mode="mask", or a batch in which some episodes are warming up) '
                'needs attn_implementation="sdpa" or "eager".'
            )
        visual = prompt.layout.visual.expand(hidden.shape[0], -1)
        stays = torch.zeros_like(visual, dtype=torch.bool).scatter(1, prompt.kept, True)
        if prompt.warming is not None:
            stays = stays | prompt.warming[:, None]
        seen = torch.ones(
            hidden.shape[0], mask.shape[-1], dtype=torch.bool, device=hidden.device
        ).scatter(1, visual, stays)[:, None, None]
        if mask.dtype == torch.bool:
            return mask & seen
        return mask.expand(hidden.shape[0], -1, -1, -1).masked_fill(
            ~seen, torch.finfo(mask.dtype).min
        )

    def _implied_mask(self, hidden: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        """What attention does when it gets no mask, as a mask `[1, 1, Q, N]`."""
        assert self.at is not None
        queries, cache = hidden.shape[1], kwargs.get("past_key_values")
        keys = queries
        if cache is not None and self.static_cache:
            keys = _capacity(cache)
        elif cache is not None:
            keys = queries + cache.get_seq_length(self.at)
        mask = torch.ones(queries, keys, dtype=torch.bool, device=hidden.device)
        if self._is_causal(self._attention(self.at), None, queries, kwargs):
            mask = mask.tril(0 if self.static_cache else keys - queries)
        elif self.static_cache:
            mask[:, queries:] = False
        if self.eager:
            additive = torch.zeros_like(mask, dtype=hidden.dtype)
            mask = additive.masked_fill(~mask, torch.finfo(hidden.dtype).min)
        return mask[None, None]

    # ------------------------------------------------------------------ scores
    def _observe(
        self,
        index: int,
        attention: nn.Module,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        kwargs: dict[str, Any],
    ) -> None:
        """After a watched layer's attention: the scores that are read there."""
        prompt = self.prompt
        if prompt is None:
            return
        queries = query.shape[2]
        causal = self._is_causal(attention, mask, queries, kwargs)
        if mask is None:
            if self.phase == "prefill":
                key = key[:, :, :queries]  # A static cache also shows slots not written yet.
        elif mask.ndim == 2:
            mask = mask[:, None, None, : key.shape[2]].bool()
        else:
            mask = mask[..., : key.shape[2]]
        scale = kwargs.get("scaling")
        if scale is None:
            scale = getattr(attention, "scaling", query.shape[-1] ** -0.5)
        options = {"scale": scale, "mask": mask, "softcap": kwargs.get("softcap")}
        score = partial(_received, query, key, options=options, causal=causal)
        batch, layout = query.shape[0], prompt.layout
        visual = layout.visual.expand(batch, -1)
        if index == self.semantic_layer and self.phase == "prefill" and prompt.semantic is None:
            if self.method.semantic_rows == "all":
                prompt.semantic = score(visual, rows=slice(None), row_weight=layout.valid_rows)
            else:
                prompt.semantic = score(visual, rows=prompt.last_row)
        if index not in self.action_layers:
            return
        pruned = prompt.mode == "drop" and self.at is not None and index >= self.at
        rows: slice | Tensor | None = slice(None) if queries > 1 else None
        if self.phase == "prefill":
            rows = self._action_rows(prompt, pruned)
        if pruned:
            assert prompt.columns is not None and prompt.kept is not None
            seen = score(prompt.columns, rows=rows)
            seen = seen.new_zeros(batch, visual.shape[1]).scatter(1, prompt.kept, seen)
        else:
            seen = score(visual, rows=rows)
        prompt.observed = seen if prompt.observed is None else prompt.observed + seen

    def _action_rows(self, prompt: Prompt, pruned: bool) -> slice | Tensor | None:
        """Rows of the prefill that are action queries; None: the last one."""
        if prompt.layout.action_rows is not None:
            return _from_end(prompt.layout.action_rows, prompt.length)
        if prompt.last_row is None or not pruned:
            return prompt.last_row
        assert prompt.positions is not None
        return torch.searchsorted(prompt.positions, prompt.last_row)

    def _is_causal(
        self, attention: nn.Module, mask: Tensor | None, queries: int, kwargs: Mapping[str, Any]
    ) -> bool:
        """Whether the attention function itself hides the future: not if a 4-D mask says it all."""
        if queries == 1 or self.eager or (mask is not None and mask.ndim == 4):
            return False
        causal = kwargs.get("is_causal")
        return bool(getattr(attention, "is_causal", True) if causal is None else causal)


# ---------------------------------------------------------------------- tensor helpers
def _received(
    query: Tensor,
    key: Tensor,
    columns: Tensor,
    *,
    options: dict[str, Any],
    causal: bool,
    rows: slice | Tensor | None,
    row_weight: Tensor | None = None,
) -> Tensor:
    """Attention that `columns` get from `rows` (None: the last), mean over heads: `[B, M]` fp32."""
    if rows is None:
        # The last row has no future to hide, and one row takes few operations.
        mask = options["mask"]
        options = {**options, "mask": None if mask is None else mask[:, :, -1:]}
        return attention_rows(query[:, :, -1:], key, **options)[:, :, 0].mean(1).gather(1, columns)
    return attention_column_mean(
        query, key, columns, **options, causal=causal, rows=rows, row_weight=row_weight
    )


def _hidden(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _take(tensor: Tensor, index: Tensor, *, dim: int, batch_dim: int = 0) -> Tensor:
    """Rows `index` `[B, n]` of a tensor along `dim`; a batch of 1 serves every row of `index`."""
    dim %= tensor.ndim
    shape = [1] * tensor.ndim
    shape[batch_dim], shape[dim] = index.shape
    target = list(tensor.shape)
    batch = max(index.shape[0], tensor.shape[batch_dim])
    target[batch_dim] = batch
    tensor = tensor.expand(target)
    target[dim] = index.shape[1]
    return tensor.gather(dim, index.view(shape).expand(target))


def _take_rotary(table: Tensor, positions: Tensor) -> Tensor:
    """Rows of a cos or sin table `[B, S, D]`, or `[3, B, S, D]` with several position axes."""
    return _take(table, positions, dim=-2, batch_dim=table.ndim - 3)


def _from_end(rows: slice, length: int) -> slice:
    start, stop, _ = rows.indices(length)
    return slice(start - length, stop - length if stop < length else None)


def _capacity(cache: Any) -> int:
    """Slots of a static cache."""
    if hasattr(cache, "get_max_length"):
        return int(cache.get_max_length())
    return int(cache.get_max_cache_shape())


def _refuse_unknown(kwargs: Mapping[str, Any], length: int) -> None:
    """Refuse per-token arguments that a layer would get at the wrong length."""
    for name, value in kwargs.items():
        if name in _PER_TOKEN or name == "hidden_states" or not isinstance(value, Tensor):
            continue
        if value.ndim >= 2 and value.shape[1] == length:
            raise NotImplementedError(
                f"decoder layers get `{name}` {tuple(value.shape)}, one entry per token, and it is "
                'unknown how to shorten it; use `mode="mask"`, or open an issue with the model.'
            )
