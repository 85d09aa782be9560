"""Scores and the search of Algorithms 1 and 2 on the CPU, in C: one call instead of many operators.

Where the C sources are not compiled, `scores.py` and `selection.py` of `pruning/` do the same with
PyTorch's operators, which are the reference.
"""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from vla_pruner.kernels import compiled
from vla_pruner.kernels.compiled import Unavailable

_POINTER, _INT, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_float
_FUNCTIONS: dict[str, tuple[list[Any], Any]] = {
    "reads_bf16": ([], _INT),
    "memory_words": ([_LONG], _LONG),
    "choice_words": ([_LONG, _LONG], _LONG),
    "max_min_search": (
        [*[_POINTER] * 3, *[_LONG] * 4, _INT, _LONG, _INT, _INT, *[_POINTER] * 2],
        _INT,
    ),
    "top_k": ([*[_POINTER] * 2, *[_LONG] * 2, *[_POINTER] * 2], _INT),
    "combine_then_filter": (
        [*[_POINTER] * 5, *[_LONG] * 3, _INT, _LONG, _INT, _INT, *[_POINTER] * 2],
        _INT,
    ),
    "determinant_words": ([_LONG, _LONG], _LONG),
    "determinant_search": ([*[_POINTER] * 3, _LONG, _LONG, _FLOAT, *[_POINTER] * 2], _INT),
    "column_mean_words": ([_POINTER], _LONG),
    "column_mean": ([_POINTER], _INT),
}

# Words of memory that a thread keeps for its next call: fetching new pages can take longer than
# the work. Enough for 4,000 candidates, 64 MiB.
_KEPT = 1 << 24

_READABLE = (torch.float32, torch.bfloat16)

_calls = [0]
_held_back: list[bool] = []

BROKEN_SCORES = "scores contain NaN; a row of attention was fully masked or the model overflowed."
BROKEN_FEATURES = (
    "features of a candidate token are NaN or infinite (or overflow when squared); "
    "the model's visual embeddings are broken before any token is cut."
)


class _Attention(ctypes.Structure):
    """`struct attention` of column_mean.c."""

    _fields_ = (
        *((name, _POINTER) for name in ("query", "key", "mask", "sinks", "weight")),
        *((name, _POINTER) for name in ("rows", "columns", "memory", "received")),
        *((name, _LONG) for name in ("batch", "heads", "kv_heads", "queries")),
        *((name, _LONG) for name in ("keys", "width", "voting", "asked")),
        *((name, _LONG * 3) for name in ("query_stride", "key_stride", "mask_stride")),
        *((name, _FLOAT) for name in ("scale", "softcap", "hidden_below")),
        *((name, _INT) for name in ("bf16", "mask_kind", "causal", "threads")),
    )


_IN_C = (torch.float32, torch.bfloat16, torch.float16)
_wrapped = torch._C._functorch.is_functorch_wrapped_tensor  # By `torch.func.grad`, `torch.vmap`.
_MASKS = {None: 0, torch.bool: 1, torch.float32: 2, torch.bfloat16: 3}


class _Memory(threading.local):
    """What one thread computes in."""

    words = torch.empty(0, dtype=torch.int32, device="cpu")

    def get(self, count: int) -> Tensor:
        if count > _KEPT:
            return torch.empty(count, dtype=torch.int32, device="cpu")
        if count > len(self.words):
            self.words = torch.empty(count, dtype=torch.int32, device="cpu")
        return self.words


_memory = _Memory()


def state() -> str:
    """Whether scores and search are compiled on this machine, for people."""
    return _library()[1]


def calls() -> int:
    """Calls into C so far, of all threads."""
    return _calls[0]


@contextmanager
def by_operators() -> Iterator[None]:
    """PyTorch's operators do all of it within the block, so that they can be counted."""
    _held_back.append(True)
    try:
        yield
    finally:
        _held_back.pop()


def reading(*tensors: Tensor | None) -> ctypes.CDLL | None:
    """What is compiled, for one call, if C can read these: plain tensors on the CPU, or None."""
    library = None if _held_back else _library()[0]
    if library is None or not all(one is None or _has_memory(one) for one in tensors):
        return None
    _calls[0] += 1
    return library


def _has_memory(one: Tensor) -> bool:
    return type(one) is Tensor and one.device.type == "cpu" and not _wrapped(one)


# -- choosing ------------------------------------------------------------------------------------


def lengths(features: Tensor, index: Tensor) -> Tensor:
    """Length of some features `[n, d]`, fp32 `[m]`: what a cosine divides by, never zero."""
    length = torch.linalg.vector_norm(features, dim=1, dtype=torch.float32)
    return length.index_select(0, index).clamp_min_(1e-12)


def max_min_search(
    features: Tensor, index: Tensor, k: int, nearest: bool
) -> tuple[Tensor, Tensor] | None:
    """The search of `selection.max_min_filter` over some rows of a CPU tensor.

    Args:
        features: `[n, d]`, fp32 or bf16.
        index: `[m]` int64, the rows to choose from, each within 0..n-1.
        k: how many, 1 <= k <= m.
        nearest: which token starts.

    Returns:
        Positions in `index` in the order picked, `[k]` int64, which mean nothing where a length is
        not finite; and the lengths of all rows to choose from, `[m]` fp32. None where the search is
        not compiled.

    Raises:
        ValueError: tensors of another shape, dtype or device, k or an index out of range.
    """
    library = None if _held_back else _library()[0]
    if library is None:
        return None
    _calls[0] += 1
    return _search(library, features, index, k, nearest)


def _search(
    library: ctypes.CDLL, features: Tensor, index: Tensor, k: int, nearest: bool
) -> tuple[Tensor, Tensor]:
    """`max_min_search` by a library. Errors: ValueError for what would read or write elsewhere."""
    if features.ndim != 2 or features.dtype not in _READABLE:
        raise ValueError(
            f"features must be fp32 or bf16 [n, d]; got {features.dtype} {tuple(features.shape)}."
        )
    if index.ndim != 1 or index.dtype != torch.int64:
        raise ValueError(f"index must be int64 [m]; got {index.dtype} {tuple(index.shape)}.")
    if features.device.type != "cpu" or index.device.type != "cpu":
        raise ValueError(
            f"the compiled search reads tensors on the CPU; got features on {features.device} and "
            f"index on {index.device}."
        )
    if not 1 <= k <= len(index):
        raise ValueError(f"`k={k}` must lie in 1..{len(index)}, the number of candidates.")
    low, high = (int(bound) for bound in index.aminmax())
    if low < 0 or high >= len(features):
        raise ValueError(f"index names {low}..{high}; there are rows 0..{len(features) - 1}.")
    (features,), pairs = _as_c_reads(library, features)
    index, words = index.contiguous(), 1 + pairs
    size = len(index)
    length = (
        torch.empty(size, dtype=torch.float32, device="cpu") if pairs else lengths(features, index)
    )
    memory = _memory.get(library.memory_words(size))
    picks = torch.empty(k, dtype=torch.int64, device="cpu")
    done = library.max_min_search(
        features.data_ptr(),
        index.data_ptr(),
        length.data_ptr(),
        len(features),
        len(index),
        features.shape[1] // words,
        features.stride(0) // words,
        pairs,
        k,
        nearest,
        torch.get_num_threads(),
        memory.data_ptr(),
        picks.data_ptr(),
    )
    assert done, "the search in C looks at the same bounds"
    return picks, length


def top_k(library: ctypes.CDLL, scores: Tensor, k: int, valid: Tensor | None) -> Tensor:
    """`selection.top_k` of `[..., n]`, with k in range. Errors: ValueError, a NaN."""
    (*lead, size), memory = scores.shape, _memory.get(2 * scores.shape[-1] + 1)
    scores, valid = _flat(scores, size), None if valid is None else _flat(valid, size)
    picks = torch.empty(len(scores), k, dtype=torch.int64, device="cpu")
    for row in range(len(scores)):
        *at, to = _at(row, scores, valid, picks)
        _settled(library.top_k(*at, size, k, memory.data_ptr(), to))
    return picks.view(*lead, k)


def combine_then_filter(
    library: ctypes.CDLL,
    features: Tensor,
    semantic: Tensor,
    action: Tensor,
    valid: Tensor | None,
    k: int,
    nearest: bool,
) -> Tensor:
    """`selection.combine_then_filter`, with shapes that fit and k in range. Errors: ValueError."""
    *lead, size, width = features.shape
    (features,), pairs = _as_c_reads(library, features.detach().view(-1, size, width))
    semantic, action = _flat(semantic, size), _flat(action, size)
    valid = None if valid is None else _flat(valid, size)
    length, words = None if pairs else torch.linalg.vector_norm(features, dim=2), 1 + pairs
    shape = size, width // words, features.stride(1) // words
    memory = _memory.get(library.choice_words(size, k))
    kept = torch.empty(len(features), k, dtype=torch.int64, device="cpu")
    for row in range(len(features)):
        *at, to = _at(row, semantic, action, valid, features, length, kept)
        how = pairs, k, nearest, torch.get_num_threads(), memory.data_ptr()
        _settled(library.combine_then_filter(*at, *shape, *how, to))
    return kept.view(*lead, k)


def _flat(tensor: Tensor, size: int) -> Tensor:
    """Scores in fp32, or which tokens are valid: `[rows, size]`."""
    return (tensor if tensor.dtype == torch.bool else tensor.float()).reshape(-1, size).contiguous()


def _at(row: int, *tensors: Tensor | None) -> list[int | None]:
    """Where a row of each of these begins."""
    return [
        None if t is None else t.data_ptr() + row * t.stride(0) * t.element_size() for t in tensors
    ]


def _settled(done: int) -> None:
    """Refuse what a choice in C says is broken (ValueError)."""
    assert done != 0, "`selection` looks at the same bounds"
    if done < 0:
        raise ValueError(BROKEN_SCORES if done == -1 else BROKEN_FEATURES)


def _as_c_reads(library: ctypes.CDLL, *tensors: Tensor) -> tuple[list[Tensor], bool]:
    """These `[..., D]` in fp32, or as they are: pairs of bf16 that this processor multiplies."""
    if library.reads_bf16() and all(map(_in_pairs, tensors)):
        return list(tensors), True
    floats = [tensor.float() for tensor in tensors]
    return [one if one.stride(-1) == 1 else one.contiguous() for one in floats], False


def _in_pairs(tensor: Tensor) -> bool:
    """Whether every row of a tensor is a row of whole pairs of bf16."""
    *outer, last = tensor.stride()
    even = tensor.shape[-1] % 2 == 0 and not any(stride % 2 for stride in outer)
    return tensor.dtype == torch.bfloat16 and even and last == 1 and tensor.data_ptr() % 4 == 0


# -- scoring -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Attention:
    """Queries and keys of one attention as its kernel saw them.

    Args:
        query: `[B, Hq, Q, D]`, after RoPE.
        key: `[B, Hkv, N, D]`, after RoPE; Hq is a multiple of Hkv (grouped-query attention).
        scale: factor on `Q K^T`, usually `D ** -0.5`.
        mask: `[B|1, 1|Hq, Q|1, N]`, bool (True may attend) or additive. With `causal` both apply.
        causal: query row i sees keys up to `N - Q + i`.
        softcap: logits become `softcap * tanh(logits / softcap)` (Gemma 2).
        sinks: `[Hq]`, a logit in every softmax of a head that belongs to no key (gpt-oss).
    """

    query: Tensor
    key: Tensor
    scale: float
    mask: Tensor | None = None
    causal: bool = False
    softcap: float | None = None
    sinks: Tensor | None = None

    def check(self) -> None:
        """Refuse shapes that do not fit together (ValueError)."""
        one, other, mask = tuple(self.query.shape), tuple(self.key.shape), self.mask
        if len(one) != 4 or len(other) != 4 or one[::3] != other[::3] or one[1] % other[1]:
            raise ValueError(
                "query and key must be [B, H, tokens, D], agree in batch and head size, and query "
                f"heads must be a multiple of the key heads; got {one} and {other}."
            )
        if mask is not None and (mask.ndim != 4 or mask.shape[-1] != other[2]):
            raise ValueError(
                f"mask must be [B|1, 1|H, Q|1, N] with N={other[2]} keys; got {tuple(mask.shape)}."
            )


def column_mean(
    seen: Attention,
    columns: Tensor,
    rows: Tensor,
    row_weight: Tensor | None,
    library: ctypes.CDLL | None = None,
) -> Tensor | None:
    """`scores.column_mean` with `rows` `[R]` or `[B, R]`, which must be there (ValueError).

    None: C cannot read these.
    """
    seen.check()
    query, key, mask, sinks = seen.query, seen.key, seen.mask, seen.sinks
    library = library or reading(query, key, columns, rows, mask, row_weight, sinks)
    if library is None or query.dtype not in _IN_C or key.dtype != query.dtype:
        return None
    (query, key), pairs = _as_c_reads(library, query, key)
    batch, heads, queries, dim = query.shape
    kind, hidden_below, mask_stride = _MASKS[None], 0.0, [0, 0, 0]
    if mask is not None:
        mask, kind, hidden_below = _mask(mask)
        mask_stride = [*mask.expand(batch, heads, queries, -1).stride()[:3]]
    rows, columns = (t.expand(batch, -1).to(torch.int64).contiguous() for t in (rows, columns))
    if row_weight is not None:
        row_weight = row_weight.expand(batch, -1).float().contiguous()
    sinks = None if sinks is None else sinks.detach().float().contiguous()
    received = torch.empty(columns.shape, dtype=torch.float32, device="cpu")
    given, words = (query, key, mask, sinks, row_weight, rows, columns), 1 + pairs
    call = _Attention(
        *(None if one is None else one.data_ptr() for one in given),
        None,
        received.data_ptr(),
        *(batch, heads, key.shape[1], queries, key.shape[2]),
        *(dim // words, rows.shape[1], columns.shape[1]),
        tuple(stride // words for stride in query.stride()[:3]),
        tuple(stride // words for stride in key.stride()[:3]),
        tuple(mask_stride),
        *(seen.scale, seen.softcap or 0.0, hidden_below),
        *(pairs, kind, seen.causal, torch.get_num_threads()),
    )
    memory = _memory.get(library.column_mean_words(ctypes.byref(call)))
    call.memory = memory.data_ptr()
    if not library.column_mean(ctypes.byref(call)):
        raise ValueError(
            f"`rows` must name some of the {queries} query rows, and `columns` some of the "
            f"{key.shape[2]} keys; one of them names another, or no row would vote."
        )
    return received


def _mask(mask: Tensor) -> tuple[Tensor, int, float]:
    """A mask that C reads key by key, its kind, and up to where an additive one hides."""
    hidden_below = 0.0 if mask.dtype == torch.bool else torch.finfo(mask.dtype).min / 2
    mask = mask if mask.dtype in _MASKS else mask.float()
    mask = mask if mask.stride(3) == 1 else mask.contiguous()
    return mask, _MASKS[mask.dtype], hidden_below


# -- loading -------------------------------------------------------------------------------------


@cache
def _library() -> tuple[ctypes.CDLL | None, str]:
    """The compiled functions, or None, and the sentence of `state`."""
    return compiled.library(_try)


def memory(count: int) -> Tensor:
    """As many words of memory, int32, which this thread uses again in its next call."""
    return _memory.get(count)


def _try(library: ctypes.CDLL) -> None:
    """Declare the functions of a library, and refuse one that gives wrong answers."""
    for name, (arguments, result) in _FUNCTIONS.items():
        try:
            function = getattr(library, name)
        except AttributeError as error:
            raise Unavailable(f"the compiler made a library without the search: {error}") from None
        function.argtypes, function.restype = arguments, result
    for dtype in _READABLE:
        # The last row is the first one once more, the third between the other two.
        corners = [[3, 0, 0, 0], [0, 1, 0, 0], [1, 1, 0, 0], [3, 0, 0, 0]]
        rows = torch.tensor(corners, dtype=dtype, device="cpu")
        if library.memory_words(4) < 16 or _picks(library, rows) != [1, 0, 2]:
            raise Unavailable("the compiled search gives wrong answers")
        one = torch.tensor([[[[1, 0, 0, 0]]]], dtype=dtype, device="cpu")
        two = torch.tensor([[[[0, 0, 0, 0], [1, 0, 0, 0]]]], dtype=dtype, device="cpu")
        columns = torch.tensor([[1]], dtype=torch.int64, device="cpu")
        got = column_mean(Attention(one, two, 1.0), columns, 0 * columns, None, library)
        if got is None or abs(float(got) - 1 / (1 + math.exp(-1))) > 1e-5:
            raise Unavailable("the compiled scores are wrong")


def _picks(library: ctypes.CDLL, rows: Tensor) -> list[int]:
    """Three of these rows, the one that is farthest from its nearest first."""
    return _search(library, rows, torch.arange(len(rows), device="cpu"), 3, True)[0].tolist()
