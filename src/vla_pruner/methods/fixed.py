"""Fixed: keep exactly the visual tokens that are named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

from torch import Tensor

from vla_pruner._numbers import on_device
from vla_pruner.methods.base import Evidence, OneCut
from vla_pruner.pruning.options import require_int

Sets = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Fixed(OneCut):
    """Keep given tokens, whatever the image shows: for experiments, and for masks of your own.

    Args:
        indices: tokens to keep in 0..M-1, without repetition: `(3, 5, 9)` for all rows of a batch,
            or one such set for each row, all of one size. An empty set is allowed.
        keep: follows from `indices`; left out, or the number of tokens that they name.

    Raises:
        ValueError: an index that is negative or repeated, or sets of different sizes.
    """

    name: ClassVar[str] = "fixed"
    summary: ClassVar[str] = "exactly the visual tokens that are named"

    indices: Sequence[int] | Sequence[Sequence[int]] | None = None
    keep: float | int = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.indices is None:
            return
        sets = _as_sets(self.indices)
        sizes = {len(one) for one in sets}
        if len(sizes) > 1:
            raise ValueError(f"`indices` name sets of different sizes {sorted(sizes)}.")
        (size,) = sizes
        left_out = isinstance(self.keep, float) and self.keep == 1.0
        if not left_out and self.keep != size:
            raise ValueError(f"`keep={self.keep}`, but `indices` name {size} tokens.")
        object.__setattr__(self, "indices", sets)

    @property
    def sets(self) -> Sets:
        """One ascending tuple for all rows, or one for each."""
        if self.indices is None:
            raise ValueError("method 'fixed' needs `indices`: the visual tokens to keep.")
        return cast(Sets, self.indices)

    def kept(self, views: tuple[int, ...]) -> int:
        """Tokens named; ValueError for one beyond the input's."""
        last = max([-1, *(one[-1] for one in self.sets if one)])
        if last >= sum(views):
            raise ValueError(
                f"`indices` name token {last}, but the input has {sum(views)} visual tokens: "
                f"0 to {sum(views) - 1}."
            )
        return len(self.sets[0])

    def select(self, evidence: Evidence) -> Tensor:
        """The named tokens: `[B, k]`, ascending.

        Raises:
            ValueError: another number of rows than of sets, or tokens that stay anyway and are not
                named.
        """
        evidence.check(self.name)
        self.kept(evidence.views)
        batch, device = evidence.features.shape[0], evidence.features.device
        if len(self.sets) not in (1, batch):
            raise ValueError(
                f"`indices` name {len(self.sets)} sets, but this batch has {batch} rows."
            )
        chosen = on_device(self.sets, device).expand(batch, -1)
        k, free = evidence.keep_count, evidence.valid
        if free is None or k is None or k == chosen.shape[1]:
            return chosen
        others = free.expand(batch, -1).gather(1, chosen)
        if bool((others.sum(dim=1) != k).any()):
            stay = (~free).any(dim=0).nonzero()[:, 0].tolist()
            raise ValueError(
                f"`indices` have to name tokens {stay}, too: their own output is read (of a prompt "
                "that ends with the image, before labels, or where the logits of all rows are "
                "asked for), so that they stay; or ask for less, with `logits_to_keep=1`."
            )
        return chosen[others].view(batch, k)


def _as_sets(indices: Sequence[int] | Sequence[Sequence[int]]) -> Sets:
    if isinstance(indices, (str, bytes)) or not isinstance(indices, Sequence):
        raise ValueError(f"`indices={indices!r}` must be a sequence of token numbers.")
    nested = bool(indices) and isinstance(indices[0], Sequence)
    rows = cast(Sequence[Sequence[int]], indices if nested else [indices])
    sets = []
    for row in rows:
        for index in row:
            require_int("indices", index, 0)
        if len(set(row)) < len(row):
            raise ValueError(f"`indices` name a token twice: {sorted(row)}.")
        sets.append(tuple(sorted(row)))
    return tuple(sets)
