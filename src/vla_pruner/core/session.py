"""A session: one model with a pruning method attached, and what its callers say and ask."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vla_pruner.core import refusals
from vla_pruner.core.cut import Cut
from vla_pruner.core.hooks import Attached, replace
from vla_pruner.core.layout import Adapter
from vla_pruner.core.passes import Passes
from vla_pruner.core.report import StageReport, StepReport, report
from vla_pruner.core.tokens import TokenSet
from vla_pruner.methods.base import Method

__all__ = ["Session", "StageReport", "StepReport", "session_of"]

_attached: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Session]] = weakref.WeakKeyDictionary()


class Session(Attached):
    """A pruning method attached to a model; made by `vp.prune`, used as a context manager or not.

    Every call of the model is a step of an episode. An episode lasts until `reset`. In a batch,
    row i belongs to episode i unless `episodes` says otherwise. A call that raises an exception
    never was. One thread at a time may call the model; any may call `reset` and `motion`.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        adapter: Adapter,
        *,
        mode: Literal["drop", "mask"] = "drop",
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
        if session_of(model, adapter) is not None:
            raise RuntimeError(
                "this model already has a pruning session; call `session.remove()` on it, or leave "
                "its `with` block, before attaching another. `vp.remove(model)` finds it, and "
                "`vp.prune(..., replace=True)` removes it first."
            )
        self.model, self.method, self.adapter, self.mode = model, method, adapter, mode
        self._cut: Cut = method.hooks(adapter) or Cut(adapter, method)
        self._passes = Passes(adapter, method, self._cut, "drop" if mode == "drop" else "hide")
        self._passes.session = self  # The hooks keep it alive, for `vp.remove(model)`.
        self._undo = ExitStack()
        with self._undo:
            self._undo.callback(_attached.pop, self.decoder, None)
            _attached[self.decoder] = weakref.ref(self)
            self._passes.attach(model, self._undo)
            adapter.attach(self._undo)
            if "frame" in method.needs:
                adapter.send_frames(self.frame, self._undo)
            if method.flow_interval > 1:
                adapter.cache_flow(method.flow_interval, self._undo)
            self._cut.attach(self._undo)
            adapter.follow(self, self._undo)
            self._undo = self._undo.pop_all()

    # ------------------------------------------------------------------ episodes and steps
    def reset(self, episodes: Iterable[Hashable] | None = None) -> None:
        """Start new episodes: forget what was seen in these (ids), or in all of them."""
        names = None if episodes is None else tuple(episodes)
        self._passes.episodes.reset(names)
        self._cut.forget(names)

    def full_next(self, episode: Hashable) -> bool:
        """Whether an episode's next step runs on all tokens; unknown ones are about to begin."""
        return self._passes.episodes.full_next(episode)

    def inherit(self, other: Session) -> None:
        """Go on with what another session of this model remembers of its episodes.

        Raises:
            ValueError: its method is another one, or remembers otherwise.
        """
        mine, theirs = self.method, other.method
        own_memory = type(mine).hooks is not Method.hooks
        if own_memory or dataclasses.replace(mine, keep=theirs.keep) != theirs:
            raise ValueError(f"{mine!r} cannot go on where {theirs!r} stopped")
        self._passes.episodes.inherit(other._passes.episodes)

    def episodes(self, ids: Sequence[Hashable] | None) -> None:
        """Say which episode each row of the next calls belongs to; None: row i is episode i.

        Rows with the same id (beams) are one episode and keep the same tokens.
        """
        self._passes.names.ids = None if ids is None else tuple(ids)

    @contextmanager
    def episode(self, name: Hashable) -> Iterator[None]:
        """All calls inside, of one row each, belong to this episode, which begins and ends here.

        Threads and tasks may each be in a block of their own, one call at a time.
        """
        with self._passes.names.block((name,)):
            self.reset([name])
            try:
                yield
            finally:
                self.reset([name])

    def step(self) -> AbstractContextManager[None]:
        """All prefills inside belong to one policy step: the first decides, the others follow.

        They show the same image (ValueError). An exception that leaves the block undoes the step.
        """
        return self._passes.calls.as_one_step()

    def motion(self, value: float, episode: Hashable | None = None) -> None:
        """Report how far the robot moved in the last step, to methods that decide by it.

        Args:
            value: any measure, as long as it is the same in every step of an episode.
            episode: which episode; None: the one that rows belong to, if it is one.

        Raises:
            ValueError: a value that is not finite, or `episode` missing where there are several.
        """
        passes = self._passes
        if episode is None:
            latest = () if passes.latest is None else passes.latest.ids
            names = dict.fromkeys((passes.names.ids or latest) or (0,))
            if len(names) > 1:
                raise ValueError(
                    f"there are {len(names)} episodes; say which one moved: "
                    "`session.motion(value, episode)`."
                )
            (episode,) = names
        passes.episodes.motion(value, episode)

    def frame(self, images: Tensor) -> None:
        """Hand over the camera images of the next call, to methods that compare them.

        Models whose adapter sends them itself (OpenVLA, OpenVLA-OFT) do not need it.

        Args:
            images: `[B, cameras, 3, H, W]`, or `[B, 3, H, W]` of one camera: raw colours from 0 up,
                not normalised, after the policy's own crop and resize.

        Raises:
            TypeError: no tensor.
            ValueError: another shape, or a value that is negative or not finite.
        """
        if not isinstance(images, Tensor):
            raise TypeError(
                "`images` must be a tensor [B, cameras, 3, H, W] or [B, 3, H, W]; got a "
                f"{type(images).__name__}. Of one uint8 image [H, W, 3] it is "
                "`torch.as_tensor(image).permute(2, 0, 1)[None]`."
            )
        if images.ndim == 4:
            images = images[:, None]
        if images.ndim != 5 or images.shape[2] != 3:
            raise ValueError(
                "`images` must be [B, cameras, 3, H, W] or [B, 3, H, W]; got "
                f"{tuple(images.shape)}."
            )
        if not bool((images.isfinite() & (images >= 0)).all()):
            raise ValueError(
                "`images` must be raw colours, finite and from 0 up; these have negative values or "
                "NaN, as after a normalisation."
            )
        self._passes.frames = images

    def visual_places(self, mask: Tensor) -> None:
        """Say where the visual tokens of the next call are, for calls with `inputs_embeds`.

        Args:
            mask: `[B, S]` bool, True at visual tokens.

        Raises:
            TypeError: the model's adapter finds them by itself.
        """
        take: Any = getattr(self.adapter, "take_places", None)
        if take is None:
            raise TypeError(
                f"{type(self.adapter).__name__} knows where visual tokens are; places can be given "
                "to vision-language models of transformers alone (vp.models.ImageTokenVLM)."
            )
        take(mask)

    # ------------------------------------------------------------------ what happened
    @property
    def last(self) -> StepReport | None:
        """What the last step did; None before the first. `print` shows it in one line.

        Raises:
            ValueError: the step met scores or features that are NaN, which on a GPU is not looked
                at before somebody asks: here, or when the next step begins.
        """
        latest = self._passes.latest
        self._cut.flags.raise_noted()
        return None if latest is None else report(latest, self._cut)

    @property
    def left(self) -> TokenSet | None:
        """What the cuts left of the last prefill, for a head that reads the decoder's output.

        None: nothing was cut.
        """
        step = self._passes.prefilled
        return None if step is None or step.prefill.mode == "full" else step.prefill.sets[-1]

    def compile(self, **options: Any) -> None:
        """Run the decoder through `torch.compile(fullgraph=True, **options)` until `remove`.

        Only the decoder's forward is compiled; deciding what a pass is stays outside.

        Raises:
            RuntimeError: the session is no longer attached.
            NotImplementedError: the method's budget depends on what it sees.
        """
        if not self.attached:
            raise RuntimeError("the session was removed; make a new one with `vp.prune`.")
        if self.method.adaptive:
            raise NotImplementedError(
                f"method {self.method.name!r} keeps as many tokens as it sees fit, so that every "
                "step would be compiled anew; run it without `compile`, or give it a fixed budget."
            )
        compiled = torch.compile(self.decoder.forward, **{"fullgraph": True, **options})
        replace(self.decoder, "forward", compiled, self._undo)
        self._passes.own_results = True

    @property
    def attached(self) -> bool:
        """Whether the session still prunes."""
        known = _attached.get(self.decoder)
        return known is not None and known() is self

    def remove(self) -> None:
        """Detach: the model is what it was before. Does nothing the second time.

        Raises:
            RuntimeError: a call of the model has not come back yet.
        """
        if self.attached:
            if (thread := self._passes.calls.running()) is not None:
                raise refusals.still_running(thread)
            super().remove()
        self._cut.prefill = self._passes.frames = None
        self._cut.forget(None)

    def __repr__(self) -> str:
        state = "attached" if self.attached else "removed"
        return f"Session({self.method!r}, {self.adapter.describe()}, {state})"


def session_of(model: nn.Module, adapter: Adapter | None = None) -> Session | None:
    """The session that is attached to a model, or to the decoder of its adapter."""
    for module in model.modules() if adapter is None else (adapter.decoder,):
        known = _attached.get(module)
        session = None if known is None else known()
        if session is not None:
            return session
    return None
