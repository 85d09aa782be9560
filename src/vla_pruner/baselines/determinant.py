"""Choosing tokens whose similarities have a large determinant: greedy MAP of a k-DPP (CDPruner)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vla_pruner.kernels import determinant as in_c
from vla_pruner.pruning.selection import top_k

try:  # It comes with PyTorch for CUDA.
    from vla_pruner.kernels import triton_determinant as _in_triton
except ImportError:
    _in_triton = None  # type: ignore[assignment]

NOTHING_NEW = 1e-5
"""Share of a token's squared length that rounding alone can leave outside of what was chosen."""


@torch.no_grad()
def most_determinant(
    features: Tensor, k: int, *, quality: Tensor | None = None, valid: Tensor | None = None
) -> Tensor:
    """Greedy search for k tokens S with a large `det L_S`, `L_ij = q_i q_j cos(v_i, v_j)`.

    Each step takes the token that raises the determinant most. With rho_j the squared length of
    what the chosen tokens cannot make up of `v_j / |v_j|` (1 at first), that is

        argmax_j q_j^2 rho_j

    and a Cholesky factor of the chosen rows, grown by a row per step, keeps rho up to date:
    O(k^2 n) after one Gram matrix. Where `q_j^2 rho_j` is nothing (`rho_j <= NOTHING_NEW`, as for a
    twin of a chosen token, or `q_j = 0`), the determinant is 0 whatever is taken; such tokens come
    last, the largest q first.

    Args:
        features: `[B, n, D]`, compared by cosine in fp32; one of length zero is never similar.
        k: tokens to keep, 1 <= k <= n.
        quality: `[B, n]`, q >= 0, of any scale; None: 1 for all.
        valid: `[B, n]` bool, False for tokens that fill up the budget, lowest index first, only
            where fewer than k tokens are valid.

    Returns:
        `[B, k]` int64, ascending; ties go to the lowest index.

    Raises:
        ValueError: k out of range, shapes that do not fit, a quality that is negative or NaN, or
            features that are NaN or infinite (the last two are not looked for while compiling).
    """
    if features.ndim != 3:
        raise ValueError(f"features must be [B, n, D]; got {tuple(features.shape)}.")
    shape = features.shape[:2]
    for name, tensor in (("quality", quality), ("valid", valid)):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must be {tuple(shape)}; got {tuple(tensor.shape)}.")
    if quality is None:
        quality = torch.ones(shape, dtype=torch.float32, device=features.device)
    _ = top_k(quality, k)  # Refuses NaN, and a k out of range.
    if valid is None:
        valid = torch.ones(shape, dtype=torch.bool, device=features.device)
    if not torch.compiler.is_compiling() and not features.is_cuda:
        _refuse(features, quality, valid)
    return _determinant_search(features.detach(), quality.float(), valid, k).sort(dim=1).values


def _refuse(features: Tensor, quality: Tensor, valid: Tensor) -> None:
    if bool((quality.masked_fill(~valid, 0.0) < 0).any()):
        raise ValueError("quality must not be negative.")
    if not bool((features.float().square().sum(dim=-1).isfinite() | ~valid).all()):
        raise ValueError(
            "features of a candidate token are NaN or infinite (or overflow when squared); "
            "the model's visual embeddings are broken before any token is cut."
        )


# One operator, so that a compiled graph holds one node instead of k unrolled steps.
@torch.library.custom_op(
    "vla_pruner::determinant_search",
    mutates_args=(),
    schema="(Tensor features, Tensor quality, Tensor valid, int k) -> Tensor",
)
def _determinant_search(features: Tensor, quality: Tensor, valid: Tensor, k: int) -> Tensor:
    """`features` [B, n, D], `quality` fp32, `valid` bool [B, n] -> [B, k] in the order picked."""
    # Autocast would turn the fp32 product into a bf16 one.
    with torch.autocast(features.device.type, enabled=False):
        whole = features.float().masked_fill(~valid[..., None], 0.0)
        unit = torch.nn.functional.normalize(whole, dim=-1)
        cosine = unit @ unit.transpose(1, 2)
        # The scale of q changes no argmax; relative to the largest, squares neither over- nor
        # underflow where it matters.
        quality = quality.masked_fill(~valid, 0.0)
        most = quality.amax(dim=1, keepdim=True)
        quality = torch.where(most > 0, quality / torch.where(most > 0, most, 1.0), quality)
        last = torch.where(valid, quality - 2.0, -3.0)
        if features.device.type == "cpu":
            rows = zip(cosine, quality, last, strict=True)
            return torch.stack([_search_on_cpu(c, q, e, k) for c, q, e in rows])
        if features.is_cuda and _in_triton is not None and features.shape[1] <= _in_triton.LARGEST:
            return _in_triton.determinant(cosine, quality, last, k, NOTHING_NEW)
        return _search_on_device(cosine, quality, last, k)


@_determinant_search.register_fake
def _(features: Tensor, quality: Tensor, valid: Tensor, k: int) -> Tensor:
    return features.new_empty((features.shape[0], k), dtype=torch.int64)


def _search_on_device(cosine: Tensor, quality: Tensor, last: Tensor, k: int) -> Tensor:
    """Batched search of static shape, without a read-back.

    Args:
        cosine: `[B, n, n]`.
        quality: `[B, n]` in [0, 1].
        last: `[B, n]` below 0, the order of tokens that add nothing.
        k: how many.
    """
    batch, n = quality.shape
    square, rest = quality.square(), torch.ones_like(quality)
    factor = cosine.new_zeros(batch, k, n)
    taken = torch.zeros_like(quality, dtype=torch.bool)
    picks = []
    for step in range(k):
        gain = square * rest
        score = torch.where((rest > NOTHING_NEW) & (gain > 0), gain, last)
        pick = score.masked_fill(taken, float("-inf")).argmax(dim=1, keepdim=True)
        picks.append(pick)
        taken = taken.scatter(1, pick, True)
        row = cosine.gather(1, pick[..., None].expand(-1, -1, n))[:, 0]
        own = factor[:, :step].gather(2, pick[:, None].expand(-1, step, -1))  # [B, step, 1]
        row = row - (factor[:, :step] * own).sum(dim=1)
        left = rest.gather(1, pick)
        row = torch.where(left > NOTHING_NEW, row / left.clamp_min(NOTHING_NEW).sqrt(), 0.0)
        factor[:, step] = row
        rest = rest - row.square()
    return torch.cat(picks, dim=1)


def _search_on_cpu(cosine: Tensor, quality: Tensor, last: Tensor, k: int) -> Tensor:
    """One row `[n, n]`, `[n]`, `[n]`, in C where that is compiled."""
    found = in_c.determinant_search(cosine, quality, last, k, NOTHING_NEW)
    return _search_in_numpy(cosine, quality, last, k) if found is None else found


def _search_in_numpy(cosine: Tensor, quality: Tensor, last: Tensor, k: int) -> Tensor:
    """The same for one row `[n, n]`, `[n]`, `[n]`: NumPy's calls cost less at this size."""
    similar, n = cosine.numpy(), len(quality)
    square, rest = quality.numpy() ** 2, np.ones(n, dtype=np.float32)
    order = last.numpy().copy()
    factor = np.zeros((k, n), dtype=np.float32)
    alive = np.ones(n, dtype=bool)
    picks = []
    for step in range(k):
        gain = square * rest
        score = np.where(alive & (rest > NOTHING_NEW) & (gain > 0), gain, order)
        pick = int(score.argmax())
        picks.append(pick)
        alive[pick], order[pick] = False, -np.inf
        if rest[pick] > NOTHING_NEW:
            row = similar[pick] - factor[:step, pick] @ factor[:step]
            factor[step] = row / np.sqrt(rest[pick])
            rest = rest - factor[step] ** 2
    return torch.tensor(picks, dtype=torch.int64, device="cpu")


@torch.no_grad()
def text_likeness(
    features: Tensor,
    text: Tensor,
    text_valid: Tensor | None = None,
    *,
    pool: str = "mean",
) -> Tensor:
    """Cosine of each visual token with the words of the instruction, fp32 `[B, n]`.

    Args:
        features: `[B, n, D]`.
        text: `[B, T, D]`.
        text_valid: `[B, T]` bool, False for padding; a row without any word gives 0.
        pool: "mean" over words, or "max".
    """
    with torch.autocast(features.device.type, enabled=False):
        visual = torch.nn.functional.normalize(features.float(), dim=-1)
        words = torch.nn.functional.normalize(text.float(), dim=-1)
        cosine = visual @ words.transpose(1, 2)
    if text_valid is None:
        text_valid = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
    there = text_valid[:, None].expand_as(cosine)
    if pool == "max":
        found = cosine.masked_fill(~there, -2.0).amax(dim=2)
        return torch.where(there.any(dim=2), found, 0.0)
    return (cosine * there).sum(dim=2) / there.sum(dim=2).clamp_min(1)


@torch.no_grad()
def stretched(
    score: Tensor, valid: Tensor | None = None, *, least: float = 0.0, alike: float = 1.0
) -> Tensor:
    """Scores `[B, n]`, min-max scaled among the valid: `(s - min + least) / (max - min)`, fp32.

    `alike` for all where all are the same; 0 for the invalid.

    Raises:
        ValueError: NaN among the scores.
    """
    score = score.float()
    _ = top_k(score, 1)  # Refuses NaN.
    there = torch.ones_like(score, dtype=torch.bool) if valid is None else valid
    low = score.masked_fill(~there, float("inf")).amin(dim=1, keepdim=True)
    high = score.masked_fill(~there, float("-inf")).amax(dim=1, keepdim=True)
    span = high - low
    apart = span > 0
    scaled = torch.where(apart, (score - low + least) / torch.where(apart, span, 1.0), alike)
    return torch.where(there, scaled, 0.0)
