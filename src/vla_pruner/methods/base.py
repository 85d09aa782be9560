"""What a pruning method is: the scores it asks for, and how it selects tokens by them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from vla_pruner.pruning.budget import Budget, check_keep
from vla_pruner.pruning.history import HistorySpec
from vla_pruner.pruning.options import require_choice, require_int

SemanticRows = Literal["all", "last"]
Positions = Literal["keep", "compact"]


@dataclass(frozen=True, kw_only=True)
class ScoreSpec:
    """One score `[B, m]` fp32 of the visual tokens, read in one layer of a prefill.

    Rows that are padding, or tokens that an earlier cut removed, never vote.

    Args:
        layer: the layer that is read: before the cut for "attention", at most the cut's own layer
            (the one about to run) for "logits".
        rows: query rows that vote: "all" of them, the "last" one, the "action" queries (the last
            row, where the prefill holds none), the instruction's ("text"), also with the weights of
            `Method.query_weights` ("weighted"), or the "visual" ones that are left.
        heads: how heads are joined in each row, before the mean over rows.
        kind: "attention", softmax probabilities; "logits", the scaled products of queries and keys
            of the layer's normed input, without rotary positions and without softmax.

    Raises:
        ValueError: an option outside these.
    """

    layer: int
    rows: Literal["all", "last", "text", "visual", "weighted", "action"] = "all"
    heads: Literal["mean", "max"] = "mean"
    kind: Literal["attention", "logits"] = "attention"

    def __post_init__(self) -> None:
        require_int("ScoreSpec.layer", self.layer, 0)
        rows = ("all", "last", "text", "visual", "weighted", "action")
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
        valid: `[B, m]` bool, False for the tokens of a missing camera, and for those that stay
            anyway (`Layout.read`): they are never chosen while another token is left.
        seeds: `[B]` int64, one number per row that names its episode and step, for methods that
            draw at random.
        scores: each score that `Method.scores(layer)` asks for, `[B, m]` fp32.
        hidden: `[B, m, D]`, the visual tokens as they reach this cut, for methods that look at them
            (`Method.sees_hidden`).
        tokens: `[B, m]` int64, their indices in 0..M-1, ascending.
        text: `[B, T, D]`, the instruction's embeddings as they enter layer 0, for methods that need
            it (`Method.needs`).
        text_valid: `[B, T]` bool, False where `text` holds padding.
        guides, guides_valid: `[B, G, D]` and `[B, G]`, hidden states at this cut of the instruction
            and of action queries in the prefill, for methods that need "text"; False: padding.
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
    guides: Tensor | None = None
    guides_valid: Tensor | None = None
    number: int = 0
    keep_count: int | None = None

    def within(self, span: slice) -> Evidence:
        """The same of some neighbouring tokens: those of one view."""
        size = len(range(*span.indices(self.features.shape[1])))
        return self.of(lambda tensor: tensor[:, span], (size,))

    def of(self, some: Callable[[Tensor], Tensor], views: tuple[int, ...]) -> Evidence:
        """The same of `some` tokens, which it takes out of a tensor `[B, m, ...]`."""
        names = ("forecast", "valid", "hidden", "tokens")
        whole: dict[str, Tensor | None] = {name: getattr(self, name) for name in names}
        parts: dict[str, Any] = {n: None if t is None else some(t) for n, t in whole.items()}
        scores = {name: some(score) for name, score in self.scores.items()}
        if (semantic := self.semantic) is not None:
            same = semantic is self.scores.get("semantic")
            parts["semantic"] = scores["semantic"] if same else some(semantic)
        return replace(self, features=some(self.features), views=views, scores=scores, **parts)

    def check(self, method: str, *needed: str) -> None:
        """Refuse what does not fit together, or lacks a score that is `needed` (ValueError)."""
        shape = self.features.shape[:2]
        if self.features.ndim != 3 or sum(self.views) != shape[1]:
            raise ValueError(
                f"features must be [B, M, D], and views {self.views} sum to {sum(self.views)} = M "
                f"visual tokens; got {tuple(self.features.shape)}."
            )
        for name in ("semantic", "forecast", "valid"):
            found = getattr(self, name)
            if found is None and name in needed:
                raise ValueError(f"method {method!r} needs the {name} score; got None.")
            if found is not None and found.shape != shape:
                raise ValueError(f"{name} must be [B, M] = {(*shape,)}; got {(*found.shape,)}.")


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

    def of_rows(self, rows: Tensor) -> Choice:
        """The same for other rows: row i decides as row `rows[i]` does."""
        merge = None if self.merge is None else self.merge.index_select(0, rows)
        return Choice(self.kept.index_select(0, rows), merge)


@dataclass(frozen=True, eq=False, kw_only=True)
class StepContext:
    """What is known of one episode when one of its steps starts.

    Args:
        step: steps before this one in the episode.
        since_full: pruned steps since the last one on all tokens, or since the episode began.
        motion: what the caller reported through `session.motion`, oldest first.
    """

    step: int
    since_full: int = 0
    motion: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Method:
    """A pruning method. One that cuts once and ranks tokens is a `OneCut`; this is for the others.

    A method defines `cuts`, `schedule` and `select`, and overrides what else it needs.

    Args:
        keep: a float in (0, 1] is the fraction of visual tokens that stay, an int their number.
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

    sees_hidden: ClassVar[bool] = False
    """Whether `select` looks at `Evidence.hidden`, which is gathered for those that do."""

    keep: float | int = 0.25
    budget: Literal["global", "view"] = "global"

    def __post_init__(self) -> None:
        kind = type(self)
        if kind.select is Method.select and kind.hooks is Method.hooks:
            raise TypeError(f"{kind.__name__} has to define `select`, or be a OneCut.")
        check_keep(self.keep)
        require_choice("budget", self.budget, ("global", "view"))

    # What the method asks for.

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
    def flow_interval(self) -> int:
        """An action expert runs its layers in every N-th flow step; 1: in all."""
        return 1

    def cuts(self, num_layers: int) -> tuple[int, ...]:
        """Layers before which tokens are cut, ascending; none, one or several.

        Raises:
            ValueError: a layer that the decoder does not have.
        """
        raise NotImplementedError(f"method {self.name!r} has to define `cuts`.")

    def skipped(self, num_layers: int) -> tuple[int, ...]:
        """Decoder layers that do not run at all: their output is their input. Never layer 0."""
        return ()

    def scores(self, cut: int) -> Mapping[str, ScoreSpec]:
        """Scores that the cut before layer `cut` needs, by name."""
        return {}

    def query_weights(self, visual: Tensor, text: Tensor, text_valid: Tensor) -> Tensor:
        """Weight of each row of the instruction, for scores with `rows="weighted"`.

        Args:
            visual: `[B, M, D]`, `text`: `[B, T, D]`, both as they enter layer 0.
            text_valid: `[B, T]` bool, False for padding, which does not vote whatever its weight.

        Returns:
            `[B, T]`, at least 0.
        """
        raise NotImplementedError(
            f'method {self.name!r} asks for rows="weighted"; define `query_weights`.'
        )

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

    def hooks(self, adapter: Any) -> Any:
        """Hooks of its own, for a method that does something else than cutting tokens.

        Args:
            adapter: a `vla_pruner.core.layout.Adapter`, bound to its model.

        Returns:
            An object with the interface of `vla_pruner.core.cut.Cut`; None: that class itself.
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
        raise NotImplementedError(f"method {self.name!r} has to define `select`.")

    def by_view(self, evidence: Evidence, choose: Callable[[Evidence, int], Tensor]) -> Tensor:
        """`choose(evidence, k)` of all tokens, or of each view by itself: `[B, k]`, ascending."""
        k = self.kept(evidence.views) if evidence.keep_count is None else evidence.keep_count
        parts = ((evidence, k),) if self.budget == "global" else self._parts(evidence, k)
        chosen, start = [], 0
        for part, k in parts:
            batch, size = part.features.shape[:2]
            everything = torch.arange(k, device=part.features.device).expand(batch, k)
            chosen.append(start + (everything if k in (0, size) else choose(part, k)))
            start += size
        return chosen[0] if len(chosen) == 1 else torch.cat(chosen, dim=1)

    def _parts(self, evidence: Evidence, k: int) -> Iterable[tuple[Evidence, int]]:
        """Each view, and what it keeps of k."""
        views, number = evidence.views, 0 if evidence.keep_count is None else evidence.number
        spans = pairwise((0, *accumulate(views)))
        parts = [evidence.within(slice(*span)) for span in spans]
        return zip(parts, self.split(views, k, number), strict=True)

    def _resolve(self, views: tuple[int, ...]) -> tuple[int, ...]:
        return Budget(self.keep, self.budget).resolve(views)


@dataclass(frozen=True, kw_only=True)
class OneCut(Method):
    """A method that cuts once and ranks tokens: it defines `choose`.

    Args:
        layer: K, the number of layers that still see every token; tokens are cut before layer K.
    """

    layer: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self).choose is OneCut.choose and type(self).select is OneCut.select:
            raise TypeError(f"{type(self).__name__} has to define `choose`, or `select`.")
        require_int("layer", self.layer, 1 if self.semantic_rows is not None else 0)

    @property
    def semantic_rows(self) -> SemanticRows | None:
        """Which prefill queries vote on visual tokens: "all", the "last" one, or None: no score."""
        return None

    def semantic_layer(self, cut: int) -> int:
        """Index of the layer whose attention gives the semantic score for the cut before `cut`."""
        return cut - 1

    def scores(self, cut: int) -> Mapping[str, ScoreSpec]:
        """`{"semantic": ...}` of `semantic_rows` and `semantic_layer`, or nothing."""
        if self.semantic_rows is None:
            return {}
        return {"semantic": ScoreSpec(layer=self.semantic_layer(cut), rows=self.semantic_rows)}

    def cuts(self, num_layers: int) -> tuple[int, ...]:
        """`(layer,)`."""
        if self.layer >= num_layers:
            raise ValueError(
                f"`layer={self.layer}` cuts nothing: the decoder has {num_layers} layers; "
                f"use at most {num_layers - 1}."
            )
        return (self.layer,)

    def choose(self, evidence: Evidence, k: int) -> Tensor:
        """Choose k of n tokens: those of one view, or of all views under a global budget.

        Args:
            evidence: of these n tokens.
            k: tokens to keep, 1 <= k < n.

        Returns:
            `[B, k]` int64, ascending.
        """
        raise NotImplementedError(f"method {self.name!r} chooses by `select`, not by `choose`.")

    def select(self, evidence: Evidence) -> Tensor | Choice:
        """What `choose` says of all tokens, or of each view."""
        evidence.check(self.name)
        if evidence.semantic is None or evidence.forecast is None:
            self._refuse_missing(evidence)
        return self.by_view(evidence, self.choose)

    def _refuse_missing(self, evidence: Evidence) -> None:
        semantic = ("semantic",) if self.semantic_rows is not None else ()
        forecast = ("forecast",) if self.history is not None else ()
        evidence.check(self.name, *semantic, *forecast)
