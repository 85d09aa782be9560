"""What a prefill costs, with and without pruning, as the papers count it (Eq. 10-13)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

Convention = Literal["swiglu", "paper"]
_FFN_MATRICES = {"swiglu": 3, "paper": 2}


def layer_macs(n: int, *, hidden: int, ffn: int, convention: Convention = "swiglu") -> int:
    """Multiply-accumulates of one decoder layer on n tokens (Eq. 10).

    `4 n d^2` for the four projections, `2 n^2 d` for the attention, and the feed-forward network:
    `3 n d m` for a gated one ("swiglu", what Llama runs and what the printed tables count) or
    `2 n d m` as the equation is written ("paper"). Shared key heads and causal masks are not
    deducted.

    Args:
        n: tokens.
        hidden: width d of the decoder.
        ffn: width m of the feed-forward network.
        convention: "swiglu" or "paper".

    Raises:
        ValueError: an unknown convention, or a size below 1.
    """
    if convention not in _FFN_MATRICES:
        raise ValueError(f'`convention={convention!r}` is unknown; use "swiglu" or "paper".')
    if min(n, hidden, ffn) < 1:
        raise ValueError(f"sizes must be at least 1; got n={n}, hidden={hidden}, ffn={ffn}.")
    return 4 * n * hidden**2 + 2 * n**2 * hidden + _FFN_MATRICES[convention] * n * hidden * ffn


def prefill_flops(
    tokens: int, *, layers: int, hidden: int, ffn: int, convention: Convention = "swiglu"
) -> int:
    """Cost of an unpruned prefill, all decoder layers (Eq. 11).

    One multiply-accumulate counts as one, as in the papers: double it for floating-point operations
    in the strict sense. Vision tower, projector, head and decode steps are left out.

    Args:
        tokens: length of the prefill, visual tokens and all others.
        layers: decoder layers T.
        hidden, ffn, convention: see `layer_macs`.

    Raises:
        ValueError: see `layer_macs`.
    """
    if layers < 1:
        raise ValueError(f"`layers={layers}` must be at least 1.")
    return layers * layer_macs(tokens, hidden=hidden, ffn=ffn, convention=convention)


def pruned_prefill_flops(
    tokens: int,
    visual: int,
    kept: int,
    *,
    cut_layer: int,
    layers: int,
    hidden: int,
    ffn: int,
    convention: Convention = "swiglu",
) -> int:
    """Cost of a prefill that keeps `kept` of `visual` tokens from layer `cut_layer` on (Eq. 12).

    Divided by `prefill_flops` it is the ratio of Eq. 13.

    Args:
        tokens: length of the prefill before pruning, visual tokens and all others.
        visual: visual tokens before pruning.
        kept: visual tokens after it.
        cut_layer: K, the number of layers that see every token.
        layers: decoder layers T.
        hidden, ffn, convention: see `layer_macs`.

    Raises:
        ValueError: counts that contradict each other; see also `layer_macs`.
    """
    if not 0 <= kept <= visual <= tokens:
        raise ValueError(
            f"expected 0 <= kept <= visual <= tokens; "
            f"got kept={kept}, visual={visual}, tokens={tokens}."
        )
    if not 0 <= cut_layer <= layers:
        raise ValueError(f"`cut_layer={cut_layer}` must lie in 0..{layers}.")
    full = layer_macs(tokens, hidden=hidden, ffn=ffn, convention=convention)
    short = layer_macs(tokens - visual + kept, hidden=hidden, ffn=ffn, convention=convention)
    return cut_layer * full + (layers - cut_layer) * short


def layered_prefill_flops(
    tokens_per_layer: Sequence[int],
    *,
    hidden: int,
    ffn: int,
    keys_per_layer: Sequence[int] | None = None,
    convention: Convention = "swiglu",
) -> int:
    """Cost of a prefill whose layers compute different numbers of tokens.

    A layer of n tokens that attend to s keys costs `4 n d^2 + 2 n s d` and its feed-forward
    network, see `layer_macs`; with s = n everywhere the sum is Eq. 11 or 12.

    Args:
        tokens_per_layer: n of each layer; 0: the layer does not run.
        hidden, ffn, convention: see `layer_macs`.
        keys_per_layer: s of each layer, where keys of an earlier step are used again; None: s = n.

    Raises:
        ValueError: a negative count, fewer keys than tokens, or lists of different length; see also
            `layer_macs`.
    """
    keys = tokens_per_layer if keys_per_layer is None else keys_per_layer
    if len(keys) != len(tokens_per_layer):
        raise ValueError(f"{len(tokens_per_layer)} layers, but keys of {len(keys)}.")
    total = 0
    for n, seen in zip(tokens_per_layer, keys, strict=True):
        if n < 0 or seen < n:
            raise ValueError(f"expected 0 <= tokens <= keys in each layer; got {n} and {seen}.")
        if n > 0:
            same = layer_macs(n, hidden=hidden, ffn=ffn, convention=convention)
            total += same + 2 * n * (seen - n) * hidden
    return total
