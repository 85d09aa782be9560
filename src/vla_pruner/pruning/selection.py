"""Choosing which visual tokens stay: top-k, and a greedy max-min search (Algorithms 1 and 2)."""

from __future__ import annotations

import ctypes
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from vla_pruner import _flags as flags
from vla_pruner.kernels import native

try:  # It comes with PyTorch for CUDA.
    from vla_pruner.kernels import triton_search as _greedy
except ImportError:
    _greedy = None  # type: ignore[assignment]

First = Literal["second-nearest", "nearest"]


@torch.no_grad()
def top_k(scores: Tensor, k: int, *, valid: Tensor | None = None) -> Tensor:
    """Indices of the k largest scores, compared in fp32 or fp64; ties go to the lowest index.

    Args:
        scores: `[..., n]`.
        k: how many, 1 <= k <= n.
        valid: `[..., n]` bool; False comes after everything else, lowest index first.

    Returns:
        `[..., k]` int64, ascending.

    Raises:
        ValueError: k out of range, or a NaN among the scores (not looked for while compiling).
    """
    _check_k(k, scores.shape[-1])
    scores = scores if scores.dtype == torch.float64 else scores.float()
    library = _in_c(scores, valid)
    if library is not None:
        return native.top_k(library, scores, k, valid)
    if valid is not None:
        scores = scores.masked_fill(~valid, float("-inf"))
    if flags.may_read(scores):
        flags.refuse(scores.isnan().any(), native.BROKEN_SCORES)
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    return order[..., :k].sort(dim=-1).values


@torch.no_grad()
def max_min_filter(
    features: Tensor,
    k: int,
    *,
    candidates: Tensor | None = None,
    first: First = "second-nearest",
) -> Tensor:
    """Greedy max-min search for k dissimilar tokens (Algorithm 1), cosine distance, fp32.

    Each step takes the token whose nearest chosen token is farthest; ties go to the lowest index.
    A running minimum makes the search itself O(k n) after one Gram matrix. A feature of length zero
    has distance 1 to all others. On a GPU the Gram matrix is fp32 as long as TF32 is not switched
    on globally.

    Args:
        features: `[n, d]` or `[B, n, d]`, any floating dtype.
        k: how many, 1 <= k <= number of candidates.
        candidates: the tokens to choose from: bool `[n]` or `[B, n]`, or int64 indices `[m]` or
            `[B, m]`; None: all.
        first: which token starts: the one whose second-nearest other candidate is farthest (the
            paper), or the one whose nearest is ("nearest", the public release).

    Returns:
        `[k]` or `[B, k]` int64, in the order picked.

    Raises:
        ValueError: k out of range, fewer candidates than k, or candidates with features that are
            NaN or infinite (the last two are not looked for while compiling on a GPU).
    """
    _check_first(first)
    if features.ndim not in (2, 3):
        raise ValueError(f"features must be [n, d] or [B, n, d]; got {tuple(features.shape)}.")
    batched = features if features.ndim == 3 else features[None]
    size = batched.shape[1]
    _check_k(k, size)
    mask = _candidate_mask(candidates, batched)
    if features.is_cuda and flags.may_read(features):
        _check_candidates(batched, mask, k)
    chosen = _max_min_search(batched.detach(), mask, k, first == "nearest")
    return chosen if features.ndim == 3 else chosen[0]


@torch.no_grad()
def combine_then_filter(
    features: Tensor,
    semantic: Tensor,
    action: Tensor | None,
    k: int,
    first: First = "second-nearest",
    valid: Tensor | None = None,
) -> Tensor:
    """Dual-level selection (Algorithm 2): pool the top k of both scores, keep the k most diverse.

    Args:
        features: `[n, d]` or `[B, n, d]`, visual embeddings as they enter layer 0.
        semantic: `[n]` or `[B, n]`, prefill score.
        action: like `semantic`, forecast of the action score; None leaves the top k of `semantic`.
        k: how many stay, 1 <= k <= n.
        first: see `max_min_filter`.
        valid: bool, like `semantic`; False for tokens that are candidates of nothing. They fill up
            the budget, lowest index first, only where fewer than k tokens are valid.

    Returns:
        `[k]` or `[B, k]` int64, ascending.

    Raises:
        ValueError: k out of range, shapes that do not fit, NaN scores, or NaN or infinite features
            among the pooled tokens (see `top_k` and `max_min_filter`).
    """
    size = features.shape[:-1]
    for name, scores in (("semantic", semantic), ("action", action), ("valid", valid)):
        if scores is not None and scores.shape != size:
            raise ValueError(
                f"{name} must be {tuple(size)} to match the features; got {tuple(scores.shape)}."
            )
    if action is None or k == size[-1]:
        return top_k(semantic, k, valid=valid)
    _check_k(k, size[-1])
    _check_first(first)
    return combine(features, semantic, action, k, first, valid)


@torch.no_grad()
def combine(
    features: Tensor, semantic: Tensor, action: Tensor, k: int, first: First, valid: Tensor | None
) -> Tensor:
    """`combine_then_filter` of shapes that fit, with 1 <= k < n."""
    if torch.compiler.is_compiling() or not features.is_cpu:
        return _combine_as_node(features, semantic, action, k, first, valid)
    library = _in_c(semantic, valid, action, features)
    if library is not None:
        nearest = first == "nearest"
        return native.combine_then_filter(library, features, semantic, action, valid, k, nearest)
    return _combine_by_operators(features, semantic, action, k, first, valid)


def _combine_as_node(
    features: Tensor, semantic: Tensor, action: Tensor, k: int, first: First, valid: Tensor | None
) -> Tensor:
    """`combine_then_filter` as one operator: of a graph, or of a step that waits for no device."""
    given = (semantic, action, features, valid)
    batched = (one if one is None or features.ndim == 3 else one[None] for one in given)
    kept, broken = _combine_node(*batched, k, first == "nearest")
    if flags.may_read(broken):
        flags.refuse(broken[0], native.BROKEN_SCORES)
        flags.refuse(broken[1], native.BROKEN_FEATURES)
    return kept if features.ndim == 3 else kept[0]


def _combine_by_operators(
    features: Tensor,
    semantic: Tensor,
    action: Tensor,
    k: int,
    first: First,
    valid: Tensor | None,
) -> Tensor:
    """`combine_then_filter` as its parts."""
    best = top_k(semantic, k, valid=valid)
    pool = torch.zeros(semantic.shape, dtype=torch.bool, device=semantic.device)
    pool = pool.scatter(-1, best, True).scatter(-1, top_k(action, k, valid=valid), True)
    chosen = max_min_filter(features, k, candidates=pool.to(features.device), first=first)
    return chosen.sort(dim=-1).values


# One operator, so that a compiled graph holds one node: C on the CPU, Triton on a GPU.
@torch.library.custom_op(
    "vla_pruner::combine_then_filter",
    mutates_args=(),
    schema="(Tensor semantic, Tensor action, Tensor features, Tensor? valid, int k, bool nearest) "
    "-> (Tensor, Tensor)",
)
def _combine_node(
    semantic: Tensor, action: Tensor, features: Tensor, valid: Tensor | None, k: int, nearest: bool
) -> tuple[Tensor, Tensor]:
    """`[B, k]` as `combine_then_filter`; whether scores or features are broken, bool `[2]`."""
    small = features.shape[1] <= (0 if _greedy is None else _greedy.LARGEST)
    if features.is_cuda and _greedy is not None and small:
        with torch.autocast("cuda", enabled=False):
            return _greedy.choose(semantic, action, features, valid, k, nearest)
    first: First = "nearest" if nearest else "second-nearest"
    choose = combine if features.is_cpu else _combine_by_operators
    kept = choose(features, semantic, action, k, first, valid)
    return kept, torch.zeros(2, dtype=torch.bool, device=kept.device)


@_combine_node.register_fake
def _(
    semantic: Tensor, action: Tensor, features: Tensor, valid: Tensor | None, k: int, nearest: bool
) -> tuple[Tensor, Tensor]:
    kept = features.new_empty((features.shape[0], k), dtype=torch.int64)
    return kept, features.new_empty((2,), dtype=torch.bool)


# One operator, so that a compiled graph holds one node instead of k unrolled steps.
@torch.library.custom_op(
    "vla_pruner::max_min_search",
    mutates_args=(),
    schema="(Tensor features, Tensor candidates, int k, bool nearest) -> Tensor",
)
def _max_min_search(features: Tensor, candidates: Tensor, k: int, nearest: bool) -> Tensor:
    """`features` [B, n, d], `candidates` bool [B, n] -> [B, k] in the order picked."""
    # Autocast would turn the fp32 product into a bf16 one.
    with torch.autocast(features.device.type, enabled=False):
        if features.device.type == "cpu":
            rows = [
                _search_on_cpu(row, mask, k, nearest)
                for row, mask in zip(features, candidates, strict=True)
            ]
            return torch.stack(rows)
        return _search_on_device(features, candidates, k, nearest)


@_max_min_search.register_fake
def _(features: Tensor, candidates: Tensor, k: int, nearest: bool) -> Tensor:
    return features.new_empty((features.shape[0], k), dtype=torch.int64)


def _search_on_device(features: Tensor, candidates: Tensor, k: int, nearest: bool) -> Tensor:
    """Batched search of static shape, without a read-back: fit for CUDA graphs."""
    features = features.float().masked_fill(~candidates[..., None], 0.0)
    unit = torch.nn.functional.normalize(features, dim=-1)
    distance = 1.0 - unit @ unit.transpose(1, 2)
    others = distance.masked_fill(~candidates[:, None], float("inf"))
    others.diagonal(dim1=1, dim2=2).fill_(float("inf"))
    score = others.amin(dim=-1) if nearest else _second_smallest(others)
    if features.is_cuda and _greedy is not None and features.shape[1] <= _greedy.LARGEST:
        return _greedy.greedy(distance, score, candidates, k)
    return _greedy_by_operators(distance, score, candidates, k)


def _greedy_by_operators(distance: Tensor, score: Tensor, candidates: Tensor, k: int) -> Tensor:
    """The k steps of the search: `[B, k]`; four operators each."""
    best = torch.full_like(score, float("inf")).masked_fill_(~candidates, float("-inf"))
    pick = score.masked_fill(~candidates, float("-inf")).argmax(dim=1, keepdim=True)
    picks = [pick]
    for _ in range(k - 1):
        row = distance.gather(1, pick[..., None].expand(-1, -1, distance.shape[2]))[:, 0]
        best = torch.minimum(best, row).scatter_(1, pick, float("-inf"))
        pick = best.argmax(dim=1, keepdim=True)
        picks.append(pick)
    return torch.cat(picks, dim=1)


def _search_on_cpu(features: Tensor, candidates: Tensor, k: int, nearest: bool) -> Tensor:
    """Search for one row: features [n, d], candidates bool [n] -> [k]."""
    index = candidates.nonzero().squeeze(1)
    if k > len(index):
        raise ValueError(_TOO_FEW.format(k=k, count=len(index)))
    if features.dtype not in (torch.float32, torch.bfloat16):
        features = features.float()
    found = native.max_min_search(features, index, k, nearest)
    picks, length = found or _search_in_numpy(features, index, k, nearest)
    if not torch.isfinite(length).all():
        raise ValueError(native.BROKEN_FEATURES)
    return index[picks]


def _search_in_numpy(
    features: Tensor, index: Tensor, k: int, nearest: bool
) -> tuple[Tensor, Tensor]:
    """What `native.max_min_search` does.

    The k steps run in NumPy, whose calls cost a fraction of PyTorch's at this size.
    """
    count, length = len(index), native.lengths(features, index)
    unit = features.index_select(0, index).float() / length[:, None]
    rows = (1.0 - unit @ unit.T).numpy()
    np.fill_diagonal(rows, np.inf)
    score = rows.min(axis=1)
    if not nearest and count > 1:  # The second smallest: set the smallest aside for a moment.
        smallest = np.arange(count), rows.argmin(axis=1)
        rows[smallest] = np.inf
        second = rows.min(axis=1)
        rows[smallest], score = score, second
    best = np.full(count, np.inf, dtype=np.float32)
    pick = int(score.argmax())
    picks = [pick]
    for _ in range(k - 1):
        np.minimum(best, rows[pick], out=best)
        best[pick] = -np.inf
        pick = int(best.argmax())
        picks.append(pick)
    return torch.tensor(picks, dtype=torch.int64, device="cpu"), length


def _in_c(scores: Tensor, *others: Tensor | None) -> ctypes.CDLL | None:
    """What looks at these in C: on the CPU, not fp64 scores, and not by a compiler's tracing."""
    wide = any(one is not None and one.dtype == torch.float64 for one in (scores, *others[:2]))
    return None if wide or torch.compiler.is_compiling() else native.reading(scores, *others)


def _second_smallest(distance: Tensor) -> Tensor:
    """Second smallest entry of each row `[..., n, n]` -> `[..., n]`; inf where n is 1."""
    if distance.shape[-1] == 1:
        return distance[..., 0]
    return distance.topk(2, dim=-1, largest=False).values[..., 1]


def _candidate_mask(candidates: Tensor | None, features: Tensor) -> Tensor:
    """Bool `[B, n]` from whatever form the candidates came in."""
    batch, size = features.shape[:2]
    mask = torch.zeros(batch, size, dtype=torch.bool, device=features.device)
    if candidates is None:
        return ~mask
    candidates = candidates.to(features.device)
    if candidates.dtype == torch.bool:
        if candidates.shape[-1] != size:
            raise ValueError(
                f"a bool `candidates` must have one entry for each of the {size} tokens; "
                f"got {tuple(candidates.shape)}."
            )
        return candidates.expand(batch, size)
    return mask.scatter(1, candidates.expand(batch, candidates.shape[-1]), True)


def _check_first(first: str) -> None:
    if first not in ("second-nearest", "nearest"):
        raise ValueError(f'`first={first!r}` is unknown; use "second-nearest" or "nearest".')


def _check_k(k: int, size: int) -> None:
    if not 1 <= k <= size:
        raise ValueError(f"`k={k}` must lie in 1..{size}, the number of tokens.")


def _check_candidates(features: Tensor, mask: Tensor, k: int) -> None:
    """What the search on the CPU checks as it goes, for a search that never reads back."""
    squared = features.float().square().sum(dim=-1)
    flags.refuse(~(torch.isfinite(squared) | ~mask).all(), native.BROKEN_FEATURES)
    flags.refuse((mask.sum(dim=1) < k).any(), f"`k={k}` asks for more than there are candidates.")


_TOO_FEW = "`k={k}` asks for more than the {count} candidates."
