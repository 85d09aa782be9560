"""All scoring and choosing of every method is timed, whatever its functions are called."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import vla_pruner as vp
from toy_task import tiny_policy
from vla_pruner.measure import parts
from vla_pruner.measure.comparison import compare
from vla_pruner.measure.parts import SCORING, SELECTION, Parts, measure_parts
from vla_pruner.measure.workloads import build_workload
from vla_pruner.methods import Evidence, OneCut, build
from vla_pruner.pruning import received, scores

CPU = torch.device("cpu")
OBSERVATION = {
    "images": [torch.zeros(40, 40, 3, dtype=torch.uint8).numpy()] * 2,
    "instruction": "pick up the cup",
    "proprio": [0.0] * 8,
}
SCORES = {
    "fastv": "column_mean",
    "vla-pruner": "column_mean",
    "vla-adp": "logit_column_mean",
    "divprune": None,
    "random": None,
}


@pytest.fixture(scope="module")
def workload() -> Any:
    return build_workload("mini-oft", layers=None, vision=True, dtype=None, device=CPU)


FEW = ("fastv", "vla-pruner", "vla-cache", "hiprune", "fitprune")
"""Methods that score, remember, reuse, look into the tower, or need a recipe."""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in FEW else pytest.mark.slow)
        for name in vp.list_methods()
        if name not in ("none", "fixed", "prefix-reuse")
    ],
)
def test_every_method_is_measured_with_what_it_asks_for(name: str, workload: Any) -> None:
    """Its own layer and recipe, and a step that drops tokens, also where some do not."""
    full, row = compare(workload, [build(name, keep=0.25)], repeats=1).rows
    assert (full.scoring_ms, full.selection_ms) == (None, None)
    assert row.selection_ms is not None and row.selection_ms.count == 3
    method = build(name, keep=0.25)
    layer = getattr(method, "layer", 0) or 1
    asks = bool(method.scores(layer)) or method.history is not None
    assert (row.scoring_ms is not None) == (
        asks or name in ("fitprune", "hiprune", "vla-cache", "vla-iap")
    )
    assert row.visual < full.visual


@pytest.mark.parametrize("name", list(SCORES))
def test_functions_that_score_are_found_by_running_a_step(name: str) -> None:
    policy = tiny_policy()
    options = {"gate": "none"} if name == "vla-adp" else {"layer": 2}
    with vp.prune(policy, name, keep=0.5, **options) as session:
        clock = Parts(session.method, CPU)
        for _ in range(4):
            clock.discover(lambda: policy.predict_action(**OBSERVATION))
    scoring = {qualname for (_, qualname), part in clock._found.items() if part == SCORING}
    assert SCORES[name] is None or SCORES[name] in scoring
    chosen = [qualname for (_, qualname), part in clock._found.items() if part == SELECTION]
    assert any(qualname.endswith((".select", ".choose")) for qualname in chosen)


def test_everything_is_put_back() -> None:
    policy = tiny_policy()
    before = scores.attention_rows, received.column_max, vars(OneCut)["select"]
    with vp.prune(policy, "fastv", keep=0.5, layer=2) as session:
        clock = Parts(session.method, CPU)
        clock.discover(lambda: policy.predict_action(**OBSERVATION))
        with pytest.raises(KeyboardInterrupt), clock.timed() as take:
            assert vars(OneCut)["select"] is not before[2]
            policy.predict_action(**OBSERVATION)
            assert set(take()) == {SCORING, SELECTION}
            assert take() == {}
            raise KeyboardInterrupt
    after = scores.attention_rows, received.column_max, vars(OneCut)["select"]
    assert all(a is b for a, b in zip(before, after, strict=True))


@dataclass(frozen=True, kw_only=True)
class Own(OneCut):
    """A method of another package."""

    name: ClassVar[str] = "own"
    summary: ClassVar[str] = "the first tokens"

    def choose(self, evidence: Evidence, k: int) -> Tensor:
        """The first k."""
        return _first(evidence.features, k)


def _first(features: Tensor, k: int) -> Tensor:
    return torch.arange(k).expand(features.shape[0], k)


def test_a_method_of_another_package_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One clock that ticks at every look: a call that is timed takes one tick."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(parts.time, "perf_counter", lambda: 1e-3 * next(ticks))
    policy, full = tiny_policy(), iter([False, True] * 9)

    def step() -> None:
        policy.predict_action(**OBSERVATION)

    with vp.prune(policy, Own(keep=0.5, layer=2)) as session:
        found = measure_parts(session.method, step, CPU, dropped=lambda: next(full), repeats=3)
        clock = Parts(session.method, CPU)
        clock.discover(step)
    found = found.ms
    assert set(found) == {SELECTION} and len(found[SELECTION]) == 3
    # Each timed call takes one tick, and what it calls inside is not counted again.
    outer = found[SELECTION][0]
    assert outer == pytest.approx(round(outer)) and outer >= 1
    assert len(set(map(round, found[SELECTION]))) == 1
    assert not any(qualname == "_first" for _, qualname in clock._found)
