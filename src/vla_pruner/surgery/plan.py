"""What a method does to one decoder, worked out and checked once, when it is attached."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import nn

from vla_pruner.methods.base import HistorySpec, Method, ScoreSpec
from vla_pruner.surgery.layout import Adapter

_NEEDS = ("text", "motion", "frame")


@dataclass(frozen=True)
class Reading:
    """A score to be read, once per prefill.

    Args:
        number: index among the plan's readings.
        spec: what is read.
        stage: cuts that have happened before it is read.
    """

    number: int
    spec: ScoreSpec
    stage: int


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
        action_stage: cuts that have happened when the last of them runs.
        needs_text: whether the layout has to say which rows are text.
        recalls: whether tokens that are cut keep the keys and values of the last step.
    """

    depth: int
    cuts: tuple[int, ...]
    skipped: frozenset[int]
    readings: tuple[Reading, ...]
    asked: tuple[Mapping[str, int], ...]
    action_layers: tuple[int, ...]
    action_stage: int
    needs_text: bool
    recalls: bool

    def stage(self, layer: int) -> int:
        """Cuts that have happened when `layer` runs."""
        return sum(cut <= layer for cut in self.cuts)

    def runs_in(self, stage: int) -> int | None:
        """First layer that runs after `stage` cuts and before the next; None: there is none."""
        for layer in range(self.depth):
            if self.stage(layer) == stage and layer not in self.skipped:
                return layer
        return None

    def read_in(self, layer: int, kind: str) -> list[Reading]:
        """Readings of one kind in one layer."""
        return [r for r in self.readings if r.spec.layer == layer and r.spec.kind == kind]


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
    if cuts:
        _refuse_windows(adapter, [i for i in range(cuts[0], depth) if i not in skipped], config)
    if cuts and method.positions == "compact":
        _check_rotary(method, decoder, config)
    readings: dict[tuple[ScoreSpec, int], Reading] = {}
    asked = []
    for number, cut in enumerate(cuts):
        names = {}
        for name, spec in method.scores(cut).items():
            _check_score(method, name, spec, cut, skipped)
            stage = number if spec.layer == cut else sum(c <= spec.layer for c in cuts)
            reading = readings.setdefault((spec, stage), Reading(len(readings), spec, stage))
            names[name] = reading.number
        asked.append(names)
    history = method.history
    if history is not None and history.censored == "impute":
        _check_impute(method, asked)
    text = any(r.spec.rows in ("text", "voters") for r in readings.values())
    if adapter.reads_output:
        action_layers = _action_layers(history, len(adapter.reader_layers), frozenset())
        action_stage = len(cuts)
    else:
        action_layers = _action_layers(history, depth, skipped)
        action_stage = sum(cut <= action_layers[-1] for cut in cuts) if action_layers else 0
    return Plan(
        depth=depth,
        cuts=cuts,
        skipped=skipped,
        readings=tuple(readings.values()),
        asked=tuple(asked),
        action_layers=action_layers,
        action_stage=action_stage,
        needs_text=text or "text" in method.needs,
        recalls=method.recalled_layer(depth) is not None,
    )


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
    if spec.rows == "voters" and type(method).voters is Method.voters:
        raise ValueError(
            f'method {method.name!r} asks for rows="voters" and does not define `voters`.'
        )


def _check_impute(method: Method, asked: list[dict[str, int]]) -> None:
    if not asked or "semantic" not in asked[0]:
        raise ValueError(
            f'method {method.name!r} remembers with censored="impute", which needs a score named '
            '"semantic" at its first cut; ask for one, or use another `censored`.'
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


def _refuse_windows(adapter: Adapter, layers: list[int], config: Any) -> None:
    kinds = getattr(config, "layer_types", None)
    sliding = getattr(config, "sliding_window", None) is not None and getattr(
        config, "use_sliding_window", True
    )
    for index in layers:
        if isinstance(kinds, list | tuple):
            limited = kinds[index] != "full_attention"
        else:
            attention = adapter.attention(adapter.layers[index])
            limited = sliding or getattr(attention, "sliding_window", None) is not None
        if limited:
            raise NotImplementedError(
                f"layer {index} attends within a sliding window or chunk, which removed tokens "
                "would shift; tokens can be cut only where all later layers see everything."
            )


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
