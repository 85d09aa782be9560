"""FitPrune's search: how many visual tokens each layer may lose for a given cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from vla_pruner.calibration.calls import Call, Observation, Tick, caller, require_observations
from vla_pruner.calibration.cost import cost_share
from vla_pruner.core.session import Session
from vla_pruner.methods.base import Evidence, Method, ScoreSpec
from vla_pruner.methods.fitprune import FitPrune
from vla_pruner.models.base import Adapter


@dataclass(frozen=True)
class Plan:
    """What the search found.

    Args:
        left: visual tokens of each of the T layers.
        alpha: share of received attention that may be lost.
        share: cost of the visual tokens, over that of all of them in every layer.
    """

    left: tuple[int, ...]
    alpha: float
    share: float


@dataclass(frozen=True, kw_only=True)
class _Watch(Method):
    """Cuts before every layer, keeps everything, and writes down the scores that FitPrune reads."""

    name: ClassVar[str] = "fitprune-watch"
    summary: ClassVar[str] = "reads received attention in every layer"

    first: int = 1
    sink: Callable[[int, Mapping[str, Tensor]], None] = field(compare=False)

    @property
    def needs(self) -> tuple[str, ...]:
        return ("text",)

    def cuts(self, num_layers: int) -> tuple[int, ...]:
        return tuple(range(self.first, num_layers))

    def schedule(self, views: tuple[int, ...], num_layers: int) -> tuple[int, ...]:
        return (sum(views),) * (num_layers - self.first)

    def kept(self, views: tuple[int, ...]) -> int:
        return sum(views)

    def scores(self, cut: int) -> Mapping[str, ScoreSpec]:
        return FitPrune().scores(cut)

    def select(self, evidence: Evidence) -> Tensor:
        self.sink(evidence.layer, evidence.scores)
        batch, size = evidence.features.shape[:2]
        return torch.arange(size, device=evidence.features.device).expand(batch, size)


def received_attention(
    model: nn.Module,
    adapter: Adapter,
    observations: Sequence[Observation],
    *,
    call: Call | None = None,
    tick: Tick = lambda: None,
) -> tuple[Tensor, Tensor]:
    """Cross and self attention that visual tokens receive in each layer of an unpruned model.

    Args:
        model: a model without a session.
        adapter: its adapter.
        observations: inputs of `call`, one sequence each.
        call: see `calibration.calls.caller`.
        tick: called after each observation.

    Returns:
        Two tensors `[N, T - 1, M]` fp64, of layers 0..T-2, N observations; NaN in layers that are
        too early to cut behind.

    Raises:
        ValueError: no observations, or observations with different numbers of visual tokens.
    """
    require_observations(observations)
    call = call or caller(model)
    heard: dict[int, Mapping[str, Tensor]] = {}

    def sink(cut: int, scores: Mapping[str, Tensor]) -> None:
        if cut not in heard:
            heard[cut] = {name: score[0].double().cpu() for name, score in scores.items()}

    cross: list[Tensor] = []
    own: list[Tensor] = []
    adapter.bind(model)
    depth, first = len(adapter.layers), max(1, adapter.earliest_cut)
    with Session(model, _Watch(sink=sink, first=first), adapter, mode="drop") as session:
        for observation in observations:
            heard.clear()
            session.reset()
            call(observation)
            if not heard:
                raise ValueError("no image reached the decoder; run `vla-pruner doctor` on it.")
            unknown = torch.full_like(heard[first]["cross"], float("nan"))
            for name, rows in (("cross", cross), ("self", own)):
                layers = [heard[c][name] if c in heard else unknown for c in range(1, depth)]
                rows.append(torch.stack(layers))
            tick()
    sizes = {rows.shape[1] for rows in cross}
    if len(sizes) > 1:
        raise ValueError(f"observations have {sorted(sizes)} visual tokens; use one kind of image.")
    return torch.stack(cross), torch.stack(own)


def losses(cross: Tensor, own: Tensor, alpha: float) -> list[int]:
    """Tokens that may leave behind each layer, if a share `alpha` of both attentions may be lost.

    Layer by layer and for each observation: of the tokens that are left, those with the smallest
    cross attention leave, as many as can go while the rest still holds `1 - alpha` of what all M
    tokens received in that layer; the same for self attention; a token leaves if both say so. The
    count is the mean over observations, rounded down.

    Args:
        cross, own: `[N, L, M]`, see `received_attention`; layers with NaN lose nothing.
        alpha: in [0, 1].

    Returns:
        L numbers; they sum to at most M.
    """
    count, layers, size = cross.shape
    left = torch.ones(count, size, dtype=torch.bool)
    lost = []
    for layer in range(layers):
        if bool(cross[:, layer].isnan().any()):
            lost.append(0)
            continue
        leaves = _smallest(cross[:, layer], left, alpha) & _smallest(own[:, layer], left, alpha)
        left &= ~leaves
        lost.append(int(leaves.sum()) // count)
    return lost


def _smallest(mass: Tensor, left: Tensor, alpha: float) -> Tensor:
    """Largest set of smallest tokens whose loss keeps `1 - alpha` of the mass: bool `[N, M]`."""
    mass = mass.double()
    everything = mass.sort(dim=1, stable=True).values.cumsum(dim=1)[:, -1:]
    order = mass.masked_fill(~left, float("inf")).sort(dim=1, stable=True).indices
    here = left.gather(1, order)
    gone = torch.where(here, mass.gather(1, order), 0.0).cumsum(dim=1)
    may_go = here & (gone[:, -1:] - gone >= everything * (1.0 - alpha))
    return torch.zeros_like(left).scatter(1, order, may_go)


def plan(
    cross: Tensor, own: Tensor, share: float, *, hidden: int, ffn: int, tolerance: float = 0.01
) -> Plan:
    """The smallest loss of attention that brings the visual tokens' cost under a budget.

    Binary search over alpha in [0, 1]; the cost is that of `calibration.cost.cost_share`.

    Args:
        cross, own: `[N, T - 1, M]`, see `received_attention`.
        share: largest cost, as a share of that of all M tokens in all T layers.
        hidden, ffn: widths of the decoder and of its feed-forward network.
        tolerance: how closely alpha is searched.

    Raises:
        ValueError: a budget outside (0, 1], or below what the layers that see all tokens cost.
    """
    if isinstance(share, bool) or not 0.0 < share <= 1.0:
        raise ValueError(f"`share={share}` of the cost must lie in (0, 1].")
    size = cross.shape[2]

    def attempt(alpha: float) -> Plan:
        left = [size]
        for lost in losses(cross, own, alpha):
            left.append(left[-1] - lost)
        return Plan(tuple(left), alpha, cost_share(left, hidden=hidden, ffn=ffn))

    low, best = 0.0, attempt(1.0)
    if best.share > share:
        raise ValueError(
            f"{share:.3f} of the visual tokens' cost is out of reach: {best.share:.3f} is spent "
            "before the first token can leave; keep more."
        )
    nothing_lost = attempt(0.0)
    if nothing_lost.share <= share:
        return nothing_lost
    while best.alpha - low > tolerance:
        tried = attempt((low + best.alpha) / 2)
        if tried.share <= share:
            best = tried
        else:
            low = tried.alpha
    return best
