"""A step of one of our policies as a few compiled graphs: towers, decoder, scores, head, memory."""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from vla_pruner import _flags as flags
from vla_pruner._numbers import on_device
from vla_pruner.core.cut import Cut
from vla_pruner.core.episodes import Episode, Step
from vla_pruner.core.hooks import Attached, replace
from vla_pruner.core.passes import Passes
from vla_pruner.core.session import session_of
from vla_pruner.core.tokens import Prefill
from vla_pruner.methods.base import Method
from vla_pruner.pruning.history import HistorySpec

if TYPE_CHECKING:
    from vla_pruner.models.port import Port

BUCKET = 16
"""Prompts are padded to a multiple of so many tokens, so that few lengths are compiled."""


class Capture(Attached):
    """Compiled steps of one policy, until `remove`; made by `policy.capture()`.

    A policy that is captured acts as it did, within rounding. There is one graph for each kind of
    pass (on all tokens, pruned), batch and padded prompt length, made when it is first needed. What
    a pass is, and which episode it belongs to, is decided on the host, outside of the graphs; the
    memory of action scores goes in as a tensor and comes out as one.

    Args:
        policy: the port to capture, with its pruning session or without one.
        backend: of `torch.compile`.
        mode: of `torch.compile`; "reduce-overhead" replays CUDA graphs.
        bucket: see `BUCKET`.

    Raises:
        RuntimeError: it is captured already.
        NotImplementedError: a policy or a method that decides on the host while a pass runs.
        ValueError: a bucket below 1.
    """

    def __init__(
        self,
        policy: Port,
        *,
        backend: str = "inductor",
        mode: str | None = None,
        bucket: int = BUCKET,
    ) -> None:
        if bucket < 1:
            raise ValueError(f"`bucket={bucket}` must be at least 1.")
        if policy in _captured:
            raise RuntimeError("this policy is captured already; call `remove()` on its capture.")
        self.policy: Any = policy
        self.session, self.bucket = session_of(policy), bucket
        self.graphs: dict[tuple[Any, ...], Callable[..., Any]] = {}
        self.options: dict[str, Any] = {"backend": backend, "mode": mode}
        self._placeholders: dict[tuple[Any, ...], Tensor] = {}
        self._memory: _Memory | None = None
        self._undo = ExitStack()
        if self.session is not None:
            check_method(self.session.method)
        with self._undo:
            _captured[policy] = self
            self._undo.callback(_captured.pop, policy, None)
            policy._attach(self, self._undo)
            if self.session is not None:
                self.session._undo.callback(self.remove)
                passes = self.session._passes
                if policy._one_pass and self.session.method.history is not None:
                    self._memory = _Memory(passes, self._undo)
                self._undo.callback(setattr, passes, "own_results", passes.own_results)
                passes.own_results |= mode is not None
            self._undo = self._undo.pop_all()

    def run(
        self,
        name: str,
        stack: nn.Module,
        call: Mapping[str, Any],
        function: Callable[..., Any],
        *args: Any,
        dynamic: bool = False,
    ) -> Any:
        """What `function(*args)` returns, which runs one stack of layers once, compiled.

        Args:
            name: of the pass.
            stack: the stack.
            call: what tells the session which pass this is: the stack's arguments, as far as it
                looks at them.
            function: a pure function of tensors, but for a cache among its arguments.
            dynamic: whether lengths may differ from call to call.

        Raises:
            RuntimeError: gradients are wanted, or what is pruned has changed since the capture.
        """
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a captured step gives no gradients; call it under `torch.no_grad()`, without a "
                "`guide`, or call `remove()` on the capture first."
            )
        if session_of(self.policy) is not self.session:
            raise RuntimeError(
                "this policy was captured before its pruning changed; call `remove()` on the "
                "capture, prune, and capture again."
            )
        if self.options["mode"] is not None:
            torch.compiler.cudagraph_mark_step_begin()
        shapes = () if dynamic else tuple(_shapes(args))
        if self.session is None:
            return self._graph((name, *shapes), function, dynamic)(*args)
        passes = self.session._passes
        output = None
        try:
            passes._before(stack, (), dict(call))
            output = self._inside(passes, (name, *shapes), function, args, dynamic)
        finally:
            passes.calls.captured = False
            passes._after(stack, (), dict(call), output)
        return output[0]

    def _inside(
        self,
        passes: Passes,
        key: tuple[Any, ...],
        function: Callable[..., Any],
        args: tuple[Any, ...],
        dynamic: bool,
    ) -> tuple[Any, ...]:
        """A pass of which the session has been told."""
        cut, prefill = passes.cut, passes.cut.prefill
        in_prefill = cut.phase == "prefill" and prefill is not None
        memory = self._memory if in_prefill else None
        kind = None if prefill is None else (cut.phase, *_facts(prefill))
        given = () if memory is None else memory.given
        passes.calls.captured = True
        graph = self._graph((*key, kind), _pass(function, cut, memory), dynamic)
        output, broken, remembered = graph(*given, *args)
        if broken is not None:
            with cut.flags.collect():
                flags.refuse(broken, _NAN)
        if remembered is not None and prefill is not None:
            prefill.note = remembered.clone() if self.options["mode"] else remembered
        return (output,)

    def _graph(
        self, key: tuple[Any, ...], function: Callable[..., Any], dynamic: bool
    ) -> Callable[..., Any]:
        """The compiled function of a kind of pass."""
        if key not in self.graphs:
            self.graphs[key] = torch.compile(
                _own_code(function), fullgraph=True, dynamic=dynamic, **self.options
            )
        return self.graphs[key]

    def placeholder(self, *shape: int) -> Tensor:
        """Stands for embeddings of a shape that only the graph will know."""
        if shape not in self._placeholders:
            one = torch.zeros((), device=self.policy.device, dtype=self.policy.dtype)
            self._placeholders[shape] = one.expand(shape)
        return self._placeholders[shape]

    def padded(self, length: int) -> int:
        """The length that a prompt of `length` tokens is padded to."""
        return -(-length // self.bucket) * self.bucket


def capture_policy(policy: nn.Module, backend: str = "inductor") -> Capture:
    """Capture a policy as it is pruned now, with CUDA graphs where it is on a GPU.

    Raises:
        TypeError: it is none of our ports.
        RuntimeError, NotImplementedError: see `Capture`.
    """
    capture: Any = getattr(policy, "capture", None)
    if capture is None:
        raise TypeError(
            f"a {type(policy).__name__} has no captured step; the ports of OpenVLA, OpenVLA-OFT, "
            "pi0 and pi0.5 in `vla_pruner.models` have one. `session.compile()` compiles the "
            "decoder of any other model."
        )
    on_gpu = any(parameter.is_cuda for parameter in policy.parameters())
    mode = "reduce-overhead" if on_gpu and backend == "inductor" else None
    return cast("Capture", capture(backend=backend, mode=mode))


class _Memory:
    """The memory of action scores of a batch, as one tensor that a graph reads and makes anew."""

    def __init__(self, passes: Passes, undo: ExitStack) -> None:
        spec = passes.method.history
        assert spec is not None
        self.spec = spec
        self.slots, self.layers = spec.slots, len(passes.plan.action_layers)
        self.given: tuple[Tensor, Tensor] | tuple[()] = ()
        self._counts: dict[tuple[Any, ...], Tensor] = {}
        self._eager = passes.episodes._remember
        replace(passes.episodes, "_forecast", self._read, undo)
        replace(passes.episodes, "_remember", self._remember, undo)

    def _read(self, episodes: Sequence[Episode], spec: HistorySpec) -> None:
        """In place of a forecast, which the graph works out: what it needs for it."""
        if len(set(map(id, episodes))) < len(episodes):
            raise NotImplementedError(
                "a captured step takes one row of each episode; beams of one episode share a "
                "memory. Call `remove()` on the capture for them."
            )
        history = torch.stack([episode.memory for episode in episodes])
        counts = tuple(min(episode.observations, self.slots) for episode in episodes)
        if (counts, history.device) not in self._counts:
            self._counts[counts, history.device] = on_device(counts, history.device)
        self.given = history, self._counts[counts, history.device]

    def _remember(self, episode: Episode, step: Step, action: Tensor, rows: list[int]) -> None:
        """What the graph made of the memory is kept; of a step before the capture, as ever."""
        if step.prefill.note is None:
            self._eager(episode, step, action, rows)
            return
        episode.memory = step.prefill.note[rows[0]]
        episode.observations += 1

    def forecast(self, history: Tensor, count: Tensor) -> Tensor:
        """`[B, M]`, in a graph."""
        return self.spec.forecast(history, count)

    def after(self, history: Tensor, count: Tensor, prefill: Prefill, cut: Cut) -> Tensor:
        """The memory `[B, slots, M]` after a pass, in a graph (see `Episodes._remember`)."""
        assert prefill.observed is not None
        observed = prefill.observed / self.layers
        good = observed.isfinite().all(dim=1, keepdim=True)
        observed = torch.where(good, observed, history[:, 0])
        kept, cuts = None, cut.plan.action_cuts
        if self.spec.censored != "zero":
            kept = torch.ones_like(observed, dtype=torch.bool)
            if cuts and prefill.mode != "full":
                tokens = prefill.sets[cuts].tokens
                assert tokens is not None
                kept = torch.zeros_like(kept).scatter(1, tokens, True)
                if prefill.full_rows is not None:
                    kept = kept | prefill.full_rows[:, None]
        return self.spec.update(history, count, observed, kept)[0]


def _pass(
    function: Callable[..., Any], cut: Cut, memory: _Memory | None
) -> Callable[..., tuple[Any, Tensor | None, Tensor | None]]:
    """A pass with what surrounds it in a graph: its output, whether scores broke, the memory."""

    def run(*args: Any) -> tuple[Any, Tensor | None, Tensor | None]:
        prefill, remembered = cut.prefill, None
        if memory is not None and prefill is not None:
            prefill.forecast = memory.forecast(args[0], args[1])
            output = function(*args[2:])
            remembered = memory.after(args[0], args[1], prefill, cut)
        else:
            output = function(*args)
        broken = None
        if prefill is not None and cut.phase == "prefill" and prefill.scores:
            found = [score.isnan().any() for score in prefill.scores.values()]
            broken = torch.stack(found).any()
        return output, broken, remembered

    return run


def _facts(prefill: Prefill) -> tuple[Any, ...]:
    """What of a prefill makes another graph of a pass."""
    present = (prefill.forecast, prefill.full_rows, prefill.leader, prefill.given)
    return prefill.mode, prefill.layout.visual.shape, *(one is not None for one in present)


def _shapes(values: Any) -> list[Any]:
    """Shape and dtype of every tensor among some arguments."""
    if isinstance(values, Tensor):
        return [(values.shape, values.dtype)]
    if isinstance(values, tuple | list):
        return [found for value in values for found in _shapes(value)]
    if is_dataclass(values):
        return [f for one in fields(values) for f in _shapes(getattr(values, one.name))]
    return [values] if values is None or isinstance(values, int | bool | str) else []


def _own_code(function: Any) -> Callable[..., Any]:
    """A copy of a function whose compiled versions are its own: PyTorch keeps them by code."""
    code = function.__code__.replace()
    return types.FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )


def check_method(method: Method) -> None:
    """Refuse methods that cannot be captured. Errors: NotImplementedError."""
    reason = None
    if type(method).hooks is not Method.hooks:
        reason = "decides on the host, while a pass runs, what it uses of the step before"
    elif method.adaptive:
        reason = "keeps as many tokens as it sees fit, so that every step would be another graph"
    elif method.flow_interval > 1:
        reason = "leaves out flow steps by counting them on the host"
    if reason is not None:
        raise NotImplementedError(
            f"method {method.name!r} {reason}; run it without a capture, or capture another method."
        )


_captured: weakref.WeakKeyDictionary[nn.Module, Capture] = weakref.WeakKeyDictionary()
_NAN = "scores contain NaN; a row of attention was fully masked or the model overflowed."
