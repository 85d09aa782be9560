"""VTW: from some layer on, no visual token at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vla_pruner.methods.base import Evidence
from vla_pruner.methods.recipe import CalibratedMethod, Recipe


@dataclass(frozen=True, kw_only=True)
class VTW(CalibratedMethod):
    """Withdraw all M visual tokens before layer K; layers 0..K-1 see all of them.

    What the visual tokens say has moved into the text by then, is the idea. K is the first layer
    whose withdrawal changes the output by no more than eta, on recorded observations:

        K = min { K : mean over observations of D(full, withdrawn before K) <= eta }

    with D the Kullback-Leibler divergence of the last logits, or, for policies whose actions come
    from a regression head, the mean absolute difference of actions. `vla-pruner calibrate vtw`
    searches it; with `--keep R` it takes instead the last K that costs no more than one cut to a
    share R of the visual tokens before layer 3.

    Args:
        keep: budget that the recipe was made for; unused if it was made for none, or if `layer` is
            given.
        layer: K; 0: the recipe says.
        recipe: see `CalibratedMethod`; its values are `{"layer": K, ...}`.

    Reference: Lin et al., "Boosting Multimodal Large Language Models with Visual Tokens Withdrawal
    for Rapid Inference", AAAI 2025.

    Differences: the public search starts at layer 5; ours at layer 1, as decoders of 8 layers
    exist. The divergence of actions, and K by budget, are ours: the source writes text.
    """

    name: ClassVar[str] = "vtw"
    summary: ClassVar[str] = "all visual tokens, then none, from a calibrated layer on"
    paper: ClassVar[str | None] = "https://arxiv.org/abs/2405.05803"
    licence: ClassVar[str] = "Apache-2.0 (public code: no licence, not used)"

    layer: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer and self.recipe is not None:
            raise ValueError(f"give `layer={self.layer}` or a recipe, not both.")

    @property
    def wants_recipe(self) -> bool:
        """Unless the layer is given."""
        return self.layer == 0 and self.recipe is None

    def read(self, recipe: Recipe) -> int:
        """K, from `{"layer": K}`."""
        layer = recipe.values.get("layer")
        if isinstance(layer, bool) or not isinstance(layer, int) or layer < 1:
            raise ValueError(f"the recipe's `layer` must be an integer of at least 1; got {layer}.")
        return layer

    def cuts(self, num_layers: int) -> tuple[int, ...]:
        """`(K,)`."""
        layer = self.layer or self.read(self.given())
        if layer >= num_layers:
            raise ValueError(
                f"`layer={layer}` withdraws nothing: the decoder has {num_layers} layers; use at "
                f"most {num_layers - 1}."
            )
        return (layer,)

    def kept(self, views: tuple[int, ...]) -> int:
        """0."""
        return 0

    def schedule(self, views: tuple[int, ...], num_layers: int) -> tuple[int, ...]:
        """`(0,)`."""
        return (0,)

    def select(self, evidence: Evidence) -> Tensor:
        """Nothing: `[B, 0]`."""
        evidence.check(self.name)
        features = evidence.features
        return torch.empty(features.shape[0], 0, dtype=torch.int64, device=features.device)
