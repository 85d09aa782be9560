"""Numbers that the host knows, on a device, without waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def on_device(
    values: Sequence[object], device: torch.device, dtype: torch.dtype = torch.int64
) -> Tensor:
    """Numbers, or rows of them, as a tensor; `torch.tensor(values, device=...)` would wait."""
    return torch.tensor(values, dtype=dtype, device="cpu").to(device, non_blocking=True)
