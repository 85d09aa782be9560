"""Forecasts of the action score from what earlier steps of an episode observed (Eq. 6 and 7)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from vla_pruner.pruning.selection import top_k

Censored = Literal["zero", "carry", "decay", "impute"]
"""What to remember of tokens that no action query could see."""


def decaying_window(
    history: Tensor,
    count: Tensor,
    *,
    gamma: float,
    newest_heaviest: bool = True,
    haste: Tensor | None = None,
) -> Tensor:
    """Weighted sum of the last w observations, `sum_i gamma^i S^(t-i)` (Eq. 7).

    With gamma = 0 it is the newest observation: what the ranks tend to as gamma does (Fig. 10 has a
    column for 0; the sum itself would be 0 everywhere).

    Args:
        history: `[B, w, M]`, newest first.
        count: `[B]`, how many entries of each row are real; the others are ignored, NaN or not.
        gamma: decay rate in [0, 1].
        newest_heaviest: True as in the paper, i-th newest entry weighs `gamma ** i`. False as in
            the public release: the oldest of the `count` entries weighs 1, the newest
            `gamma ** (count - 1)`.
        haste: `[B]`, at least 0: the weight of the i-th newest entry is also multiplied by
            `exp(-haste (i - 1))`, which shortens the window; None: 0.

    Returns:
        `[B, M]` fp32; 0 where nothing was observed. The scale means nothing: scores are ranked.
    """
    window = history.shape[1]
    age = torch.arange(1, window + 1, device=history.device)
    count = count.to(history.device)[:, None]
    power = age.expand(count.shape[0], window) if newest_heaviest else count - age
    if gamma == 0 and newest_heaviest:
        power = power - 1  # 0 ** 0 is 1
    weight = torch.full_like(power, gamma, dtype=torch.float32).pow(power.clamp(min=0))
    if haste is not None:
        weight = weight * torch.exp(-haste.float().to(history.device)[:, None] * (age - 1))
    real = (age <= count)[..., None]
    return torch.where(real, history.float() * weight[..., None], 0.0).sum(dim=1)


def ema_update(previous: Tensor, observed: Tensor, alpha: float, first: Tensor) -> Tensor:
    """One step of the exponential moving average, `(1 - alpha) previous + alpha observed` (Eq. 6).

    Args:
        previous: `[B, M]`, the forecast so far.
        observed: `[B, M]`, what the finished step showed.
        alpha: weight of the observation, in [0, 1].
        first: `[B]` bool, True where there is no forecast yet: the observation starts it.

    Returns:
        `[B, M]` fp32.
    """
    observed = observed.float()
    mixed = (1.0 - alpha) * previous.float() + alpha * observed
    return torch.where(first.to(observed.device)[:, None], observed, mixed)


def push(history: Tensor, observed: Tensor) -> Tensor:
    """Put `observed` `[B, M]` in front of `history` `[B, w, M]`; the oldest entry falls out."""
    return torch.cat([observed[:, None].to(history.dtype), history[:, :-1]], dim=1)


def uncensor(
    observed: Tensor,
    visible: Tensor,
    rule: Censored,
    *,
    remembered: Tensor | None = None,
    semantic: Tensor | None = None,
    fade: float = 0.8,
) -> Tensor:
    """Put something in the place of the zeros that cut tokens get in an action score.

    A cut token gets no attention, whatever it would have been worth; remembered as it is, the zero
    keeps the token out for as long as the memory lasts.

    Args:
        observed: `[B, M]`, the action score of a step.
        visible: `[B, M]` bool, tokens that the action queries could see.
        rule: "zero": leave the zeros; "carry": the remembered score; "decay": that times `fade`;
            "impute": `c * semantic`, with c per row so that over the visible tokens `c * semantic`
            and `observed` have the same sum: tokens are taken to lose as much from prefill to
            action as the visible ones do on average. A cut leaves its tokens' share of the softmax
            to the others; for "carry" and "decay" a row with cut tokens is therefore multiplied so
            that the visible ones have the sum that was remembered of them.
        remembered: `[B, M]`, what was remembered last, for "carry" and "decay".
        semantic: `[B, M]`, the prefill score of this step, for "impute".
        fade: factor of "decay", in [0, 1].

    Returns:
        `[B, M]` fp32; at visible tokens `observed`, or in proportion to it.

    Raises:
        ValueError: a rule without what it needs.
    """
    observed = observed.float()
    if rule == "zero":
        return observed
    source = semantic if rule == "impute" else remembered
    if source is None:
        what = "the prefill score" if rule == "impute" else "what was remembered"
        raise ValueError(f"censored={rule!r} needs {what} of each token; the method gives none.")
    source = source.float()
    seen = torch.where(visible, observed, 0.0).sum(dim=1, keepdim=True)
    expected = torch.where(visible, source, 0.0).sum(dim=1, keepdim=True)
    if rule == "impute":
        source = source * torch.where(expected > 0, seen / expected, 0.0)
    else:
        comparable = ~visible.all(dim=1, keepdim=True) & (seen > 0) & (expected > 0)
        observed = observed * torch.where(comparable, expected / seen, 1.0)
        source = source * fade if rule == "decay" else source
    return torch.where(visible, observed, source)


def discrepancy(forecast: Tensor, observed: Tensor, visible: Tensor) -> float:
    """How far the best tokens of a forecast are from the best of what was then observed.

    Only the n tokens that the action queries could see are compared, as nothing was observed of the
    others: 1 - |top q of `forecast` and of `observed`| / q, with q = ceil(n / 4). Unrelated scores
    give about 3/4.

    Args:
        forecast: `[M]`, the action score predicted for a step.
        observed: `[M]`, the action score of that step.
        visible: `[M]` bool.

    Returns:
        A number in [0, 1]; 0 where nothing was visible, or nothing was predicted of what was.

    Raises:
        ValueError: NaN among the scores of visible tokens.
    """
    seen = visible.to(observed.device)
    predicted, shown = forecast.to(observed.device)[seen], observed[seen]
    if not bool(predicted.count_nonzero()):
        return 0.0
    count = math.ceil(len(shown) / 4)
    both = torch.isin(top_k(predicted, count), top_k(shown, count))
    return 1.0 - int(both.sum()) / count
