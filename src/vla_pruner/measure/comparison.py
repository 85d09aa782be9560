"""The full model against pruned ones: copies that share weights, run in turn in one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

import vla_pruner
from vla_pruner.core.session import Session
from vla_pruner.measure import timing
from vla_pruner.measure.doctor import check_budget
from vla_pruner.measure.environment import stamp
from vla_pruner.measure.operators import Operators
from vla_pruner.measure.parts import SCORING, SELECTION, measure_parts
from vla_pruner.measure.timing import PassClock, Spread
from vla_pruner.measure.workloads import Workload
from vla_pruner.methods import Method, build
from vla_pruner.methods.base import OneCut
from vla_pruner.methods.none import NoPruning
from vla_pruner.models.capture import capture_policy
from vla_pruner.pruning.flops import layered_prefill_flops, prefill_flops
from vla_pruner.pruning.selection import max_min_filter

FULL = "full"

_DRAWS = 2000
_TRIES = 12
"""Steps after which a method that still drops nothing is measured as it is."""


@dataclass
class VariantRow:
    """What was measured of one variant. Times in ms per step; ratios against the full model.

    `speedup` and `total_speedup` are ratios of the medians that are printed, their ends those of a
    95 % bootstrap interval over rounds; `bound` is the ratio of FLOPs, `of_bound` their quotient: 1
    means that every FLOP saved was time saved. `overhead_ms` is what the prefill takes beyond full
    time / bound. `of_ideal` is what the same cut with tokens chosen beforehand takes, over what
    this variant does; None where there is no such row. `operators` are those of a step
    (`measure.operators`), also by part; `waits` are those of them that a host with a GPU would wait
    for. `memory_mb` is what one step held on top of weights.
    """

    name: str
    method: str | None
    keep: float | int | None
    tokens: int
    visual: int
    total_ms: Spread
    prefill_ms: Spread
    decode_ms: Spread | None
    speedup: Spread
    total_speedup: Spread
    flops: float
    bound: float
    of_bound: float
    overhead_ms: float
    scoring_ms: Spread | None
    selection_ms: Spread | None
    memory_mb: float | None
    of_ideal: Spread | None = None
    operators: int | None = None
    operators_by_part: dict[str, int] = field(default_factory=dict)
    waits: dict[str, int] | None = None


@dataclass
class Comparison:
    """The rows, and what they were measured on."""

    model: dict[str, Any]
    rows: list[VariantRow]
    selection_128_of_512_ms: dict[str, Spread]  # By dtype of the features.
    settings: dict[str, Any]
    environment: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass
class _Variant:
    """One copy of the policy, attached and warmed up, with the times it took."""

    name: str
    workload: Workload
    method: Method | None
    device: torch.device
    policy: Any = None
    session: Session | None = None
    memory_mb: float | None = None
    scoring_ms: Spread | None = None
    selection_ms: Spread | None = None
    ideal: str | None = None
    operators: int | None = None
    by_part: dict[str, int] = field(default_factory=dict)
    waits: dict[str, int] | None = None
    total_ms: list[float] = field(default_factory=list)
    prefill_ms: list[float] = field(default_factory=list)
    decode_ms: list[float] = field(default_factory=list)

    def attach(self) -> None:
        """Raises ValueError: the method does not fit this policy."""
        self.policy = self.workload.copy()
        if self.method is None:
            return
        try:
            self.session = vla_pruner.prune(self.policy, self.method)
            check_budget(self.session)
        except (ValueError, NotImplementedError) as error:
            raise ValueError(f"{self.name}: {error}") from error

    def prepare(self, *, compile_decoder: bool, capture: str, tick: Callable[[], None]) -> None:
        """Walk through the method's own warm-up, measure the parts, warm up the caches."""
        decoder = self.workload.decoder(self.policy)
        if self.method is not None:
            assert self.session is not None
            for _ in range(self.method.warmup):
                self.step()
                tick()
            method = self.session.method
            found = measure_parts(
                method, self.step, self.device, dropped=lambda: not self._was_full()
            )
            self.scoring_ms = _spread(found.ms.get(SCORING))
            self.selection_ms = _spread(found.ms.get(SELECTION))
            self.operators, self.by_part = found.operators, found.by_part
            self.waits = found.waits
        else:
            with Operators() as counter:
                self.step()
            self.operators, self.waits = counter.count, dict(counter.waits)
        tick()
        if compile_decoder:
            if self.session is None:
                decoder.forward = torch.compile(decoder.forward, fullgraph=True)
            else:
                self.session.compile()
        if capture:
            capture_policy(self.policy, capture)
        for _ in range(2 if compile_decoder or capture else 0):
            self.step()
            tick()
        self.memory_mb = timing.peak_memory_mb(self.step, self.device)
        tick()
        # A captured step is one graph: nothing can stand between its passes with a clock.
        stacks = [] if capture else self.workload.stacks(self.policy)
        self.clock = PassClock(stacks, self.device) if stacks else None

    def step(self) -> None:
        self.workload.step(self.policy)
        if self.session is not None and "motion" in self.session.method.needs:
            self.session.motion(1.0)  # A robot that never stops, for methods that wait for that.

    def measure(self) -> None:
        """One timed step; of a method that runs some steps on all tokens, one that drops tokens."""
        for _ in range(_TRIES):
            total = timing.time_ms(self.step, self.device)
            prefill, *decode = [total] if self.clock is None else self.clock.take()
            if not self._was_full():
                break
        self.total_ms.append(total)
        self.prefill_ms.append(prefill)
        if decode:
            self.decode_ms.append(sum(decode))

    def _was_full(self) -> bool:
        """Whether a method that drops tokens dropped none in the last step."""
        if self.session is None or self.session.last is None or not self.cuts:
            return False
        return bool(self.session.last.warm_up.all())

    @property
    def cuts(self) -> tuple[int, ...]:
        """Layers before which tokens are cut, as the attached method has it."""
        assert self.session is not None
        return self.session.method.cuts(len(self.session.adapter.layers))


def steps_to_prepare(method: Method | None, compiled: bool) -> int:
    """Steps that a variant takes before it is timed."""
    return (method.warmup if method else 0) + 1 + (2 if compiled else 0) + 1


def compare(
    workload: Workload,
    methods: Sequence[Method],
    *,
    names: Sequence[str] | None = None,
    repeats: int,
    compile_decoder: bool = False,
    capture: str = "",
    ideals: bool = False,
    tick: Callable[[], None] = lambda: None,
) -> Comparison:
    """Measure the full model and each method in turn, `repeats` rounds.

    Args:
        workload: the policy and its step.
        methods: configured methods.
        names: of their rows, all different; None: method and `keep`.
        repeats: rounds; each times every variant once.
        compile_decoder: compile the decoder of every variant, the full one included.
        capture: backend that compiles the whole step of every variant (`policy.capture()`); the
            time of a prefill is then that of the step. Empty: they run as they are.
        ideals: measure each cut once more, with as many tokens that were chosen beforehand: what
            pruning could be if nothing were scored or selected.
        tick: called after every step, for a progress bar.

    Raises:
        ValueError: two variants of one name, or one that does not fit the policy; nothing has been
            measured then.
    """
    started, device = time.perf_counter(), workload.policy.device
    if compile_decoder:  # all variants compile the same function, each with its own modules
        torch._dynamo.config.recompile_limit = 16 * (1 + len(methods))
    variants = {FULL: _Variant(FULL, workload, None, device)}
    for name, method in zip(names or map(_name, methods), methods, strict=True):
        if name in variants:
            raise ValueError(f"two variants are called {name!r}; give them different `names`")
        variants[name] = _Variant(name, workload, method, device)
    for variant in variants.values():
        variant.attach()  # What does not fit is named before its ideal is asked for.
    for name, ideal in ideals_of(workload, methods).items() if ideals else ():
        variants[name] = _Variant(name, workload, ideal, device)
        variants[name].attach()
    for variant in variants.values():
        variant.ideal = _ideal_name(workload, variant.method)
    for variant in variants.values():
        variant.prepare(compile_decoder=compile_decoder, capture=capture, tick=tick)
    for name in timing.in_turn(list(variants), repeats):
        variants[name].measure()
        tick()

    text = workload.policy.language_model.config
    full = variants[FULL]
    return Comparison(
        model={
            "name": workload.name,
            "tokens": workload.tokens,
            "visual": workload.visual,
            "layers": text.num_hidden_layers,
            "hidden": text.hidden_size,
            "ffn": text.intermediate_size,
            "vision": workload.vision,
            "dtype": str(workload.policy.dtype).removeprefix("torch."),
            "parameters": sum(p.numel() for p in workload.policy.parameters()),
        },
        rows=[
            _row(variant, full, variants.get(variant.ideal or "")) for variant in variants.values()
        ],
        selection_128_of_512_ms={
            str(dtype).removeprefix("torch."): _selection_reference(device, dtype)
            for dtype in (torch.bfloat16, torch.float32)
        },
        settings={
            "repeats": repeats,
            "compiled": compile_decoder,
            "captured": capture,
            "device": str(device),
            "seconds": round(time.perf_counter() - started, 1),
        },
        environment=stamp(device),
    )


def _name(method: Method) -> str:
    return method.name if isinstance(method, NoPruning) else f"{method.name} {method.keep}"


def ideals_of(workload: Workload, methods: Sequence[Method]) -> dict[str, Method]:
    """For each cut that some of these methods make, by name: tokens chosen beforehand, evenly."""
    found: dict[str, Method] = {}
    views = workload.policy.config.views
    for method in methods:
        name = _ideal_name(workload, method)
        if name is not None and isinstance(method, OneCut):
            count, total = method.kept(views), sum(views)
            evenly = tuple(place * total // count for place in range(count))
            found[name] = build("fixed", indices=evenly, layer=method.layer)
    return found


def _ideal_name(workload: Workload, method: Method | None) -> str | None:
    """The row that shows what a method's cut could be; None: it cuts in another way, or not."""
    if not isinstance(method, OneCut) or method.adaptive or type(method).hooks is not Method.hooks:
        return None
    if method.skipped(workload.policy.language_model.config.num_hidden_layers):
        return None
    views = workload.policy.config.views
    count = method.kept(views)
    return f"ideal {count} K={method.layer}" if 0 < count < sum(views) else None


def _row(variant: _Variant, full: _Variant, ideal: _Variant | None) -> VariantRow:
    workload, text = variant.workload, variant.workload.policy.language_model.config
    tokens, visual, layers = workload.tokens, workload.visual, text.num_hidden_layers
    kept, per_layer = visual, (tokens,) * layers
    keys = per_layer
    if variant.session is not None and variant.session.last is not None:
        kept = variant.session.last.visual_kept
        per_layer = variant.session.last.tokens_per_layer
        keys = variant.session.last.keys_per_layer
    hidden, ffn = text.hidden_size, text.intermediate_size
    unpruned = prefill_flops(tokens, layers=layers, hidden=hidden, ffn=ffn)
    flops = layered_prefill_flops(per_layer, keys_per_layer=keys, hidden=hidden, ffn=ffn)
    bound = unpruned / flops
    speedup = _ratio(full.prefill_ms, variant.prefill_ms)
    prefill = Spread.of(variant.prefill_ms)
    return VariantRow(
        name=variant.name,
        method=variant.method.name if variant.method else None,
        keep=variant.method.keep if variant.method else None,
        tokens=tokens - visual + kept,
        visual=kept,
        total_ms=Spread.of(variant.total_ms),
        prefill_ms=prefill,
        decode_ms=Spread.of(variant.decode_ms) if variant.decode_ms else None,
        speedup=speedup,
        total_speedup=_ratio(full.total_ms, variant.total_ms),
        flops=flops,
        bound=bound,
        of_bound=speedup.median / bound,
        overhead_ms=prefill.median - Spread.of(full.prefill_ms).median / bound,
        scoring_ms=variant.scoring_ms,
        selection_ms=variant.selection_ms,
        memory_mb=variant.memory_mb,
        of_ideal=None if ideal is None else _ratio(ideal.prefill_ms, variant.prefill_ms),
        operators=variant.operators,
        operators_by_part=variant.by_part,
        waits=variant.waits,
    )


def _spread(samples: Sequence[float] | None) -> Spread | None:
    return Spread.of(samples) if samples else None


def _ratio(full: Sequence[float], variant: Sequence[float]) -> Spread:
    """Median over median, and its 95 % interval: rounds are drawn in pairs, slow ones together."""
    before, after = np.asarray(full), np.asarray(variant)
    middle = float(np.median(before) / np.median(after))
    if len(before) == 1:
        return Spread(middle, middle, middle, 1)
    drawn = np.random.default_rng(0).integers(len(before), size=(_DRAWS, len(before)))
    ratios = np.median(before[drawn], axis=1) / np.median(after[drawn], axis=1)
    low, high = np.quantile(ratios, (0.025, 0.975))
    return Spread(middle, float(low), float(high), len(before))


def _selection_reference(device: torch.device, dtype: torch.dtype) -> Spread:
    """The greedy search at a size to compare with: 128 of 512 candidates, 4096 wide."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(512, 4096, generator=generator, dtype=torch.float32)
    features = features.to(device, dtype)
    max_min_filter(features, 128)
    return Spread.of(
        [timing.time_ms(lambda: max_min_filter(features, 128), device) for _ in range(15)]
    )
