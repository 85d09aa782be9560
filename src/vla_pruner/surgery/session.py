"""A session: one model with a pruning method attached, and what it remembers of each episode."""

from __future__ import annotations

import inspect
import weakref
import zlib
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from vla_pruner.methods.base import Method
from vla_pruner.pruning.selection import top_k
from vla_pruner.surgery.cut import Cut, Mode, Prompt
from vla_pruner.surgery.layout import Adapter, Layout

_attached: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@dataclass(eq=False)
class Episode:
    """What is remembered of one episode."""

    memory: Tensor | None = None
    """[slots, M] action scores, newest first."""
    observations: int = 0
    steps: int = 0
    """Steps that have started."""
    step: Step | None = None
    """The step in progress, whose action score is not complete yet."""


@dataclass(eq=False)
class Step:
    """One policy step of a batch: a prefill and all decoder passes that follow it."""

    ids: tuple[Hashable, ...]
    numbers: tuple[int, ...]
    warming: tuple[bool, ...]
    prompt: Prompt
    action_layers: int
    total: Tensor | None = None
    """[B, M] sum over watched layers and action rows."""
    rows: int = 0

    def add(self, observed: Tensor, rows: int) -> None:
        """Count a pass in: `observed` [B, M] is a mean over `rows` action rows."""
        part = observed * rows
        self.total = part if self.total is None else self.total + part
        self.rows += rows

    def action(self) -> Tensor | None:
        """Action score [B, M] of the passes so far (Eq. 3-4); None if no action row ran."""
        if self.total is None:
            return None
        return self.total / (self.rows * self.action_layers)


@dataclass(frozen=True, eq=False)
class StepReport:
    """What the last step did. B rows, M visual tokens, S tokens in the prefill.

    Args:
        episodes: episode of each row.
        steps: how many steps of its episode each row had run before.
        views: visual tokens of each camera.
        warm_up: `[B]` bool, rows that ran on all tokens because their episode has just started.
        kept_mask: `[B, M]` bool, visual tokens that layers >= K saw.
        kept: for each row, for each camera: indices of the kept tokens within that camera's.
        semantic: `[B, M]` fp32 prefill score, None if the method asks for none.
        forecast: `[B, M]` fp32 action score that was predicted, None if the method predicts none.
        action: `[B, M]` fp32 action score observed so far in this step (0 at tokens that were
            dropped), None if the method watches none.
        tokens_full, tokens_kept: S, and the tokens that layers >= K computed.
        visual_full, visual_kept: M, and the visual tokens among `tokens_kept`.
        per_view: whether every camera had its own budget.
        visual_valid: `[B, M]` bool, False for the tokens of missing cameras; None: none is missing.
    """

    episodes: tuple[Hashable, ...]
    steps: tuple[int, ...]
    views: tuple[int, ...]
    warm_up: Tensor
    kept_mask: Tensor
    kept: tuple[tuple[Tensor, ...], ...]
    semantic: Tensor | None
    forecast: Tensor | None
    action: Tensor | None
    tokens_full: int
    tokens_kept: int
    visual_full: int
    visual_kept: int
    per_view: bool
    visual_valid: Tensor | None = None

    @property
    def kept_indices(self) -> Tensor:
        """`[B, k]` int64 kept visual tokens in 0..M-1, ascending.

        Raises:
            ValueError: rows keep different numbers of tokens (some of them are warming up).
        """
        counts = self.kept_mask.sum(dim=1)
        if not bool((counts == counts[0]).all()):
            raise ValueError(
                f"rows keep {counts.tolist()} tokens, as some episodes are warming up; "
                "use `kept` or `kept_mask`."
            )
        return self.kept_mask.nonzero()[:, 1].view(len(self.kept_mask), -1)

    def reasons(self) -> list[list[str]]:
        """Why each kept token stayed, row by row, in the order of the kept indices.

        "semantic" or "action": among the k best of that score; "both"; "warm-up": everything
        stayed; "other": neither score says so (random choice, no pruning).
        """
        semantic = self._best(self.semantic)
        action = self._best(self.forecast)
        names = (("other", "action"), ("semantic", "both"))
        result = []
        for row, kept in enumerate(self.kept_mask):
            indices = kept.nonzero()[:, 0].tolist()
            if bool(self.warm_up[row]):
                result.append(["warm-up"] * len(indices))
            else:
                result.append([names[semantic[row][i]][action[row][i]] for i in indices])
        return result

    def _best(self, score: Tensor | None) -> list[list[bool]]:
        """Whether each token is among the k best, k being what its row (or camera) kept."""
        best = torch.zeros_like(self.kept_mask)
        if score is not None:
            if self.visual_valid is not None:
                score = score.masked_fill(~self.visual_valid, float("-inf"))
            for row, kept in enumerate(self.kept_mask):
                start = 0
                for size in self.views if self.per_view else (self.visual_full,):
                    span = slice(start, start + size)
                    best[row, start + top_k(score[row, span], int(kept[span].sum()))] = True
                    start += size
        return best.tolist()


class Session:
    """A pruning method attached to a model; made by `vp.prune`, used as a context manager or not.

    Every call of the model is a step of an episode. An episode lasts until `reset`. In a batch,
    row i belongs to episode i unless `episodes` says otherwise.
    """

    def __init__(
        self, model: nn.Module, method: Method, adapter: Adapter, *, mode: Literal["drop", "mask"]
    ) -> None:
        """Attach at once.

        Args:
            model: the model whose calls are pruned.
            method: what to keep.
            adapter: where things are in `model`.
            mode: "drop" removes tokens, "mask" keeps them and hides them (slow, for comparison).

        Raises:
            RuntimeError: another session is attached to this model.
            ValueError, NotImplementedError, TypeError: method and model do not fit together.
        """
        if mode not in ("drop", "mask"):
            raise ValueError(f'`mode={mode!r}` is unknown; use "drop" or "mask".')
        adapter.bind(model)
        self.decoder = adapter.decoder
        if self.decoder in _attached:
            raise RuntimeError(
                "this model already has a pruning session; call `session.remove()` on it, or leave "
                "its `with` block, before attaching another."
            )
        self.model = model
        self.method = method
        self.adapter = adapter
        self.mode: Literal["drop", "mask"] = mode
        self._cut = Cut(adapter, method)
        self._episodes: dict[Hashable, Episode] = {}
        self._ids: tuple[Hashable, ...] | None = None
        self._copies = 1
        self._latest: Step | None = None
        self._open: Step | None = None
        self._in_step = False
        self._running: Step | None = None
        self._queries = 0
        self._compiled = False
        self._by_cache: weakref.WeakKeyDictionary[Any, Step | None] = weakref.WeakKeyDictionary()
        self._derived: tuple[Layout, int, int, Tensor, Tensor | None] | None = None

        self._undo = ExitStack()
        with self._undo:
            self._undo.callback(_attached.discard, self.decoder)
            _attached.add(self.decoder)
            adapter.attach(self._undo)
            self._cut.attach(self._undo)
            self._undo.callback(
                self.decoder.register_forward_pre_hook(self._before, with_kwargs=True).remove
            )
            self._undo.callback(
                self.decoder.register_forward_hook(self._after, with_kwargs=True).remove
            )
            self._group_generated_rows()
            self._undo = self._undo.pop_all()

    # ------------------------------------------------------------------ for callers
    def reset(self, episodes: Iterable[Hashable] | None = None) -> None:
        """Start new episodes: forget what was seen in these (ids), or in all of them."""
        if episodes is None:
            self._episodes.clear()
        else:
            for name in episodes:
                self._episodes.pop(name, None)

    def episodes(self, ids: Sequence[Hashable] | None) -> None:
        """Say which episode each row of the next calls belongs to; None: row i is episode i.

        Rows with the same id (beams) are one episode and keep the same tokens.
        """
        self._ids = None if ids is None else tuple(ids)

    @contextmanager
    def step(self) -> Iterator[None]:
        """All prefills inside belong to one policy step: the first decides, the others follow."""
        if self._in_step:
            yield
            return
        self._in_step = True
        try:
            yield
        finally:
            self._in_step, self._open = False, None

    @property
    def last(self) -> StepReport | None:
        """What the last step did; None before the first."""
        return None if self._latest is None else self._report(self._latest)

    def compile(self, **options: Any) -> None:
        """Run the decoder through `torch.compile(fullgraph=True, **options)` until `remove`.

        Only the decoder's forward is compiled; deciding what a pass is stays outside.

        Raises:
            RuntimeError: the session is no longer attached.
        """
        if self.decoder not in _attached:
            raise RuntimeError("the session was removed; make a new one with `vp.prune`.")
        compiled = torch.compile(self.decoder.forward, **{"fullgraph": True, **options})
        self._set_attribute(self.decoder, "forward", compiled)
        self._compiled = True

    def remove(self) -> None:
        """Detach: the model is what it was before. Does nothing the second time."""
        self._undo.close()
        self._by_cache.clear()
        self._cut.prompt = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = "attached" if self.decoder in _attached else "removed"
        return f"Session({self.method!r}, {self.adapter.describe()}, {state})"

    # ------------------------------------------------------------------ around each decoder pass
    def _before(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Decide what this pass is, and hand the cut what it needs."""
        if args:
            bound = inspect.signature(decoder.forward).bind_partial(*args, **kwargs)
            kwargs = dict(bound.arguments)
        inputs = kwargs.get("inputs_embeds")
        if inputs is None:
            inputs = kwargs["input_ids"]
        cache = kwargs.get("past_key_values")
        cut, batch, length = self._cut, inputs.shape[0], inputs.shape[1]
        cut.static_cache = bool(getattr(cache, "is_compileable", False))
        if length > 1 and _is_empty(cache):
            cut.phase = "prefill"
            layout = self.adapter.layout(inputs, kwargs)
            step = None if layout is None else self._start(layout, batch, length)
            if cache is not None:
                self._remember(cache, step)
        else:
            cut.phase = "decode"
            step = self._find(cache)
            if step is not None and len(step.ids) != batch:
                raise ValueError(
                    f"this cache was filled by {len(step.ids)} rows and is continued with {batch}; "
                    "batches cannot change between prefill and decode while pruning."
                )
        if (
            step is not None
            and decoder.training
            and getattr(decoder, "gradient_checkpointing", False)
        ):
            raise NotImplementedError(
                "gradient checkpointing runs layers twice, which pruning does not follow; call "
                "`model.gradient_checkpointing_disable()` or `model.eval()`."
            )
        self._running, self._queries = step, length
        cut.prompt = None if step is None else step.prompt

    def _after(
        self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Note what the pass saw."""
        step, cut = self._running, self._cut
        self._running, cut.prompt = None, None
        if step is None:
            return
        prompt = step.prompt
        if cut.phase == "prefill" and kwargs.get("past_key_values") is None:
            self._remember(getattr(output, "past_key_values", None), step)
        if prompt.observed is not None:
            rows = 1
            if cut.phase == "prefill" and prompt.layout.action_rows is not None:
                rows = len(range(*prompt.layout.action_rows.indices(prompt.length)))
            elif cut.phase == "decode":
                rows = self._queries
            step.add(prompt.observed, rows)
        if self._compiled and cut.phase == "prefill":
            prompt.own()
        prompt.observed, prompt.features, prompt.overrides = None, None, {}

    # ------------------------------------------------------------------ steps
    def _start(self, layout: Layout, batch: int, length: int) -> Step:
        """A prefill begins: finish the step before, and find out who prunes."""
        others, last_row = self._derive(layout, batch, length)
        previous = self._open if self._in_step else None
        if previous is not None and len(previous.ids) == batch:
            first = previous.prompt
            previous.prompt = Prompt(
                layout,
                length,
                first.mode,
                others,
                last_row,
                forecast=first.forecast,
                warming=first.warming,
                given=first.kept,
                semantic=first.semantic,
            )
            return previous

        self.method.kept(layout.views)  # Raises if the budget does not fit these cameras.
        ids = self._row_ids(batch)
        unique = list(dict.fromkeys(ids))
        for name in unique:
            self._finish(self._episodes.setdefault(name, Episode()), name)
        numbers = tuple(self._episodes[name].steps for name in ids)
        warming = tuple(number < self.method.warmup for number in numbers)
        mode: Mode = self.mode
        if self._cut.at is None or all(warming):
            mode = "full"
        elif any(warming):
            mode = "mask"
        prompt = Prompt(layout, length, mode, others, last_row)
        device = layout.visual.device
        prompt.forecast = self._forecast(ids, layout.visual.shape[1], device)
        if mode != "full":
            seeds = [_seed(name, number) for name, number in zip(ids, numbers, strict=True)]
            prompt.seeds = torch.tensor(seeds, device=device)
        if mode == "mask" and any(warming):
            prompt.warming = torch.tensor(warming, device=device)
        if len(unique) < batch:
            prompt.leader = torch.tensor([ids.index(name) for name in ids], device=device)
        step = Step(ids, numbers, warming, prompt, len(self._cut.action_layers))
        for name in unique:
            episode = self._episodes[name]
            episode.step = step
            episode.steps += 1
        self._latest = step
        self._open = step if self._in_step else None
        return step

    def _finish(self, episode: Episode, name: Hashable) -> None:
        """Remember the action score of the episode's step in progress, which is over now."""
        step, spec = episode.step, self.method.history
        episode.step = None
        if step is None or spec is None:
            return
        action = step.action()
        if action is None:
            return
        rows = [row for row, other in enumerate(step.ids) if other == name]
        if len(rows) == 1:
            observed = action[rows[0] : rows[0] + 1]
        else:
            observed = action[rows].mean(dim=0, keepdim=True)
        if episode.memory is None:
            episode.memory = observed.new_zeros(spec.slots, observed.shape[1])
        if episode.memory.shape[1] != observed.shape[1]:
            raise ValueError(
                f"episode {name!r} had {episode.memory.shape[1]} visual tokens and now has "
                f"{observed.shape[1]}; call `session.reset()` when the cameras change."
            )
        count = torch.tensor([episode.observations], device=observed.device)
        memory, _ = spec.update(episode.memory[None], count, observed)
        episode.memory = memory[0]
        episode.observations += 1

    def _forecast(
        self, ids: Sequence[Hashable], visual: int, device: torch.device
    ) -> Tensor | None:
        """[B, M] action score that each row's episode predicts."""
        spec = self.method.history
        if spec is None:
            return None
        blank = torch.zeros(spec.slots, visual, device=device)
        memory, counts = [], []
        for name in ids:
            episode = self._episodes[name]
            known = blank if episode.memory is None else episode.memory
            if known.shape[1] != visual:
                raise ValueError(
                    f"episode {name!r} had {known.shape[1]} visual tokens and now has {visual}; "
                    "call `session.reset()` when the cameras change."
                )
            memory.append(known)
            counts.append(episode.observations)
        return spec.forecast(torch.stack(memory), torch.tensor(counts, device=device))

    def _row_ids(self, batch: int) -> tuple[Hashable, ...]:
        ids = self._ids
        if ids is None:
            return tuple(row // self._copies for row in range(batch))
        ids = tuple(name for name in ids for _ in range(self._copies))
        if len(ids) != batch:
            raise ValueError(
                f"`session.episodes` named {len(ids)} rows, but this batch has {batch}."
            )
        return ids

    def _derive(self, layout: Layout, batch: int, length: int) -> tuple[Tensor, Tensor | None]:
        """What follows from a layout: positions that are not visual, and each last real row."""
        known = self._derived
        if known is not None and known[0] is layout and known[1:3] == (batch, length):
            return known[3], known[4]
        visual = layout.visual
        if visual.ndim != 2 or visual.shape[0] not in (1, batch):
            raise ValueError(
                f"Layout.visual must be [B, M] with B={batch} (or 1); got {tuple(visual.shape)}."
            )
        if sum(layout.views) != visual.shape[1]:
            raise ValueError(
                f"Layout.views {layout.views} must sum to the {visual.shape[1]} visual tokens."
            )
        rows, remaining = visual.shape[0], length - visual.shape[1]
        place = torch.arange(length, device=visual.device).expand(rows, -1)
        is_visual = torch.zeros(rows, length, dtype=torch.bool, device=visual.device)
        is_visual = is_visual.scatter(1, visual, True)
        others = torch.where(is_visual, place + length, place).sort(dim=1).values[:, :remaining]
        last_row = None
        if layout.valid_rows is not None:
            newest_first = layout.valid_rows.flip(1).to(torch.int8)
            last_row = length - 1 - newest_first.argmax(dim=1, keepdim=True)
        self._derived = (layout, batch, length, others, last_row)
        return others, last_row

    # ------------------------------------------------------------------ caches
    def _remember(self, cache: Any, step: Step | None) -> None:
        if cache is not None and not isinstance(cache, tuple):
            self._by_cache[cache] = step

    def _find(self, cache: Any) -> Step | None:
        """The step whose prefill filled a cache; a copy of the latest cache counts as that one."""
        if cache is None:
            return None
        if not isinstance(cache, tuple) and cache in self._by_cache:
            return self._by_cache[cache]
        step, at = self._latest, self._cut.at
        if step is None or at is None or isinstance(cache, tuple):
            return None
        positions = step.prompt.positions
        removed = 0 if positions is None else step.prompt.length - positions.shape[1]
        seen, behind = int(cache.get_seq_length(0)), int(cache.get_seq_length(at))
        matches = seen >= step.prompt.length and seen - behind == removed
        return step if matches else None

    # ------------------------------------------------------------------ the rest
    def _group_generated_rows(self) -> None:
        """Let `model.generate` tell how many rows (beams, samples) it makes of each input row."""
        generate = getattr(self.model, "generate", None)
        if not inspect.ismethod(generate):
            return

        def counted(*args: Any, **kwargs: Any) -> Any:
            for name in ("assistant_model", "prompt_lookup_num_tokens"):
                if kwargs.get(name) is not None:
                    raise NotImplementedError(
                        f"`{name}`: guessing tokens ahead takes some back from the cache, which "
                        "pruning does not follow; generate without it."
                    )
            settings = kwargs.get("generation_config") or getattr(
                self.model, "generation_config", None
            )
            before = self._copies
            self._copies = max(
                kwargs.get(name) or getattr(settings, name, None) or 1
                for name in ("num_beams", "num_return_sequences")
            )
            try:
                with self.step():
                    return generate(*args, **kwargs)
            finally:
                self._copies = before

        self._set_attribute(self.model, "generate", counted)

    def _set_attribute(self, module: nn.Module, name: str, value: Any) -> None:
        """Set an instance attribute until `remove`."""
        if name in vars(module):
            self._undo.callback(setattr, module, name, vars(module)[name])
        else:
            self._undo.callback(delattr, module, name)
        setattr(module, name, value)

    def _report(self, step: Step) -> StepReport:
        prompt, views = step.prompt, step.prompt.layout.views
        batch, visual = len(step.ids), sum(views)
        device = prompt.layout.visual.device
        mask = torch.ones(batch, visual, dtype=torch.bool, device=device)
        warm_up = torch.tensor(step.warming, device=device)
        if prompt.kept is not None:
            mask = torch.zeros_like(mask).scatter(1, prompt.kept, True) | warm_up[:, None]
        kept = tuple(tuple(view.nonzero()[:, 0] for view in row.split(list(views))) for row in mask)
        positions = prompt.positions
        remaining = prompt.length if positions is None else positions.shape[1]
        return StepReport(
            episodes=step.ids,
            steps=step.numbers,
            views=views,
            warm_up=warm_up,
            kept_mask=mask,
            kept=kept,
            semantic=prompt.semantic,
            forecast=prompt.forecast,
            action=step.action(),
            tokens_full=prompt.length,
            tokens_kept=remaining,
            visual_full=visual,
            visual_kept=visual - (prompt.length - remaining),
            per_view=self.method.budget == "view",
            visual_valid=prompt.layout.visual_valid,
        )


def _is_empty(cache: Any) -> bool:
    if cache is None:
        return True
    return len(cache) == 0 if isinstance(cache, tuple) else int(cache.get_seq_length()) == 0


def _seed(name: Hashable, number: int) -> int:
    """A number for one step of one episode, the same in every process."""
    return zlib.crc32(f"{name!r}/{number}".encode())
