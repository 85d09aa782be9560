"""Floating-point operations of a call, counted while it runs; the paper's formula counts less.

The formula (Eq. 10 to 12) knows the decoder's projections and attention. Counted is what torch ran:
scores and the search's products too, and towers, projector and head beside the decoder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from vla_pruner.kernels import native


@dataclass(frozen=True)
class Flops:
    """Of one call, a multiplication and an addition counted as two.

    Args:
        call: of the whole call.
        decoder: of the decoder's passes within it.
    """

    call: int
    decoder: int


def count_flops(run: Callable[[], Any], decoder: nn.Module) -> Flops:
    """What one call runs.

    Args:
        run: makes the call.
        decoder: the stack whose passes are also counted alone.
    """
    counter = FlopCounterMode(display=False, custom_mapping=_custom())
    seen: list[int] = []
    hooks = [
        decoder.register_forward_pre_hook(lambda *_: seen.append(-counter.get_total_flops())),
        decoder.register_forward_hook(lambda *_: seen.append(counter.get_total_flops())),
    ]
    try:
        with counter, native.by_operators():  # what runs in C would not be seen
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return Flops(counter.get_total_flops(), sum(seen))


def _custom() -> dict[Any, Any]:
    """Kernels that torch does not count by itself: attention on a CPU."""

    def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)

    return {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}
