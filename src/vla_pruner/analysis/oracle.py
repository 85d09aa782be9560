"""Oracle: the visual tokens whose pruned action is closest to the action on all tokens.

An instrument for upper bounds, not a method to deploy: it runs the policy on all tokens first, and
then the layers behind the cut hundreds or thousands of times.

Greedy search over sets of k of M tokens, forward (add the token that helps most) or backward (drop
the one that is missed least). Layers before the cut run once; their output is reused for every
candidate set, and candidate sets are rows of a batch. What is compared:

* policies with all their action queries in one pass (OpenVLA-OFT): the normalised actions, mean
  absolute difference. This is exact: it is what the pruned policy would do.
* policies that write the action token by token: the logits behind each action token, mean
  Kullback-Leibler divergence KL(full || pruned). The unpruned policy's own tokens are fed, so this
  is a surrogate: it ignores that a pruned policy would go on from its own mistakes.

Cost with `stride` s, in candidate sets that run through the layers behind the cut: forward about
`k (M - k/2) / s` of at most k visual tokens, backward about `(M - k)(M + k) / 2s` of k to M. A
round tries every single move; with s > 1 the s best of them are made at once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vla_pruner.calibration.calls import Call, Observation, caller
from vla_pruner.core.hooks import Attached
from vla_pruner.core.layout import Layout
from vla_pruner.core.session import Session, StepReport
from vla_pruner.methods.fixed import Fixed
from vla_pruner.models.base import Adapter, find_adapter
from vla_pruner.models.openvla import OpenVLAOFT
from vla_pruner.pruning.budget import Budget
from vla_pruner.pruning.options import require_choice, require_int

Direction = Literal["forward", "backward"]
Measure = Literal["actions", "logits"]
Read = Callable[[Tensor], Tensor]
"""From the final hidden states [C, R, D] of the action rows to actions [C, ...]."""


@dataclass(frozen=True)
class Found:
    """What a search found.

    Args:
        kept: tokens in 0..M-1, ascending.
        divergence: of the pruned action from the full one.
        measure: "actions" (exact) or "logits" (teacher-forced surrogate).
        trace: number of tokens and divergence of the set after each round.
        evaluated: candidate sets that were run.
    """

    kept: tuple[int, ...]
    divergence: float
    measure: Measure
    trace: tuple[tuple[int, float], ...]
    evaluated: int


@dataclass(frozen=True, kw_only=True)
class Oracle:
    """How to search.

    Args:
        keep: fraction of the visual tokens in (0, 1], or their number.
        layer: K, the number of layers that still see every token.
        direction: "forward" starts from no token, "backward" from all of them.
        stride: tokens added or dropped per round.
        batch: candidate sets that run at once; memory and speed only.

    Raises:
        ValueError: an option outside its range.
    """

    keep: float | int = 0.25
    layer: int = 3
    direction: Direction = "forward"
    stride: int = 1
    batch: int = 64

    def __post_init__(self) -> None:
        Budget(self.keep)
        require_choice("direction", self.direction, ("forward", "backward"))
        for name in ("layer", "stride", "batch"):
            require_int(name, getattr(self, name), 1)

    def search(
        self,
        model: nn.Module,
        observation: Observation,
        *,
        adapter: Adapter | None = None,
        call: Call | None = None,
        read: Read | None = None,
    ) -> Found:
        """The best tokens for one observation.

        Args:
            model: a policy without a session; left as it was.
            observation: what `call` is given, one sequence.
            adapter: for a model that no family knows.
            call: see `calibration.calls.caller`.
            read: how actions follow from hidden states, for a policy with all its action queries in
                one pass that is no OpenVLA-OFT of this package.

        Raises:
            TypeError: a model whose outputs cannot be read.
            ValueError: an impossible budget or layer, or an observation without image.
            NotImplementedError: padding, or inputs that cannot be continued by the action tokens.
        """
        adapter = adapter or find_adapter(model)
        with Bench(
            model, observation, adapter=adapter, layer=self.layer, call=call, read=read
        ) as bench:
            return self.run(bench)

    def run(self, bench: Bench) -> Found:
        """The best tokens on a bench that is set up; none of a missing camera."""
        candidates = set(bench.candidates)
        (k,) = Budget(self.keep).resolve((bench.size,))
        k = min(k, len(candidates))
        forward = self.direction == "forward" and k < len(candidates)
        chosen: set[int] = set() if forward else set(candidates)
        trace, evaluated = [], 0
        while len(chosen) != k:
            moves = sorted(candidates - chosen if forward else chosen)
            after = [sorted(chosen ^ {move}) for move in moves]
            costs = [
                cost
                for start in range(0, len(after), self.batch)
                for cost in bench.divergence(after[start : start + self.batch])
            ]
            evaluated += len(after)
            count = min(self.stride, abs(k - len(chosen)))
            ranked = sorted(range(len(moves)), key=lambda i: (costs[i], moves[i]))
            chosen ^= {moves[i] for i in ranked[:count]}
            reached = costs[ranked[0]] if count == 1 else bench.divergence([sorted(chosen)])[0]
            evaluated += count > 1
            trace.append((len(chosen), reached))
        kept = tuple(sorted(chosen))
        divergence = trace[-1][1] if trace else bench.divergence([list(kept)])[0]
        return Found(kept, divergence, bench.measure, tuple(trace), evaluated)


class Bench(Attached):
    """One observation, ready to be asked what any set of visual tokens would have done.

    Until `remove`, the layers before the cut do not run: they give what they gave.

    Args:
        model: a policy without a session.
        observation: one sequence.
        adapter: of the model.
        layer: K.
        call, read: see `Oracle.search`.

    Raises:
        TypeError, ValueError, NotImplementedError: see `Oracle.search`.
    """

    def __init__(
        self,
        model: nn.Module,
        observation: Observation,
        *,
        adapter: Adapter,
        layer: int,
        call: Call | None = None,
        read: Read | None = None,
    ) -> None:
        adapter.bind(model)
        earliest, depth = max(1, adapter.earliest_cut), len(adapter.layers)
        if not earliest <= layer < depth:
            raise ValueError(f"`layer={layer}` must lie in {earliest}..{depth - 1}.")
        self.model = model
        self.layer = layer
        self._kwargs, layout, self._rows = _record(model, adapter, observation, call)
        self.size = layout.visual.shape[1]
        valid = layout.visual_valid
        self.candidates = [i for i in range(self.size) if valid is None or bool(valid[0, i])]
        self.measure: Measure = "logits" if layout.action_rows is None else "actions"
        self._read = read or _reader(model, self.measure)
        self._adapter = _Known(adapter, layout)
        self._undo = ExitStack()
        with ExitStack() as undo:
            self._shorten(adapter.layers[:layer], undo)
            self._full = self._read(self._forward(1))
            self._undo = undo.pop_all()

    def divergence(self, sets: Sequence[Sequence[int]]) -> list[float]:
        """How far the action on each set of tokens is from the action on all tokens.

        Args:
            sets: sets of one size.
        """
        method = Fixed(indices=[list(one) for one in sets], layer=self.layer)
        with Session(self.model, method, self._adapter, mode="drop"):
            found = self._read(self._forward(len(sets)))
        if self.measure == "actions":
            return (found - self._full).abs().flatten(1).mean(dim=1).tolist()
        full, pruned = self._full.log_softmax(dim=-1), found.log_softmax(dim=-1)
        return (full.exp() * (full - pruned)).sum(dim=-1).flatten(1).mean(dim=1).tolist()

    @torch.no_grad()
    def _forward(self, batch: int) -> Tensor:
        """Final hidden states `[batch, R, D]` of the action rows."""
        kwargs = {name: _widen(name, value, batch) for name, value in self._kwargs.items()}
        output = self._adapter.decoder(**kwargs)
        hidden = output[0] if isinstance(output, tuple) else output.last_hidden_state
        return hidden[:, self._rows]

    def _shorten(self, layers: Sequence[nn.Module], undo: ExitStack) -> None:
        """Replace the forward of these layers by their output for this observation."""
        outputs: list[Any] = []
        handle = layers[-1].register_forward_hook(lambda module, args, out: outputs.append(out))
        try:
            self._forward(1)
        finally:
            handle.remove()
        in_tuple = isinstance(outputs[0], tuple)
        reached = outputs[0][0] if in_tuple else outputs[0]  # [1, S, D]

        def passes_on(*args: Any, **kwargs: Any) -> Any:
            batch = (args[0] if args else kwargs["hidden_states"]).shape[0]
            hidden = reached.expand(batch, -1, -1)
            return (hidden,) if in_tuple else hidden

        for layer in layers:
            if "forward" in vars(layer):
                undo.callback(setattr, layer, "forward", vars(layer)["forward"])
            else:
                undo.callback(delattr, layer, "forward")
            layer.forward = passes_on


class OracleSession(Attached):
    """A policy each of whose calls is searched first: what `rollout` takes for a session.

    Args:
        policy: its `predict_action` is replaced until `remove`.
        oracle: how to search.
        adapter: for a model that no family knows.
        read: see `Oracle.search`.
    """

    def __init__(
        self,
        policy: nn.Module,
        oracle: Oracle,
        *,
        adapter: Adapter | None = None,
        read: Read | None = None,
    ) -> None:
        self.policy = policy
        self.oracle = oracle
        self.adapter = adapter or find_adapter(policy)
        self.adapter.bind(policy)
        self.decoder = self.adapter.decoder
        self.method = Fixed(layer=oracle.layer)
        self.last: StepReport | None = None
        self.found: list[Found] = []
        self._read = read
        self._undo = ExitStack()
        original: Any = policy.predict_action
        if "predict_action" in vars(policy):
            self._undo.callback(setattr, policy, "predict_action", original)
        else:
            self._undo.callback(delattr, policy, "predict_action")
        signature = inspect.signature(original)

        def predict_action(*args: Any, **kwargs: Any) -> Any:
            return self._act(original, signature.bind(*args, **kwargs).arguments)

        policy.predict_action = predict_action  # type: ignore[assignment]

    def _act(self, call: Callable[..., Any], observation: Mapping[str, Any]) -> Any:
        found = self.oracle.search(
            self.policy,
            observation,
            adapter=self.adapter,
            call=lambda seen: call(**seen),
            read=self._read,
        )
        self.found.append(found)
        self.method = Fixed(indices=found.kept, layer=self.oracle.layer)
        with Session(self.policy, self.method, self.adapter, mode="drop") as session:
            action = call(**observation)
            self.last = session.last
        return action

    def reset(self, episodes: Iterable[Hashable] | None = None) -> None:
        """Nothing is remembered between steps."""

    def episodes(self, ids: Sequence[Hashable] | None) -> None:
        """Nothing is remembered of episodes."""


class _Known(Adapter):
    """The adapter of another, with the layout of one recorded prefill."""

    def __init__(self, inner: Adapter, layout: Layout) -> None:
        self._inner = inner
        self._layout = Layout(layout.visual, layout.views, visual_valid=layout.visual_valid)
        self.decoder = inner.decoder
        self.earliest_cut = inner.earliest_cut

    @property
    def layers(self) -> Sequence[nn.Module]:
        return self._inner.layers

    def attention(self, layer: nn.Module) -> nn.Module:
        return self._inner.attention(layer)

    def layout(self, inputs: Tensor, kwargs: Mapping[str, Any]) -> Layout:
        return self._layout


def _record(
    model: nn.Module, adapter: Adapter, observation: Observation, call: Call | None
) -> tuple[dict[str, Any], Layout, slice]:
    """Arguments of one decoder pass that holds every action query, their layout and their rows."""
    layouts: list[Layout] = []
    prefill: dict[str, Any] = {}
    fed: list[Tensor] = []  # action tokens [1, 1, D], or [1, 1] ids
    signature = inspect.signature(adapter.decoder.forward)

    def listen(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = dict(signature.bind_partial(*args, **kwargs).arguments)
        for parameter in signature.parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                bound.update(bound.pop(parameter.name, {}))
        inputs = bound.get("inputs_embeds")
        inputs = bound["input_ids"] if inputs is None else inputs
        if layouts:
            if inputs.shape[1] == 1:
                fed.append(inputs)
            return
        layout = adapter.layout(inputs, bound) if inputs.shape[1] > 1 else None
        if layout is not None:
            layouts.append(layout)
            prefill.update(bound)

    with ExitStack() as undo:
        adapter.attach(undo)
        handle = adapter.decoder.register_forward_pre_hook(listen, with_kwargs=True)
        undo.callback(handle.remove)
        (call or caller(model))(observation)
    if not layouts:
        raise ValueError("no image reached the decoder; run `vla-pruner doctor` on it.")
    (layout,) = layouts
    embeds = _embedded(adapter.decoder, prefill)
    if embeds.shape[0] != 1:
        raise ValueError(f"the oracle looks at one observation; got a batch of {embeds.shape[0]}.")
    if layout.valid_rows is not None and not bool(layout.valid_rows.bool().all()):
        raise NotImplementedError("the oracle reads sequences without padding.")
    length = embeds.shape[1]
    for name in ("input_ids", "inputs_embeds", "past_key_values", "cache_position"):
        prefill.pop(name, None)
    prefill |= {"inputs_embeds": embeds, "use_cache": False}
    if layout.action_rows is not None:
        return prefill, layout, layout.action_rows
    tokens = [
        one if one.ndim == 3 else adapter.decoder.get_input_embeddings()(one)  # type: ignore[operator]
        for one in fed
    ]
    return _continued(prefill, tokens), layout, slice(length - 1, length + len(tokens))


def _embedded(decoder: nn.Module, kwargs: Mapping[str, Any]) -> Tensor:
    """The prefill's embeddings `[B, S, D]`."""
    embeds = kwargs.get("inputs_embeds")
    if embeds is None:
        embeds = decoder.get_input_embeddings()(kwargs["input_ids"])  # type: ignore[operator]
    return embeds


def _continued(prefill: dict[str, Any], tokens: Sequence[Tensor]) -> dict[str, Any]:
    """The prefill's arguments with the embeddings of action tokens behind it."""
    embeds = prefill["inputs_embeds"]
    length, more = embeds.shape[1], len(tokens)
    result = dict(prefill)
    result["inputs_embeds"] = torch.cat([embeds, *tokens], dim=1)
    for name, value in prefill.items():
        if name == "inputs_embeds" or not isinstance(value, Tensor):
            continue
        if name == "attention_mask" and value.ndim == 2:
            result[name] = None
        elif name == "attention_mask" and value.shape[-2:] == (length, length):
            result[name] = _continued_mask(value, more)
        elif name == "position_ids":
            later = torch.arange(1, more + 1, device=value.device)
            result[name] = torch.cat([value, value[..., -1:] + later], dim=-1)
        elif length in value.shape[1:]:
            raise NotImplementedError(
                f"the decoder gets `{name}` {tuple(value.shape)}, and it is unknown how the "
                "action tokens continue it; the oracle cannot search this model."
            )
    return result


def _continued_mask(mask: Tensor, more: int) -> Tensor:
    """A mask `[1, 1, S, S]`, boolean or additive, with rows behind it that see all before them."""
    length = mask.shape[-1]
    boolean = mask.dtype == torch.bool
    shown, hidden = (True, False) if boolean else (0.0, torch.finfo(mask.dtype).min)
    size = length + more
    future = torch.ones(size, size, dtype=torch.bool, device=mask.device).triu(1)
    result = torch.full_like(future, shown, dtype=mask.dtype).masked_fill(future, hidden)
    result = result.expand(*mask.shape[:-2], -1, -1).clone()
    result[..., :length, :length] = mask
    return result


def _widen(name: str, value: Any, batch: int) -> Any:
    """An argument of one sequence for a batch of the same."""
    if not isinstance(value, Tensor) or value.ndim < 2:
        return value
    axis = 1 if name == "position_ids" and value.ndim == 3 else 0
    shape = list(value.shape)
    shape[axis] = batch
    return value.expand(shape)


def _reader(model: nn.Module, measure: Measure) -> Read:
    """How hidden states of action rows become actions, or logits."""
    if isinstance(model, OpenVLAOFT):
        chunk = model.config.chunk
        return lambda rows: model.action_head(rows.reshape(len(rows), chunk, -1)).float()
    if measure == "logits":
        for module in (model, getattr(model, "language_model", None)):
            head = getattr(module, "get_output_embeddings", lambda: None)()
            if isinstance(head, nn.Module):
                return lambda rows: head(rows).float()
    raise TypeError(
        f"it is unknown how {type(model).__name__} makes actions of hidden states; give `read`, a "
        "function from [C, R, D] to actions."
    )
