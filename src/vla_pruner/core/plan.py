"""What a method does to one decoder, worked out and checked once, when it is attached."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import nn

from vla_pruner.core import refusals
from vla_pruner.core.layout import Adapter, Layout
from vla_pruner.methods.base import Method, ScoreSpec
from vla_pruner.pruning.history import HistorySpec

_NEEDS = ("text", "motion", "frame")


@dataclass(frozen=True)
class Reading:
    """A score to be read, once per prefill.

    Args:
        number: index among the plan's readings.
        spec: what is read.
        cuts: cuts that have happened before it is read.
    """

    number: int
    spec: ScoreSpec
    cuts: int


@dataclass(frozen=True, eq=False)
class Plan:
    """Where a decoder of `depth` layers is cut and read.

    Args:
        depth: number of decoder layers.
        cuts: layers before which tokens are cut, ascending.
        skipped: layers that do not run.
        readings: scores to be read.
        asked: for each cut, the reading behind each name that the method uses.
        action_layers: layers whose action attention is watched.
        action_cuts: cuts that have happened when the last of them runs.
        needs_text: whether the layout has to say which rows are text.
        number: for each layer, cuts that have happened when it runs.
        first: for each number of cuts, the first layer that runs after them; None: none does.
        window: tokens that a layer behind the first cut can look back on; None: all.
        one_mask: whether the masks of layers behind the first cut are sized by a layer before it.
    """

    depth: int
    cuts: tuple[int, ...]
    skipped: frozenset[int]
    readings: tuple[Reading, ...]
    asked: tuple[Mapping[str, int], ...]
    action_layers: tuple[int, ...]
    action_cuts: int
    needs_text: bool
    number: tuple[int, ...]
    first: tuple[int | None, ...]
    window: int | None = None
    one_mask: bool = True


def make_plan(method: Method, adapter: Adapter) -> Plan:
    """The plan of `method` for the decoder of `adapter`.

    Raises:
        ValueError: the method asks for what the decoder does not have.
        NotImplementedError: a decoder that cannot be cut there.
    """
    decoder, depth = adapter.decoder, len(adapter.layers)
    config = getattr(decoder, "config", None)
    method.check(config, depth)
    _check_needs(method, adapter)
    cuts = tuple(method.cuts(depth))
    _check_cuts(method, cuts, depth, adapter)
    skipped = frozenset(method.skipped(depth))
    if not skipped <= set(range(1, depth)):
        raise ValueError(
            f"method {method.name!r} skips layers {sorted(skipped)}; only layers 1..{depth - 1} "
            "can be skipped: the first one also keeps count of the cache."
        )
    if skipped and not adapter.skips_layers:
        raise NotImplementedError(
            f"method {method.name!r} skips layers, which {type(adapter).__name__} cannot do: this "
            "policy runs its layers piece by piece; use a method that skips none."
        )
    running = [layer for layer in range(depth) if layer not in skipped]
    behind = [layer for layer in running if cuts and layer >= cuts[0]]
    window = _smallest_window(adapter, behind, config)
    if cuts and method.positions == "compact":
        _check_rotary(method, decoder, config)
    number = tuple(sum(cut <= layer for cut in cuts) for layer in range(depth))
    readings: dict[tuple[ScoreSpec, int], Reading] = {}
    asked = []
    for order, cut in enumerate(cuts):
        names = {}
        for name, spec in method.scores(cut).items():
            _check_score(method, name, spec, cut, skipped)
            happened = order if spec.layer == cut else number[spec.layer]
            reading = Reading(len(readings), spec, happened)
            names[name] = readings.setdefault((spec, happened), reading).number
        asked.append(names)
    read = [reading.spec.layer for reading in readings.values()]
    text = any(r.spec.rows in ("text", "weighted") for r in readings.values())
    if adapter.reads_output:
        action_layers = _action_layers(method.history, len(adapter.reader_layers), frozenset())
        action_cuts = len(cuts)
    else:
        action_layers = _action_layers(method.history, depth, skipped)
        action_cuts = number[action_layers[-1]] if action_layers else 0
    _refuse_shared(adapter, {*read, *(() if adapter.reader_layers else action_layers)})
    return Plan(
        depth=depth,
        cuts=cuts,
        skipped=skipped,
        readings=tuple(readings.values()),
        asked=tuple(asked),
        action_layers=action_layers,
        action_cuts=action_cuts,
        needs_text=text or "text" in method.needs,
        number=number,
        first=tuple(
            next((layer for layer in running if number[layer] == count), None)
            for count in range(len(cuts) + 1)
        ),
        window=window,
        one_mask=_masks_start_early(config, behind, depth),
    )


def budgets(
    method: Method, adapter: Adapter, plan: Plan, layout: Layout
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """Visual tokens that each cut has to leave, in all and of each camera.

    Raises:
        ValueError: a budget that does not fit these cameras, or a layout that does not say which
            rows are text to a method that needs it.
    """
    cuts, views = plan.cuts, layout.views
    if plan.needs_text and layout.text_rows is None:
        raise refusals.no_text(method.name, adapter)
    counts = tuple(method.schedule(views, plan.depth)) if cuts else ()
    falling = (sum(views), *counts)
    if len(counts) != len(cuts) or any(not 0 <= b <= a for a, b in pairwise(falling)):
        raise refusals.impossible_schedule(method.name, counts, cuts, sum(views))
    counts, shares = tuple(max(count, len(layout.read)) for count in counts), []
    for number, count in enumerate(counts):
        per_view = method.budget == "view" and not method.adaptive
        views = method.split(views, count, number) if per_view else (count,)
        shares.append(views)
    return counts, tuple(shares)


def _refuse_shared(adapter: Adapter, seen: Collection[int]) -> None:
    """Refuse layers that are one module, and attentions of them where one is `seen`."""
    layers = list(adapter.layers)
    refusals.refuse_shared(layers, "decoder layers", range(len(layers)))
    attentions = [adapter.attention(layer) for layer in layers] if seen else []
    refusals.refuse_shared(attentions, "the attentions of layers", seen)


def _check_needs(method: Method, adapter: Adapter) -> None:
    for need in method.needs:
        if need not in _NEEDS:
            raise ValueError(
                f"method {method.name!r} needs {need!r}, which nothing can give; "
                f"`Method.needs` knows {', '.join(map(repr, _NEEDS))}."
            )
    if "frame" in method.needs and not adapter.gives_frames:
        raise ValueError(
            f"method {method.name!r} compares the images of two steps patch by patch, and "
            f"{type(adapter).__name__} does not say that its visual tokens are patches of one "
            "image per camera. If they are, name their places: "
            "adapter=vp.models.Decoder(layers=..., visual=...), and call `session.frame(images)` "
            "before each call of the model; or use another method."
        )


def _check_cuts(method: Method, cuts: tuple[int, ...], depth: int, adapter: Adapter) -> None:
    if any(a >= b for a, b in pairwise(cuts)):
        raise ValueError(
            f"method {method.name!r} cuts before layers {cuts}; they must be ascending."
        )
    for cut in cuts:
        if not 0 <= cut < depth:
            raise ValueError(
                f"method {method.name!r} cuts before layer {cut}, but the decoder has {depth} "
                f"layers; use 0..{depth - 1}."
            )
    if cuts and cuts[0] < adapter.earliest_cut:
        raise ValueError(
            f"`layer={cuts[0]}`: {type(adapter.decoder).__name__} adds image features to its "
            f"first {adapter.earliest_cut} layers; use `layer` >= {adapter.earliest_cut}."
        )


def _check_score(
    method: Method, name: str, spec: ScoreSpec, cut: int, skipped: frozenset[int]
) -> None:
    latest = cut if spec.kind == "logits" else cut - 1
    if spec.layer > latest:
        raise ValueError(
            f"method {method.name!r} reads its {name!r} score in layer {spec.layer}, which runs "
            f"after tokens are cut before layer {cut}; use at most {latest}."
        )
    if spec.layer in skipped:
        raise ValueError(
            f"method {method.name!r} reads its {name!r} score in layer {spec.layer}, which it "
            "skips; read another layer, or let this one run."
        )
    if spec.rows == "weighted" and type(method).query_weights is Method.query_weights:
        raise ValueError(
            f'method {method.name!r} asks for rows="weighted" and does not define `query_weights`.'
        )


def _check_rotary(method: Method, decoder: nn.Module, config: Any) -> None:
    rotary = getattr(decoder, "rotary_emb", None)
    takes = (
        list(inspect.signature(rotary.forward).parameters) if isinstance(rotary, nn.Module) else []
    )
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if takes != ["x", "position_ids"] or "mrope_section" in rope:
        raise NotImplementedError(
            f'method {method.name!r} renumbers tokens (positions="compact"), which needs a decoder '
            f"with one rotary table for all layers; {type(decoder).__name__} has none. Use "
            'positions="keep".'
        )


# -- windows and kinds of layers -----------------------------------------------------------------

_FULL = ("full_attention", "attention", "global", "full")
_WINDOWED = ("sliding_attention",)


def _kinds(config: Any, depth: int) -> tuple[str, ...] | None:
    """What a configuration calls each layer; None: it tells none from another."""
    for name in ("layer_types", "attention_layers", "layers_block_type", "block_types"):
        kinds = getattr(config, name, None)
        if isinstance(kinds, list | tuple) and len(kinds) == depth:
            return tuple(str(kind) for kind in kinds)
    return None


def _smallest_window(adapter: Adapter, behind: list[int], config: Any) -> int | None:
    """The shortest sliding window behind the cut, which is checked against each call's length.

    Raises:
        NotImplementedError: a layer that mixes tokens in another way than by masked attention.
    """
    kinds = _kinds(config, len(adapter.layers))
    windows = []
    for index in behind:
        attention = adapter.attention(adapter.layers[index])
        window = _window_of(attention, config)
        kind = _recurrent(adapter.layers[index]) if kinds is None else kinds[index]
        if kind is not None and kind not in (*_FULL, *_WINDOWED):
            raise NotImplementedError(
                f"layer {index} is of kind {kind!r}, in which removed tokens would shift their "
                "neighbours; tokens can be cut only where all later layers are attention that a "
                "mask describes. Cut later (`layer`), or use another model."
            )
        if kind in _FULL or (window is None and kind is None):
            continue
        if window is None:
            raise NotImplementedError(
                f"layer {index} attends within a sliding window whose length is not known; tokens "
                "can be cut only where all later layers see everything."
            )
        windows.append(window)
    return min(windows, default=None)


def _recurrent(layer: nn.Module) -> str | None:
    """What a layer is called that carries a state along instead of attending; None: it attends."""
    try:
        takes = inspect.signature(layer.forward).parameters
    except (TypeError, ValueError):
        return None
    carries = any(name in takes for name in ("state", "cache_params"))
    return type(layer).__name__ if carries and "attention_mask" not in takes else None


def _window_of(attention: nn.Module, config: Any) -> int | None:
    own = getattr(attention, "sliding_window", None)
    if own is None and getattr(config, "use_sliding_window", True):
        own = getattr(config, "sliding_window", None)
    return own if isinstance(own, int) and not isinstance(own, bool) else None


def _masks_start_early(config: Any, behind: list[int], depth: int) -> bool:
    """Whether each kind's mask, sized by the first layer of its kind, is sized before the cut."""
    kinds = _kinds(config, depth)
    if kinds is None or len(set(kinds)) == 1 or not behind:
        return True
    return all(kinds.index(kinds[layer]) < behind[0] for layer in behind)


def _action_layers(
    history: HistorySpec | None, depth: int, skipped: frozenset[int]
) -> tuple[int, ...]:
    """Layers to watch: those that run, of a range; named ones have to run."""
    if history is None:
        return ()
    layers = history.resolve_layers(depth)
    running = tuple(layer for layer in layers if layer not in skipped)
    if not running or (running != layers and not isinstance(history.layers, str)):
        raise ValueError(
            f"action attention is read in layers {layers}, of which "
            f"{sorted(skipped & set(layers))} are skipped; name layers that run."
        )
    return running
