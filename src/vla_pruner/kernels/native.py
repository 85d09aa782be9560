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

BROKEN_SCORES, BROKEN_FEATURES = -1, -2
"""What `combine_then_filter` and `top_k` answer instead of a choice."""


class _Attention(ctypes.Structure):
    """`struct attention` of column_mean.c."""

    _fields_ = (
        *((name, _POINTER) for name in ("query", "key", "mask", "sinks", "weight")),
        *((name, _POINTER) for name in ("rows", "columns", "memory", "received")),
        *((name, _LONG) for name in ("batch", "heads", "kv_heads", "queries")),
        *((name, _LONG) for name in ("keys", "width", "voting", "asked")),
        *((name, _LONG * 3) for name in ("query_stride", "key_stride", "mask_stride")),
        *((name, _LONG) for name in ("rows_stride", "first_row", "row_step")),
        *((name, _LONG) for name in ("weight_stride", "columns_stride")),
        *((name, _FLOAT) for name in ("scale", "softcap", "hidden_below")),
        *((name, _INT) for name in ("bf16", "mask_kind", "causal", "threads")),
    )


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


def readable(*tensors: Tensor | None) -> bool:
    """Whether C can read these as they are or after a conversion: plain tensors on the CPU."""
    usable = not _held_back and _library()[0] is not None
    return usable and all(one is None or _has_memory(one) for one in tensors)


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
    library, _ = _library()
    if library is None or _held_back:
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
    features, pairs, width, stride = _rows(library, features)
    index = index.contiguous()
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
        width,
        stride,
        pairs,
        k,
        nearest,
        _threads(),
        memory.data_ptr(),
        picks.data_ptr(),
    )
    assert done, "the search in C looks at the same bounds"
    return picks, length


def top_k(scores: Tensor, k: int, valid: Tensor | None) -> Tensor | int:
    """`selection.top_k` of fp32 `[n]` with k in range: `[k]` int64, or `BROKEN_SCORES`."""
    library = functions()
    scores = scores.contiguous()
    valid = None if valid is None else valid.contiguous()
    memory = _memory.get(2 * len(scores) + 1)
    picks = torch.empty(k, dtype=torch.int64, device="cpu")
    done = library.top_k(
        scores.data_ptr(),
        None if valid is None else valid.data_ptr(),
        len(scores),
        k,
        memory.data_ptr(),
        picks.data_ptr(),
    )
    assert done != 0, "`selection.top_k` looks at the same bounds"
    return picks if done == 1 else int(done)


def combine_then_filter(
    scores: Tensor, action: Tensor, features: Tensor, k: int, nearest: bool, valid: Tensor | None
) -> Tensor | int:
    """`selection.combine_then_filter` of one row of a batch, with shapes that fit and k in range.

    Args:
        scores: `[n]` fp32, the semantic ones.
        action: `[n]`.
        features: `[n, d]`.
        k: how many stay.
        nearest: which token starts the search.
        valid: `[n]` bool or None.

    Returns:
        `[k]` int64, ascending; `BROKEN_SCORES` or `BROKEN_FEATURES` where there is no answer.
    """
    library = functions()
    features, pairs, width, stride = _rows(library, features)
    semantic, action = scores.contiguous(), action.float().contiguous()
    valid = None if valid is None else valid.contiguous()
    length = None if pairs else torch.linalg.vector_norm(features, dim=1)
    memory = _memory.get(library.choice_words(len(semantic), k))
    kept = torch.empty(k, dtype=torch.int64, device="cpu")
    done = library.combine_then_filter(
        semantic.data_ptr(),
        action.data_ptr(),
        None if valid is None else valid.data_ptr(),
        features.data_ptr(),
        None if length is None else length.data_ptr(),
        len(semantic),
        width,
        stride,
        pairs,
        k,
        nearest,
        _threads(),
        memory.data_ptr(),
        kept.data_ptr(),
    )
    assert done != 0, "`selection.combine_then_filter` looks at the same bounds"
    return kept if done == 1 else int(done)


def _rows(library: ctypes.CDLL, features: Tensor) -> tuple[Tensor, bool, int, int]:
    """Features `[n, d]` as C reads them: rows of words, whether pairs of bf16, width, stride."""
    pairs = _in_pairs(library, features)
    if not pairs:
        features = features.float()
        if features.stride(1) != 1:
            features = features.contiguous()
    words = 2 if pairs else 1
    return features, pairs, features.shape[1] // words, features.stride(0) // words


def _in_pairs(library: ctypes.CDLL, tensor: Tensor) -> bool:
    """Whether every row of a bf16 tensor is a row of pairs that this processor multiplies."""
    if tensor.dtype != torch.bfloat16 or not library.reads_bf16():
        return False
    *outer, last = tensor.stride()
    even = tensor.shape[-1] % 2 == 0 and not any(stride % 2 for stride in outer)
    return even and last == 1 and tensor.data_ptr() % 4 == 0


def _threads() -> int:
    return max(torch.get_num_threads(), 1)


# -- scoring -------------------------------------------------------------------------------------


def column_mean(
    query: Tensor,
    key: Tensor,
    columns: Tensor,
    rows: range | Tensor,
    *,
    mask: Tensor | None,
    row_weight: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    causal: bool,
    softcap: float | None,
) -> Tensor | None:
    """`scores.attention_column_mean` of CPU tensors (see there), with `rows` spelled out.

    None: C cannot read these tensors, or is not compiled.

    Raises:
        ValueError: a row or a column that is not there.
    """
    named = rows if isinstance(rows, Tensor) else None
    if not readable(query, key, columns, named, mask, row_weight, sinks):
        return None
    return _mean(
        functions(), query, key, columns, rows, mask, row_weight, sinks, scale, causal, softcap
    )


def _mean(
    library: ctypes.CDLL,
    query: Tensor,
    key: Tensor,
    columns: Tensor,
    rows: range | Tensor,
    mask: Tensor | None,
    row_weight: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    causal: bool,
    softcap: float | None,
) -> Tensor:
    """`column_mean` by a library."""
    batch, heads, queries, dim = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    pairs = _in_pairs(library, query) and _in_pairs(library, key)
    if not pairs:
        query, key = query.float(), key.float()
        query = query if query.stride(3) == 1 else query.contiguous()
        key = key if key.stride(3) == 1 else key.contiguous()
    words = 2 if pairs else 1
    hidden_below = 0.0
    if mask is not None:
        if mask.dtype != torch.bool:
            hidden_below = torch.finfo(mask.dtype).min / 2
            mask = mask if mask.dtype in _MASKS else mask.float()
        mask = mask if mask.stride(3) == 1 else mask.contiguous()
    columns = columns.to(torch.int64).contiguous()
    listed = rows.to(torch.int64).contiguous() if isinstance(rows, Tensor) else None
    weight = None if row_weight is None else row_weight.float().contiguous()
    sinks = None if sinks is None else sinks.detach().float().contiguous()
    received = torch.empty(batch, columns.shape[1], dtype=torch.float32, device="cpu")
    call = _Attention(
        *(tensor.data_ptr() for tensor in (query, key)),
        *(None if one is None else one.data_ptr() for one in (mask, sinks, weight, listed)),
        columns.data_ptr(),
        None,
        received.data_ptr(),
        *(batch, heads, kv_heads, queries, keys, dim // words),
        rows.shape[-1] if isinstance(rows, Tensor) else len(rows),
        columns.shape[1],
        tuple(stride // words for stride in query.stride()[:3]),
        tuple(stride // words for stride in key.stride()[:3]),
        _steps(mask),
        listed.shape[-1] if listed is not None and listed.ndim == 2 and len(listed) > 1 else 0,
        *((0, 0) if isinstance(rows, Tensor) else (rows.start, rows.step)),
        weight.shape[1] if weight is not None and len(weight) > 1 else 0,
        columns.shape[1] if len(columns) > 1 else 0,
        scale,
        softcap or 0.0,
        hidden_below,
        pairs,
        _MASKS[None if mask is None else mask.dtype],
        causal,
        _threads(),
    )
    memory = _memory.get(library.column_mean_words(ctypes.byref(call)))
    call.memory = memory.data_ptr()
    if not library.column_mean(ctypes.byref(call)):
        raise ValueError(
            f"`rows` must name some of the {queries} query rows, and `columns` some of the {keys} "
            "keys; one of them names another."
        )
    return received


def _steps(mask: Tensor | None) -> tuple[int, ...]:
    """Entries from one batch element, head and row of a mask to the next; 0 where all share one."""
    if mask is None:
        return (0, 0, 0)
    return tuple(0 if mask.shape[dim] == 1 else mask.stride(dim) for dim in range(3))


# -- loading -------------------------------------------------------------------------------------


@cache
def _library() -> tuple[ctypes.CDLL | None, str]:
    """The compiled functions, or None, and the sentence of `state`."""
    return compiled.library(_try)


def functions() -> ctypes.CDLL:
    """The compiled functions, where `readable` says that there are some."""
    found, why = _library()
    assert found is not None, f"`readable` says so: {why}"
    _calls[0] += 1
    return found


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
        got = _mean(library, one, two, columns, range(1), None, None, None, 1.0, False, None)
        if abs(float(got) - 1 / (1 + math.exp(-1))) > 1e-5:
            raise Unavailable("the compiled scores are wrong")


def _picks(library: ctypes.CDLL, rows: Tensor) -> list[int]:
    """Three of these rows, the one that is farthest from its nearest first."""
    return _search(library, rows, torch.arange(len(rows), device="cpu"), 3, True)[0].tolist()
