"""A session: one model with a pruning method attached, and what it remembers of each episode."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vla_pruner.methods.base import Method
from vla_pruner.surgery.arguments import take
from vla_pruner.surgery.cut import Cut
from vla_pruner.surgery.episode import Episodes, Step
from vla_pruner.surgery.layout import Adapter, Layout
from vla_pruner.surgery.memory import Memories, Recalled, Record
from vla_pruner.surgery.prompt import Mode, Places, Prompt, Stage
from vla_pruner.surgery.report import StageReport, StepReport, report
from vla_pruner.surgery.reuse import Reusing, fill_in
from vla_pruner.surgery.undo import Attached

__all__ = ["Session", "StageReport", "StepReport"]

_attached: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class Session(Attached):
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
        recalls = method.recalled_layer(len(adapter.layers)) is not None
        self._cut = Reusing(adapter, method) if recalls else Cut(adapter, method)
        self._plan = self._cut.plan
        self._episodes = Episodes(method, self._plan)
        self._memories = Memories(method, self._plan) if recalls else None
        self._frames: Tensor | None = None
        self._ids: tuple[Hashable, ...] | None = None
        self._copies = 1
        self._latest: Step | None = None
        self._open: Step | None = None
        self._prefilled: Step | None = None  # Of the last prefill; None: it showed no image.
        self._in_step = False
        self._running: Step | None = None
        self._queries = 0
        self._compiled = False
        self._by_cache: weakref.WeakKeyDictionary[Any, Step | None] = weakref.WeakKeyDictionary()
        self._known: tuple[Layout, int, int, Places] | None = None

        self._undo = ExitStack()
        with self._undo:
            self._undo.callback(_attached.discard, self.decoder)
            _attached.add(self.decoder)
            adapter.attach(self._undo)
            if "frame" in method.needs:
                adapter.send_frames(self.frame, self._undo)
            if method.flow_interval > 1:
                adapter.cache_flow(method.flow_interval, self._undo)
            self._cut.attach(self._undo)
            for stack in (self.decoder, adapter.reader):
                if stack is not None:
                    before = stack.register_forward_pre_hook(self._before, with_kwargs=True)
                    after = stack.register_forward_hook(self._after, with_kwargs=True)
                    self._undo.callback(before.remove)
                    self._undo.callback(after.remove)
            self._group_generated_rows()
            adapter.follow(self, self._undo)
            self._undo = self._undo.pop_all()

    # ------------------------------------------------------------------ for callers
    def reset(self, episodes: Iterable[Hashable] | None = None) -> None:
        """Start new episodes: forget what was seen in these (ids), or in all of them."""
        names = None if episodes is None else tuple(episodes)
        self._episodes.reset(names)
        if self._memories is not None:
            self._memories.reset(names)

    def episodes(self, ids: Sequence[Hashable] | None) -> None:
        """Say which episode each row of the next calls belongs to; None: row i is episode i.

        Rows with the same id (beams) are one episode and keep the same tokens.
        """
        self._ids = None if ids is None else tuple(ids)

    def motion(self, value: float, episode: Hashable | None = None) -> None:
        """Report how far the robot moved in the last step, to methods that decide by it.

        Args:
            value: any measure, as long as it is the same in every step of an episode.
            episode: which episode; None: the one that rows belong to, if it is one.

        Raises:
            ValueError: a value that is not finite, or `episode` missing where there are several.
        """
        if episode is None:
            latest = () if self._latest is None else self._latest.ids
            names = dict.fromkeys((self._ids or latest) or (0,))
            if len(names) > 1:
                raise ValueError(
                    f"there are {len(names)} episodes; say which one moved: "
                    "`session.motion(value, episode)`."
                )
            (episode,) = names
        self._episodes.motion(value, episode)

    def frame(self, images: Tensor) -> None:
        """Hand over the camera images of the next call, to methods that compare them.

        Models whose adapter sends them itself (OpenVLA, OpenVLA-OFT) do not need it.

        Args:
            images: `[B, cameras, 3, H, W]`, or `[B, 3, H, W]` of one camera: raw colours from 0 up,
                not normalised, after the policy's own crop and resize.

        Raises:
            ValueError: another shape, or a value that is not finite.
        """
        if images.ndim == 4:
            images = images[:, None]
        if images.ndim != 5 or images.shape[2] != 3 or not bool(images.isfinite().all()):
            raise ValueError(
                "`images` must be [B, cameras, 3, H, W] or [B, 3, H, W] and finite; got "
                f"{tuple(images.shape)}."
            )
        self._frames = images

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
        if self._latest is None:
            return None
        return report(self._latest, self._plan, per_view=self.method.budget == "view")

    @property
    def left(self) -> Stage | None:
        """What the cuts left of the last prefill, for a head that reads the decoder's output.

        None: nothing was cut.
        """
        prompt = None if self._prefilled is None else self._prefilled.prompt
        return None if prompt is None or prompt.mode == "full" else prompt.stages[-1]

    def compile(self, **options: Any) -> None:
        """Run the decoder through `torch.compile(fullgraph=True, **options)` until `remove`.

        Only the decoder's forward is compiled; deciding what a pass is stays outside.

        Raises:
            RuntimeError: the session is no longer attached.
            NotImplementedError: the method's budget depends on what it sees.
        """
        if self.decoder not in _attached:
            raise RuntimeError("the session was removed; make a new one with `vp.prune`.")
        if self.method.adaptive:
            raise NotImplementedError(
                f"method {self.method.name!r} keeps as many tokens as it sees fit, so that every "
                "step would be compiled anew; run it without `compile`, or give it a fixed budget."
            )
        compiled = torch.compile(self.decoder.forward, **{"fullgraph": True, **options})
        self._set_attribute(self.decoder, "forward", compiled)
        self._compiled = True

    def remove(self) -> None:
        """Detach: the model is what it was before. Does nothing the second time."""
        super().remove()
        self._by_cache.clear()
        self._cut.prompt = self._frames = None
        if self._memories is not None:
            self._memories.reset()

    def __repr__(self) -> str:
        state = "attached" if self.decoder in _attached else "removed"
        return f"Session({self.method!r}, {self.adapter.describe()}, {state})"

    # ------------------------------------------------------------------ around each decoder pass
    def _before(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Decide what this pass is, and hand the cut what it needs."""
        if args:
            bound = inspect.signature(decoder.forward).bind_partial(*args, **kwargs)
            kwargs = dict(bound.arguments)
        names = ("inputs_embeds", "input_ids", "hidden_states")
        inputs = next(kwargs[name] for name in names if kwargs.get(name) is not None)
        cache = kwargs.get("past_key_values")
        cut, batch, length = self._cut, inputs.shape[0], inputs.shape[1]
        cut.static_cache = bool(getattr(cache, "is_compileable", False))
        reads_output = self.adapter.reads_output and decoder is self.adapter.reader
        if length > 1 and _is_empty(cache) and not reads_output:
            cut.phase = "prefill"
            layout = self.adapter.layout(inputs, kwargs)
            step = None if layout is None else self._start(layout, inputs, kwargs)
            self._prefilled = step
            if cache is not None:
                self._remember(cache, step)
        else:
            cut.phase = "decode"
            step = self._prefilled if reads_output else self._find(cache)
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
        if cut.prompt is not None:
            cut.prompt.start_pass()

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
                acting = self.adapter.reader_rows(self._queries) if cut.readers else None
                rows = self._queries if acting is None else acting.stop - acting.start
            step.add(prompt.observed, rows)
        if self._memories is not None and prompt.record is not None:
            self._memories.close(step.ids, prompt.record)
            prompt.record = None
            if not self._in_step:
                prompt.recalled = None
        prompt.finish_pass(own=self._compiled and cut.phase == "prefill")

    # ------------------------------------------------------------------ steps
    def _start(self, layout: Layout, inputs: Tensor, kwargs: Mapping[str, Any]) -> Step:
        """A prefill begins: finish the step before, and find out who prunes."""
        batch, length = inputs.shape[:2]
        frames, self._frames = self._frames, None
        places = self._places(layout, batch, length)
        counts = self._counts(layout)
        stages = self._stages(layout, places, counts)
        previous = self._open if self._in_step else None
        if previous is not None and len(previous.ids) == batch:
            first = previous.prompt
            previous.prompt = Prompt(
                layout,
                length,
                first.mode,
                places,
                stages,
                counts,
                forecast=first.forecast,
                full_rows=first.full_rows,
                given=first.choices,
                scores=first.scores,
            )
            if first.recalled is not None:
                fill_in(previous.prompt, first.recalled, batch, drop=first.mode == "drop")
            return previous

        ids = self._row_ids(batch)
        full = self._episodes.begin(ids, self._features(layout, inputs))
        record: Record | None = None
        recalled: Recalled | None = None
        if self._memories is not None:
            record = self._memories.open(frames, layout, batch, length, kwargs)
            recalled = self._memories.recall(ids, record, layout, [not row for row in full])
            full = (True,) * batch
            if recalled is not None:
                full = tuple(memory is None for memory in recalled.memories)
        mode: Mode = self.mode
        if not self._plan.cuts or all(full):
            mode = "full"
        elif any(full) and recalled is None:
            mode = "mask"
        prompt = Prompt(layout, length, mode, places, stages, counts)
        device = layout.visual.device
        prompt.forecast = self._episodes.forecast(ids, layout.visual.shape[1], device)
        if mode != "full":
            prompt.seeds = self._episodes.seeds(ids, device)
        if mode == "mask" and any(full):
            prompt.full_rows = torch.tensor(full, dtype=torch.bool, device=device)
        prompt.record = record
        if recalled is not None:
            fill_in(prompt, recalled, batch, drop=mode == "drop")
        if len(set(ids)) < batch:
            leaders = [ids.index(name) for name in ids]
            prompt.leader = torch.tensor(leaders, dtype=torch.int64, device=device)
        numbers = self._episodes.numbers(ids)
        step = Step(ids, numbers, full, prompt, len(self._plan.action_layers))
        self._episodes.note(step)
        self._latest = step
        self._open = step if self._in_step else None
        return step

    def _counts(self, layout: Layout) -> tuple[int, ...]:
        """Visual tokens that each cut has to leave.

        Raises:
            ValueError: a budget that does not fit these cameras, or a layout that does not say
                which rows are text to a method that needs it.
        """
        if self._plan.needs_text and layout.text_rows is None:
            raise ValueError(
                f"method {self.method.name!r} needs to know which tokens are the instruction, and "
                f"{type(self.adapter).__name__} does not say, or there is none; set "
                "`Layout.text_rows` in the adapter, or use another method."
            )
        cuts = self._plan.cuts
        if not cuts:
            return ()
        counts = tuple(self.method.schedule(layout.views, self._plan.depth))
        before = (sum(layout.views), *counts)
        if len(counts) != len(cuts) or any(not 0 <= b <= a for a, b in pairwise(before)):
            raise ValueError(
                f"method {self.method.name!r} plans to leave {counts} tokens after its cuts before "
                f"layers {cuts}; expected one number for each, none larger than the one before or "
                f"than the {sum(layout.views)} visual tokens."
            )
        return counts

    def _stages(self, layout: Layout, places: Places, counts: tuple[int, ...]) -> tuple[Stage, ...]:
        """Stage 0, and one to be filled in for each cut."""
        views, stages = layout.views, [Stage(layout.views, places.tokens, layout.visual)]
        for number, count in enumerate(counts):
            per_view = self.method.budget == "view" and not self.method.adaptive
            views = self.method.split(views, count, number) if per_view else (count,)
            stages.append(Stage(views))
        return tuple(stages)

    def _features(self, layout: Layout, inputs: Tensor) -> Tensor | None:
        """[B, M, D] visual embeddings, for methods that want to see how they change."""
        if not self.method.wants_change:
            return None
        if inputs.ndim == 2:
            visual = inputs.gather(1, layout.visual.expand(inputs.shape[0], -1))
            embed: Any = self.decoder.get_input_embeddings
            return embed()(visual)
        return take(inputs, layout.visual, dim=1)

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

    def _places(self, layout: Layout, batch: int, length: int) -> Places:
        """What follows from a layout, worked out once for each."""
        known = self._known
        if known is None or known[0] is not layout or known[1:3] != (batch, length):
            with torch.inference_mode(False):  # kept for later calls, which may be training
                known = (layout, batch, length, Places.of(layout, batch, length))
            self._known = known
        return known[3]

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
        step = self._latest
        if step is None or not self._plan.cuts or isinstance(cache, tuple):
            return None
        prompt, seen = step.prompt, int(cache.get_seq_length(0))
        if seen < prompt.length:
            return None
        for number in range(len(prompt.stages)):
            layer = self._plan.runs_in(number)
            removed = prompt.length - prompt.length_at(number) if layer else 0
            if layer is not None and seen - int(cache.get_seq_length(layer)) != removed:
                return None
        return step

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


def _is_empty(cache: Any) -> bool:
    if cache is None:
        return True
    return len(cache) == 0 if isinstance(cache, tuple) else int(cache.get_seq_length()) == 0
