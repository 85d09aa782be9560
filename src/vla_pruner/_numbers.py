"""Numbers that the host knows, on a device, without waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def on_device(values: Sequence[object], device: torch.device, dtype: type = np.int64) -> Tensor:
    """Numbers, or rows of them, as a tensor; `torch.tensor(values, device=...)` would wait."""
    return torch.from_numpy(np.array(values, dtype=dtype)).to(device, non_blocking=True)
