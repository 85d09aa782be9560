"""What a pruning method is: which judgements it asks for, from which layer, and how it chooses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from vla_pruner.methods.recall import Recall, Reuse
from vla_pruner.pruning.budget import Budget, check_keep
from vla_pruner.pruning.history import Censored, decaying_window, ema_update, push, uncensor

SemanticRows = Literal["all", "last"]
Positions = Literal["keep", "compact"]


@dataclass(frozen=True, kw_only=True)
class ScoreSpec:
    """One score `[B, m]` fp32 of the visual tokens, read in one layer of a prefill.

    Rows that are padding, or tokens that an earlier cut removed, never vote.

    Args:
        layer: the layer that is read: before the cut for "attention", at most the cut's own layer
            (the one about to run) for "logits".
        rows: query rows that vote: "all" of them, the "last" one, the instruction's ("text"), the
            "visual" ones that are left, or the instruction's as `Method.voters` weighs them.
        heads: how heads are joined in each row, before the mean over rows.
        kind: "attention", softmax probabilities; "logits", the scaled products of queries and keys
            of the layer's normed input, without rotary positions and without softmax.

    Raises:
        ValueError: an option outside these.
    """

    layer: int
    rows: Literal["all", "last", "text", "visual", "voters"] = "all"
    heads: Literal["mean", "max"] = "mean"
    kind: Literal["attention", "logits"] = "attention"

    def __post_init__(self) -> None:
        require_int("ScoreSpec.layer", self.layer, 0)
        rows = ("all", "last", "text", "visual", "voters")
        require_choice("ScoreSpec.rows", self.rows, rows)
        require_choice("ScoreSpec.heads", self.heads, ("mean", "max"))
        require_choice("ScoreSpec.kind", self.kind, ("attention", "logits"))


@dataclass(frozen=True)
class Evidence:
    """What a method may look at when tokens are cut.

    Tensors with one entry per token cover the m visual tokens that are left at this cut: all M of
    them at the first.

    Args:
        features: `[B, m, D]`, projected visual embeddings as they enter layer 0.
        semantic: `[B, m]` fp32, short for `scores["semantic"]`; None: the method asks for none.
        forecast: `[B, m]` fp32, the action score predicted from the episode's history.
        views: tokens left of each camera; they sum to m. After the first cut of a global budget
            cameras are no longer told apart: `(m,)`.
        layer: index of the layer about to run.
        valid: `[B, m]` bool, False for the tokens of a missing camera: they are never chosen while
            a real token is left.
        seeds: `[B]` int64, one number per row that names its episode and step, for methods that
            draw lots.
        scores: each score that `Method.scores(layer)` asks for, `[B, m]` fp32.
        hidden: `[B, m, D]`, the visual tokens as they reach this cut.
        tokens: `[B, m]` int64, their indices in 0..M-1, ascending.
        text: `[B, T, D]`, the instruction's embeddings as they enter layer 0, where the layout says
            which rows they are.
        text_valid: `[B, T]` bool, False where `text` holds padding.
        number: number of this cut, from 0.
        keep_count: tokens to leave: `Method.schedule(...)[number]`; None: `Method.kept(views)`.
    """

    features: Tensor
    semantic: Tensor | None
    forecast: Tensor | None
    views: tuple[int, ...]
    layer: int
    valid: Tensor | None = None
    seeds: Tensor | None = None
    scores: Mapping[str, Tensor] = field(default_factory=dict)
    hidden: Tensor | None = None
    tokens: Tensor | None = None
    text: Tensor | None = None
    text_valid: Tensor | None = None
    number: int = 0
    keep_count: int | None = None


@dataclass(frozen=True, eq=False)
class Choice:
    """What a method decides at a cut.

    Args:
        kept: `[B, k]` int64, ascending, in 0..m-1; k = 0 is allowed.
        merge: `[B, k, m]`, new hidden states of the kept tokens as weighted sums of those of all m
            (rows that sum to 1 make them means); None: they stay as they are. A merged token takes
            the place and the position of the kept one.
    """

    kept: Tensor
    merge: Tensor | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class StepContext:
    """What is known of one episode when one of its steps starts. M visual tokens.

    Args:
        step: steps before this one in the episode.
        since_full: pruned steps since the last one on all tokens, or since the episode began.
        motion: what the caller reported through `session.motion`, oldest first.
        forecast: `[M]` action score that was predicted for the last step; None: nothing was.
        observed: `[M]` what its action queries showed; None at the first step.
        kept: `[M]` bool, visual tokens that the later layers of the last step saw.
        change: `[M]` 1 - cosine between this and the last step's projected visual embeddings; None
            at the first step, or unless `Method.wants_change`.
    """

    step: int
    since_full: int = 0
    motion: tuple[float, ...] = ()
    forecast: Tensor | None = None
    observed: Tensor | None = None
    kept: Tensor | None = None
    change: Tensor | None = None


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
        censored: what is remembered of tokens that no action query could see, as they had been cut:
            "zero" (the paper), "carry": what was remembered before, "decay": that times `fade`,
            "impute": an estimate from this step's prefill score (see `pruning.history.uncensor`).
        fade: factor of "decay" per step, in [0, 1].
        adapt: how much visual change shortens a window, at least 0. With c the mean over the visual
            tokens of 1 - cosine between this and the last step's projected embeddings, the i-th
            newest observation weighs `gamma ** i * exp(-adapt * c * (i - 1))`. Needs
            `Method.wants_change`.

    Raises:
        ValueError: an option outside these ranges, or `adapt` with a moving average.
    """

    kind: Literal["window", "ema"] = "window"
    window: int = 3
    gamma: float = 0.8
    alpha: float = 0.5
    newest_heaviest: bool = True
    layers: Literal["latter-half", "middle"] | tuple[int, ...] = "latter-half"
    censored: Censored = "zero"
    fade: float = 0.8
    adapt: float = 0.0

    def __post_init__(self) -> None:
        require_choice("history", self.kind, ("window", "ema"))
        require_choice("censored", self.censored, ("zero", "carry", "decay", "impute"))
        require_int("window", self.window, 1)
        if not 0.0 <= self.fade <= 1.0:
            raise ValueError(f"`fade={self.fade}` must lie in [0, 1].")
        if not 0.0 <= self.adapt < math.inf:
            raise ValueError(f"`adapt={self.adapt}` must be a finite number of at least 0.")
        if self.adapt and self.kind != "window":
            raise ValueError(
                f"`adapt={self.adapt}` shortens a window, and a moving average has none; use "
                'smoothing="window", or adapt=0.'
            )
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
        self,
        history: Tensor,
        count: Tensor,
        observed: Tensor,
        kept: Tensor | None = None,
        semantic: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Remember the action score of a finished step.

        Args:
            history: `[B, slots, M]`.
            count: `[B]` int64, observations so far in each row's episode.
            observed: `[B, M]`.
            kept: `[B, M]` bool, tokens that all observed layers could see; None: all tokens.
            semantic: `[B, M]` prefill score of the step, for `censored="impute"`.

        Returns:
            The new `history` and `count` (count is not capped at `slots`).

        Raises:
            ValueError: `censored="impute"` without a prefill score.
        """
        cut = None if kept is None or self.censored == "zero" else ~kept.to(history.device)
        if cut is not None:
            started = (count > 0).to(history.device)[:, None]
            observed = uncensor(
                observed,
                ~cut,
                self.censored,
                remembered=torch.where(started, history[:, 0], 0.0),
                semantic=semantic,
                fade=self.fade,
            )
        if self.kind == "window":
            return push(history, observed), count + 1
        forecast = ema_update(history[:, 0], observed, self.alpha, first=count == 0)
        if cut is not None and self.censored in ("carry", "decay"):
            forecast = torch.where(cut, observed, forecast)
        return forecast[:, None].to(history.dtype), count + 1

    def forecast(self, history: Tensor, count: Tensor, change: Tensor | None = None) -> Tensor:
        """Action score expected at the next step.

        Args:
            history: `[B, slots, M]`.
            count: `[B]` int64, observations so far in each row's episode.
            change: `[B]`, mean visual change since the last step, for `adapt`; None: none.

        Returns:
            `[B, M]` fp32; 0 before the first observation.
        """
        if self.kind == "ema":
            started = (count > 0).to(history.device)[:, None]
            return torch.where(started, history[:, 0].float(), 0.0)
        return decaying_window(
            history,
            count,
            gamma=self.gamma,
            newest_heaviest=self.newest_heaviest,
            haste=None if change is None or not self.adapt else self.adapt * change,
        )


@dataclass(frozen=True, kw_only=True)
class Method:
    """A pruning method: a few options, and `choose`.

    One that cuts once and ranks tokens overrides `choose`, and `semantic_rows` if it needs a score.
    Everything else has a default; a method overrides what it needs of `scores`, `schedule`,
    `select` and the rest.

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

    adaptive: ClassVar[bool] = False
    """Whether `select` may leave other numbers of tokens than `schedule` says; the rows of a batch
    share the largest. Such a method cannot be compiled."""

    keep: float | int = 0.25
    layer: int = 3
    budget: Literal["global", "view"] = "global"

    def __post_init__(self) -> None:
        if all(getattr(type(self), n) is getattr(Method, n) for n in ("choose", "select", "reuse")):
            raise TypeError(f"{type(self).__name__} has to define `choose`, `select` or `reuse`.")
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

    @property
    def positions(self) -> Positions:
        """Rotary positions of survivors: their own ("keep"), or renumbered without gaps behind each
        cut, where decoding then continues at the short length ("compact")."""
        return "keep"

    @property
    def needs(self) -> tuple[str, ...]:
        """What a model or its caller must give: "text" (which rows hold the instruction), "motion"
        (`session.motion`), "frame" (camera images, from the model or `session.frame`). A model that
        cannot is refused."""
        return ()

    @property
    def wants_change(self) -> bool:
        """Whether `StepContext.change` is computed, for which a step's embeddings are kept."""
        return False

    def semantic_layer(self, cut: int) -> int:
        """Index of the layer whose attention gives the semantic score for the cut before `cut`."""
        return cut - 1

    def scores(self, cut: int) -> Mapping[str, ScoreSpec]:
        """Scores that the cut before layer `cut` needs, by name.

        The default is `{"semantic": ...}` of `semantic_rows` and `semantic_layer`, or nothing.
        """
        if self.semantic_rows is None:
            return {}
        return {"semantic": ScoreSpec(layer=self.semantic_layer(cut), rows=self.semantic_rows)}

    def voters(self, visual: Tensor, text: Tensor, text_valid: Tensor) -> Tensor:
        """Weight of each row of the instruction, for scores with `rows="voters"`.

        Args:
            visual: `[B, M, D]`, `text`: `[B, T, D]`, both as they enter layer 0.
            text_valid: `[B, T]` bool, False for padding, which does not vote whatever its weight.

        Returns:
            `[B, T]`, at least 0.

        Raises:
            NotImplementedError: the method asks for voters and does not say who they are.
        """
        raise NotImplementedError(f'method {self.name!r} asks for rows="voters"; define `voters`.')

    @property
    def flow_interval(self) -> int:
        """An action expert runs its layers in every N-th flow step; 1: in all."""
        return 1

    def skipped(self, num_layers: int) -> tuple[int, ...]:
        """Decoder layers that do not run at all: their output is their input. Never layer 0."""
        return ()

    def full_step(self, context: StepContext) -> bool:
        """Whether this step of an episode runs on all tokens; default: the first `warmup` do."""
        return context.step < self.warmup

    def check(self, config: Any, num_layers: int) -> None:
        """Refuse a model that the method was not made for, when it is attached.

        Args:
            config: `decoder.config`, or None.
            num_layers: layers of the decoder.

        Raises:
            ValueError: the method does not fit, and what to do.
        """

    def cuts(self, num_layers: int) -> tuple[int, ...]:
        """Layers before which tokens are cut, ascending; none, one or several.

        Raises:
            ValueError: a layer that the decoder does not have.
        """
        if self.layer >= num_layers:
            raise ValueError(
                f"`layer={self.layer}` cuts nothing: the decoder has {num_layers} layers; "
                f"use at most {num_layers - 1}."
            )
        return (self.layer,)

    def recalled_layer(self, num_layers: int) -> int | None:
        """For methods that define `reuse`: the layer whose text attention the next step recalls.

        None, the default: tokens that are cut are gone for all later layers. With a layer, they
        leave the hidden states alone: their keys and values of the episode's last step stay visible
        to all. `reuse` then decides instead of `select`, and an episode's first step is full.
        """
        return None

    # What it decides.

    def kept(self, views: tuple[int, ...]) -> int:
        """Visual tokens that stay in all; depends on the shape of the input alone.

        Args:
            views: visual tokens of each camera.

        Raises:
            ValueError: a `keep` larger than the number of visual tokens.
        """
        return sum(self._resolve(views))

    def schedule(self, views: tuple[int, ...], num_layers: int) -> tuple[int, ...]:
        """Visual tokens left after each cut of `cuts(num_layers)`; from shapes alone.

        Args:
            views: visual tokens of each camera.
            num_layers: layers of the decoder.

        Raises:
            ValueError: a budget that does not fit these cameras.
        """
        return (self.kept(views),)

    def split(self, views: tuple[int, ...], k: int, number: int = 0) -> tuple[int, ...]:
        """How k tokens are shared among cameras at cut `number`: `(k,)` under a global budget.

        At the first cut each camera gets its own budget, if that makes k in all; otherwise shares
        are in proportion to `views`, and what is left over goes to the largest remainders.
        """
        if self.budget == "global":
            return (k,)
        if number == 0 and k == sum(own := self._resolve(views)):
            return own
        total = sum(views)
        shares = [k * size // total for size in views] if total else [0] * len(views)
        by_rest = sorted(range(len(views)), key=lambda v: (-(k * views[v] % max(total, 1)), v))
        for view in by_rest[: k - sum(shares)]:
            shares[view] += 1
        return tuple(shares)

    def select(self, evidence: Evidence) -> Tensor | Choice:
        """Visual tokens that stay, of those that are left at this cut.

        Returns:
            `[B, k]` int64, ascending, in 0..m-1, with k = `evidence.keep_count` (or
            `self.kept(evidence.views)`); or a `Choice` that also merges tokens.

        Raises:
            ValueError: evidence whose shapes do not fit, or that lacks what the method asks for.
        """
        self._check(evidence)
        if evidence.keep_count is None:
            budgets = self._resolve(evidence.views)
        else:
            budgets = self.split(evidence.views, evidence.keep_count, evidence.number)
        spans = (sum(evidence.views),) if self.budget == "global" else evidence.views
        chosen, start = [], 0
        for size, k in zip(spans, budgets, strict=True):
            view = slice(start, start + size)
            chosen.append(start + self._choose_within(evidence, view, size, k))
            start += size
        return chosen[0] if len(chosen) == 1 else torch.cat(chosen, dim=1)

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

        `select` calls it; a method that overrides `select` need not define it.

        Args:
            features: `[B, n, D]`.
            semantic, forecast: `[B, n]` fp32; None where the method does not ask for them.
            k: tokens to keep, 1 <= k < n.
            valid: `[B, n]` bool, False for tokens that are candidates of nothing.
            seeds: `[B]` int64, see `Evidence`.

        Returns:
            `[B, k]` int64, ascending.
        """
        raise NotImplementedError(f"method {self.name!r} chooses by `select`, not by `choose`.")

    def reuse(self, recall: Recall) -> Reuse:
        """Tokens whose keys and values of the last step are used again; see `recalled_layer`."""
        raise NotImplementedError(f"method {self.name!r} reuses nothing.")

    def _choose_within(self, evidence: Evidence, view: slice, size: int, k: int) -> Tensor:
        features = evidence.features[:, view]
        if k == size or k == 0:
            all_or_none = torch.arange(k, device=features.device)
            return all_or_none.expand(features.shape[0], k)
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
