"""What visual tokens cost, and how a recipe is made as expensive as one cut."""

from __future__ import annotations

from collections.abc import Sequence

from vla_pruner._short import short
from vla_pruner.pruning.budget import Budget
from vla_pruner.pruning.flops import layer_macs


def cost_share(left: Sequence[int], *, hidden: int, ffn: int) -> float:
    """Cost of n_0, ..., n_(T-1) visual tokens in T layers, over that of n_0 in each.

    As if there were no other tokens, `pruning.flops.layer_macs` each.
    """
    spent = sum(layer_macs(n, hidden=hidden, ffn=ffn) for n in left if n)
    return spent / (len(left) * layer_macs(left[0], hidden=hidden, ffn=ffn))


def one_cut_share(
    size: int, keep: float, *, layer: int, depth: int, hidden: int, ffn: int
) -> float:
    """Cost share of `size` visual tokens if a share `keep` of them stays from layer K on.

    Args:
        size: M.
        keep: in (0, 1].
        layer: K; 0 gives `keep` itself.
        depth: T.
        hidden, ffn: widths of the decoder and of its feed-forward network.

    Raises:
        ValueError: `keep` or `layer` out of range.
    """
    if isinstance(keep, bool) or not isinstance(keep, float) or not 0.0 < keep <= 1.0:
        raise ValueError(f"`keep={short(keep)}` must be a share in (0, 1].")
    if not 0 <= layer < depth:
        raise ValueError(f"`layer={layer}` must lie in 0..{depth - 1}; the decoder has {depth}.")
    if layer == 0:
        return keep
    (k,) = Budget(keep).resolve((size,))
    return cost_share([size] * layer + [k] * (depth - layer), hidden=hidden, ffn=ffn)
