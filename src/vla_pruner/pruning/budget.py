"""How many visual tokens stay: a fraction or a count, over all views or in each view."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Scope = Literal["global", "view"]


@dataclass(frozen=True)
class Budget:
    """Number of visual tokens that stay.

    Args:
        keep: a float in (0, 1] is a fraction of the visual tokens, an int >= 1 a number of them
            (`1.0` keeps all, `1` keeps one).
        scope: "global": one budget over the tokens of all views (the paper); "view": the same
            `keep` in each view.

    Raises:
        ValueError: a `keep` or `scope` that is none of these.
    """

    keep: float | int
    scope: Scope = "global"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        if self.scope not in ("global", "view"):
            raise ValueError(f'`budget={self.scope!r}` is unknown; use "global" or "view".')

    def resolve(self, views: tuple[int, ...]) -> tuple[int, ...]:
        """Tokens to keep: `(k,)` for a global budget, one number per view otherwise.

        Fractions are rounded as Python rounds (half to even), and at least one token stays.

        Args:
            views: visual tokens of each view (camera).

        Raises:
            ValueError: a count larger than the number of visual tokens.
        """
        if not views or min(views) < 1:
            raise ValueError(f"every view needs at least one visual token; got views={views}.")
        if self.scope == "global":
            return (self._count(sum(views), f"{sum(views)} visual tokens of the input"),)
        return tuple(
            self._count(size, f"{size} visual tokens of view {number}")
            for number, size in enumerate(views)
        )

    def _count(self, size: int, what: str) -> int:
        if isinstance(self.keep, float):
            return max(1, round(self.keep * size))
        if self.keep > size:
            raise ValueError(
                f"keeping {self.keep} tokens asks for more than the {what}; use at most {size}, or "
                "a share in (0, 1]."
            )
        return self.keep


def check_keep(keep: float | int) -> None:
    """Refuse a `keep` that is neither a fraction in (0, 1] nor a positive count (ValueError)."""
    if isinstance(keep, bool) or not isinstance(keep, (int, float)):
        raise ValueError(
            f"`keep={keep!r}` is not a number; use a fraction in (0, 1] or a number of tokens."
        )
    if isinstance(keep, float) and not 0.0 < keep <= 1.0:
        raise ValueError(
            f"`keep={keep}` is not in (0, 1]; a float is the fraction of visual tokens that stay, "
            "an int their number."
        )
    if isinstance(keep, int) and keep < 1:
        raise ValueError(f"`keep={keep}` would drop every visual token; keep at least 1.")


def split_by_shares(total: int, shares: Sequence[float], sizes: Sequence[int]) -> tuple[int, ...]:
    """Share `total` tokens among views, no more in each than it has.

    Shares are rounded down, and what is left over goes to the largest remainders that have room,
    round after round; ties go to the first view.

    Args:
        total: tokens to share, at most the sum of `sizes`.
        shares: share of each view; they sum to 1.
        sizes: visual tokens of each view.

    Raises:
        ValueError: more tokens than there are.
    """
    if total > sum(sizes):
        raise ValueError(f"cannot keep {total} of {sum(sizes)} visual tokens.")
    exact = [total * share for share in shares]
    # What is a whole number but for rounding counts as one.
    counts = [min(int(e + 1e-6), size) for e, size in zip(exact, sizes, strict=True)]
    order = sorted(
        range(len(sizes)), key=lambda view: (int(exact[view] + 1e-6) - exact[view], view)
    )
    while sum(counts) < total:
        for view in order:
            if counts[view] < sizes[view] and sum(counts) < total:
                counts[view] += 1
    return tuple(counts)
