"""What a pruning method is: which judgements it asks for, from which layer, and how it chooses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vla_pruner.pruning.budget import Budget, check_keep
from vla_pruner.pruning.history import decaying_window, ema_update, push

SemanticRows = Literal["all", "last"]


@dataclass(frozen=True)
class Evidence:
    """What a method may look at when tokens are cut.

    Args:
        features: `[B, M, D]`, projected visual embeddings as they enter layer 0.
        semantic: `[B, M]` fp32, the prefill score that `Method.semantic_rows` asks for.
        forecast: `[B, M]` fp32, the action score predicted from the episode's history.
        views: visual tokens of each camera; they sum to M.
        layer: index of the layer about to run.
        valid: `[B, M]` bool, False for the tokens of a missing camera: they are never chosen while
            a real token is left.
        seeds: `[B]` int64, one number per row that names its episode and step; only the random
            baseline looks at it.
    """

    features: Tensor
    semantic: Tensor | None
    forecast: Tensor | None
    views: tuple[int, ...]
    layer: int
    valid: Tensor | None = None
    seeds: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class HistorySpec:
    """How a method remembers the action scores of an episode.

    The memory is a tensor `[B, slots, M]` (newest first) and a number of observations `[B]`, both
    zero when an episode starts.

    Args:
        kind: "window", the decaying window of Eq. 7, or "ema", the moving average of Eq. 6.
        window: observations that a window looks back on.
        gamma: decay rate of the window, in [0, 1].
        alpha: weight of the newest observation in the moving average, in (0, 1].
        newest_heaviest: False turns the window's weights round, as the public release does.
        layers: layers whose action attention is averaged: "latter-half" (the paper), "middle" (the
            last layer of the first half: 15 of 32), or explicit indices.

    Raises:
        ValueError: an option outside these ranges.
    """

    kind: Literal["window", "ema"] = "window"
    window: int = 3
    gamma: float = 0.8
    alpha: float = 0.5
    newest_heaviest: bool = True
    layers: Literal["latter-half", "middle"] | tuple[int, ...] = "latter-half"

    def __post_init__(self) -> None:
        require_choice("history", self.kind, ("window", "ema"))
        require_int("window", self.window, 1)
        if not 0.0 <= self.gamma <= 1.0:
            raise ValueError(f"`gamma={self.gamma}` must lie in [0, 1].")
        if not 0.0 < self.alpha <= 1.0:
            raise ValueError(f"`alpha={self.alpha}` must lie in (0, 1].")
        if isinstance(self.layers, str):
            require_choice("action_layers", self.layers, ("latter-half", "middle"))
        elif not self.layers:
            raise ValueError(
                '`action_layers` is empty; name at least one layer or use "latter-half".'
            )
        else:
            for layer in self.layers:
                require_int("action_layers", layer, 0)

    @property
    def slots(self) -> int:
        """Scores `[B, M]` that are kept per episode."""
        return self.window if self.kind == "window" else 1

    def resolve_layers(self, num_layers: int) -> tuple[int, ...]:
        """Indices of the layers to average in a decoder of `num_layers` layers, ascending.

        Raises:
            ValueError: an index beyond the decoder.
        """
        if self.layers == "latter-half":
            return tuple(range(num_layers // 2, num_layers))
        if self.layers == "middle":
            return (max(num_layers // 2 - 1, 0),)
        chosen = tuple(sorted({int(layer) for layer in self.layers}))
        if chosen[-1] >= num_layers:
            raise ValueError(
                f"action layer {chosen[-1]} does not exist: the decoder has {num_layers} layers; "
                f"use indices in 0..{num_layers - 1}."
            )
        return chosen

    def update(self, history: Tensor, count: Tensor, observed: Tensor) -> tuple[Tensor, Tensor]:
        """Remember the action score of a finished step.

        Args:
            history: `[B, slots, M]`.
            count: `[B]` int64, observations so far in each row's episode.
            observed: `[B, M]`.

        Returns:
            The new `history` and `count` (count is not capped at `slots`).
        """
        if self.kind == "window":
            return push(history, observed), count + 1
        forecast = ema_update(history[:, 0], observed, self.alpha, first=count == 0)
        return forecast[:, None].to(history.dtype), count + 1

    def forecast(self, history: Tensor, count: Tensor) -> Tensor:
        """Action score `[B, M]` fp32 expected at the next step; 0 before the first observation."""
        if self.kind == "ema":
            started = (count > 0).to(history.device)[:, None]
            return torch.where(started, history[:, 0].float(), 0.0)
        return decaying_window(
            history, count, gamma=self.gamma, newest_heaviest=self.newest_heaviest
        )


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A pruning method: a few options, and `choose`.

    Args:
        keep: a float in (0, 1] is the fraction of visual tokens that stay, an int their number.
        layer: K, the number of layers that still see every token; tokens are cut before layer K.
        budget: "global", one budget over all cameras (the paper), or "view", the same in each.

    Raises:
        ValueError: an option outside its range.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str | None] = None
    licence: ClassVar[str] = "Apache-2.0"

    keep: float | int = 0.25
    layer: int = 3
    budget: Literal["global", "view"] = "global"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        require_int("layer", self.layer, 1 if self.semantic_rows is not None else 0)
        require_choice("budget", self.budget, ("global", "view"))

    # What the method asks for.

    @property
    def semantic_rows(self) -> SemanticRows | None:
        """Which prefill queries vote on visual tokens: "all", the "last" one, or None: no score."""
        return None

    @property
    def history(self) -> HistorySpec | None:
        """How action scores are remembered; None: they are not."""
        return None

    @property
    def warmup(self) -> int:
        """Steps at the start of an episode that run on all tokens."""
        return 0

    def semantic_layer(self, cut: int) -> int:
        """Index of the layer whose attention gives the semantic score for the cut before `cut`."""
        return cut - 1

    def cuts(self, num_layers: int) -> tuple[int, ...]:
        """Layers before which tokens are cut, ascending.

        Raises:
            ValueError: a layer that the decoder does not have.
        """
        if self.layer >= num_layers:
            raise ValueError(
                f"`layer={self.layer}` cuts nothing: the decoder has {num_layers} layers; "
                f"use at most {num_layers - 1}."
            )
        return (self.layer,)

    # What it decides.

    def kept(self, views: tuple[int, ...]) -> int:
        """Visual tokens that stay in all; depends on the shape of the input alone.

        Args:
            views: visual tokens of each camera.

        Raises:
            ValueError: a `keep` larger than the number of visual tokens.
        """
        return sum(self._resolve(views))

    def select(self, evidence: Evidence) -> Tensor:
        """Visual tokens that stay.

        Returns:
            `[B, k]` int64, ascending, in 0..M-1, with `k = self.kept(evidence.views)`.

        Raises:
            ValueError: evidence whose shapes do not fit, or that lacks what the method asks for.
        """
        self._check(evidence)
        budgets = self._resolve(evidence.views)
        spans = (sum(evidence.views),) if self.budget == "global" else evidence.views
        chosen, start = [], 0
        for size, k in zip(spans, budgets, strict=True):
            view = slice(start, start + size)
            chosen.append(start + self._choose_within(evidence, view, size, k))
            start += size
        return chosen[0] if len(chosen) == 1 else torch.cat(chosen, dim=1)

    @abstractmethod
    def choose(
        self,
        features: Tensor,
        semantic: Tensor | None,
        forecast: Tensor | None,
        k: int,
        *,
        valid: Tensor | None = None,
        seeds: Tensor | None = None,
    ) -> Tensor:
        """Choose k of n tokens: those of one view, or of all views under a global budget.

        Args:
            features: `[B, n, D]`.
            semantic, forecast: `[B, n]` fp32; None where the method does not ask for them.
            k: tokens to keep, 1 <= k < n.
            valid: `[B, n]` bool, False for tokens that are candidates of nothing.
            seeds: `[B]` int64, see `Evidence`.

        Returns:
            `[B, k]` int64, ascending.
        """

    def _choose_within(self, evidence: Evidence, view: slice, size: int, k: int) -> Tensor:
        features = evidence.features[:, view]
        if k == size:
            everything = torch.arange(size, device=features.device)
            return everything.expand(features.shape[0], size)
        return self.choose(
            features,
            None if evidence.semantic is None else evidence.semantic[:, view],
            None if evidence.forecast is None else evidence.forecast[:, view],
            k,
            valid=None if evidence.valid is None else evidence.valid[:, view],
            seeds=evidence.seeds,
        )

    def _resolve(self, views: tuple[int, ...]) -> tuple[int, ...]:
        return Budget(self.keep, self.budget).resolve(views)

    def _check(self, evidence: Evidence) -> None:
        if evidence.features.ndim != 3:
            raise ValueError(f"features must be [B, M, D]; got {tuple(evidence.features.shape)}.")
        shape = evidence.features.shape[:2]
        if sum(evidence.views) != shape[1]:
            raise ValueError(
                f"views {evidence.views} sum to {sum(evidence.views)}, "
                f"but the input has {shape[1]} visual tokens."
            )
        asked = {
            "semantic": (evidence.semantic, self.semantic_rows is not None),
            "forecast": (evidence.forecast, self.history is not None),
            "valid": (evidence.valid, False),
        }
        for name, (tensor, needed) in asked.items():
            if tensor is None and needed:
                raise ValueError(f"method {self.name!r} needs the {name} score; got None.")
            if tensor is not None and tensor.shape != shape:
                raise ValueError(
                    f"{name} must be [B, M] = {tuple(shape)}; got {tuple(tensor.shape)}."
                )


def require_int(option: str, value: object, least: int) -> None:
    """Refuse an option that is not an int of at least `least` (ValueError)."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"`{option}={value!r}` must be an integer of at least {least}.")


def require_choice(option: str, value: object, choices: tuple[str, ...]) -> None:
    """Refuse an option that is not one of `choices` (ValueError)."""
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"`{option}={value!r}` is unknown; use one of {listed}.")
