"""Action history: what is remembered of action scores, and forecast from it (Eq. 6 and 7)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vla_pruner.pruning.options import require_choice, require_int

Count = Tensor | int
"""Observations of each row's episode: `[B]` int64, or one number for all."""

Censored = Literal["zero", "carry"]
"""What to remember of tokens that no action query could see."""


@dataclass(frozen=True, kw_only=True)
class HistorySpec:
    """How a method remembers the action scores of an episode.

    The memory is a tensor `history` `[B, slots, M]`, newest first, and `count` `[B]` int64, the
    observations so far in each row's episode; both are zero when an episode starts.

    Args:
        kind: "window", the decaying window of Eq. 7, or "ema", the moving average of Eq. 6.
        window: observations that a window looks back on.
        gamma: decay rate of the window, in [0, 1].
        alpha: weight of the newest observation in the moving average, in (0, 1].
        newest_heaviest: False turns the window's weights round, as the public release does.
        layers: layers whose action attention is averaged: "latter-half" (the paper), "middle" (the
            last layer of the first half: 15 of 32), or explicit indices.
        censored: what is remembered of tokens that no action query could see, as they had been cut:
            "zero" (the paper), or "carry": what was remembered before (see `uncensor`).

    Raises:
        ValueError: an option outside these ranges.
    """

    kind: Literal["window", "ema"] = "window"
    window: int = 3
    gamma: float = 0.8
    alpha: float = 0.5
    newest_heaviest: bool = True
    layers: Literal["latter-half", "middle"] | tuple[int, ...] = "latter-half"
    censored: Censored = "zero"

    def __post_init__(self) -> None:
        require_choice("history", self.kind, ("window", "ema"))
        require_choice("censored", self.censored, ("zero", "carry"))
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

    def update(
        self, history: Tensor, count: Count, observed: Tensor, kept: Tensor | None = None
    ) -> tuple[Tensor, Count]:
        """The memory, and its count (not capped), with the action score of a finished step.

        Args:
            history, count: the memory so far.
            observed: `[B, M]`.
            kept: `[B, M]` bool, tokens that all observed layers could see; None: all tokens.
        """
        seen = None if self.censored == "zero" or kept is None else kept.to(history.device)
        if seen is not None:
            remembered = _where(count, history[:, 0], torch.zeros_like(history[:, 0]))
            observed = uncensor(observed, seen, remembered)
        if self.kind == "window":
            return push(history, observed), count + 1
        mixed = ema_update(history[:, 0], observed, self.alpha, first=count == 0)
        mixed = mixed if seen is None else torch.where(seen, mixed, observed)
        return mixed[:, None].to(history.dtype), count + 1

    def forecast(self, history: Tensor, count: Count) -> Tensor:
        """Action score expected at the next step: `[B, M]` fp32, 0 before any observation."""
        if self.kind == "ema":
            return _where(count, history[:, 0].float(), torch.zeros_like(history[:, 0]).float())
        return decaying_window(
            history, count, gamma=self.gamma, newest_heaviest=self.newest_heaviest
        )


def decaying_window(
    history: Tensor, count: Count, *, gamma: float, newest_heaviest: bool = True
) -> Tensor:
    """Weighted sum of the last w observations, `sum_i gamma^i S^(t-i)` (Eq. 7).

    With gamma = 0 it is the newest observation: what the ranks tend to as gamma does (Fig. 10 has a
    column for 0; the sum itself would be 0 everywhere).

    Args:
        history: `[B, w, M]`, newest first.
        count: how many entries of each row are real (as many as there are, if it is more); the
            others are ignored, NaN or not.
        gamma: decay rate in [0, 1].
        newest_heaviest: True as in the paper, i-th newest entry weighs `gamma ** i`. False as in
            the public release: the oldest of the `count` entries weighs 1, the newest
            `gamma ** (count - 1)`.

    Returns:
        `[B, M]` fp32; 0 where nothing was observed. The scale means nothing: scores are ranked.
    """
    if isinstance(count, int):
        real = min(count, history.shape[1])
        newest = 0 if gamma == 0 else 1
        ages = range(newest, real + newest) if newest_heaviest else range(real - 1, -1, -1)
        total = torch.zeros_like(history[:, 0], dtype=torch.float32)
        for entry, age in zip(history.unbind(1), ages, strict=False):
            total = total.add(entry, alpha=gamma**age)
        return total
    return _windows(history, count, gamma, newest_heaviest)


def _windows(history: Tensor, count: Tensor, gamma: float, newest_heaviest: bool) -> Tensor:
    """`decaying_window` of rows that have seen different numbers of steps, `count` `[B]`."""
    window = history.shape[1]
    place = torch.arange(1, window + 1, device=history.device)
    known = count.to(history.device).clamp(max=window)[:, None]
    power = place.expand(known.shape[0], window) if newest_heaviest else known - place
    if gamma == 0 and newest_heaviest:
        power = power - 1  # 0 ** 0 is 1
    weight = torch.full_like(power, gamma, dtype=torch.float32).pow(power.clamp(min=0))
    there = (place <= known)[..., None]
    return torch.where(there, history.float() * weight[..., None], 0.0).sum(dim=1)


def _where(count: Count, begun: Tensor, new: Tensor) -> Tensor:
    """`begun` in rows whose episode has observations, `new` in the others."""
    if isinstance(count, int):
        return begun if count > 0 else new
    return torch.where((count > 0).to(begun.device)[:, None], begun, new)


def ema_update(previous: Tensor, observed: Tensor, alpha: float, first: Tensor | bool) -> Tensor:
    """One step of the exponential moving average, `(1 - alpha) previous + alpha observed` (Eq. 6).

    Args:
        previous: `[B, M]`, the forecast so far.
        observed: `[B, M]`, what the finished step showed.
        alpha: weight of the observation, in [0, 1].
        first: bool, `[B]` or for all rows, True where there is no forecast yet: the observation
            starts it.

    Returns:
        `[B, M]` fp32.
    """
    observed = observed.float()
    mixed = (1.0 - alpha) * previous.float() + alpha * observed
    if isinstance(first, bool):
        return observed if first else mixed
    return torch.where(first.to(observed.device)[:, None], observed, mixed)


def push(history: Tensor, observed: Tensor) -> Tensor:
    """Put `observed` `[B, M]` in front of `history` `[B, w, M]`; the oldest entry falls out."""
    return torch.cat([observed[:, None].to(history.dtype), history[:, :-1]], dim=1)


def uncensor(observed: Tensor, visible: Tensor, remembered: Tensor) -> Tensor:
    """Carry what was remembered of cut tokens to the place of the zeros in an action score.

    A cut token gets no attention, whatever it would have been worth; remembered as it is, the zero
    keeps the token out for as long as the memory lasts. A cut leaves its tokens' share of the
    softmax to the others; a row with cut tokens is therefore multiplied so that the visible ones
    have the sum that was remembered of them.

    Args:
        observed: `[B, M]`, the action score of a step.
        visible: `[B, M]` bool, tokens that the action queries could see.
        remembered: `[B, M]`, what was remembered last.

    Returns:
        `[B, M]` fp32; in proportion to `observed` at visible tokens, `remembered` elsewhere.
    """
    observed, remembered = observed.float(), remembered.float()
    seen = torch.where(visible, observed, 0.0).sum(dim=1, keepdim=True)
    expected = torch.where(visible, remembered, 0.0).sum(dim=1, keepdim=True)
    comparable = ~visible.all(dim=1, keepdim=True) & (seen > 0) & (expected > 0)
    observed = observed * torch.where(comparable, expected / seen, 1.0)
    return torch.where(visible, observed, remembered)
