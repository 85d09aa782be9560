"""The loop of the determinant search on the CPU in C; `baselines.determinant` has it twice more."""

from __future__ import annotations

import torch
from torch import Tensor

from vla_pruner.kernels import native


def determinant_search(
    cosine: Tensor, quality: Tensor, last: Tensor, k: int, nothing: float
) -> Tensor | None:
    """k tokens that make the determinant large, greedily.

    Args:
        cosine: `[n, n]` fp32.
        quality: `[n]` fp32, in [0, 1].
        last: `[n]` fp32 below 0, the order of tokens that add nothing.
        k: 1 <= k <= n.
        nothing: share of a token's squared length that counts as none.

    Returns:
        `[k]` int64, in the order picked; None where nothing is compiled.

    Raises:
        ValueError: shapes that do not fit together, or k out of range.
    """
    n = len(quality)
    if cosine.shape != (n, n) or last.shape != (n,) or not 1 <= k <= n:
        raise ValueError(
            f"`cosine` must be [n, n], `quality` and `last` [n] and k in 1..n; got "
            f"{tuple(cosine.shape)}, {tuple(quality.shape)}, {tuple(last.shape)} and k={k}."
        )
    library = native.reading(cosine, quality, last)
    if library is None:
        return None
    given = [tensor.float().contiguous() for tensor in (cosine, quality, last)]
    memory = native.memory(library.determinant_words(n, k))
    picks = torch.empty(k, dtype=torch.int64, device="cpu")
    pointers = [tensor.data_ptr() for tensor in given]
    done = library.determinant_search(*pointers, n, k, nothing, memory.data_ptr(), picks.data_ptr())
    assert done, "the search in C looks at the same bounds"
    return picks
