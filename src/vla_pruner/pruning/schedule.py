"""How many visual tokens each stage of a progressive method leaves, for any image and budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

Table = Sequence[Sequence[Fraction]]


def scaled_cuts(cuts: Sequence[int], source_layers: int, layers: int) -> tuple[int, ...]:
    """Cuts of a decoder of `source_layers` layers at the same relative depth in one of `layers`.

    Rounded half up, then moved on where needed to stay ascending and behind layer 0.

    Raises:
        ValueError: a decoder that is too shallow for so many cuts.
    """
    scaled = [0]
    for cut in cuts:
        there = (2 * cut * layers + source_layers) // (2 * source_layers)
        scaled.append(max(there, scaled[-1] + 1))
    if scaled[-1] >= layers:
        raise ValueError(
            f"a decoder of {layers} layers is too shallow for {len(cuts)} cuts behind one another; "
            f"it takes at least {len(cuts) + 1} layers, or a method that cuts once."
        )
    return tuple(scaled[1:])


def stages_by_total(
    table: Table, weights: Sequence[int], visual: int, total: Fraction
) -> tuple[int, ...]:
    """Tokens of each stage, so that their weighted sum comes as close to `total` as it can.

    The table's rows are interpolated linearly, rounded down, and what is left over is spent on
    later stages first, so that no stage could take one token more.

    Args:
        table: rows of fractions of the image, one for each stage; no row rises from stage to stage;
            from all zeros to all ones, weighted sums not falling.
        weights: layers that run on each stage's tokens, at least 1.
        visual: M, the most that a stage can hold.
        total: what the weighted sum may come to.

    Returns:
        Counts in 1..M, none larger than the one before; their weighted sum is at most `total`.

    Raises:
        ValueError: not even one token per stage fits.
    """
    if total < sum(weights):
        raise ValueError("not even one visual token per stage fits.")

    def cost(row: Sequence[Fraction]) -> Fraction:
        return sum((w * n for w, n in zip(weights, row, strict=True)), Fraction(0))

    def spent(counts: Sequence[int]) -> int:
        return sum(w * n for w, n in zip(weights, counts, strict=True))

    rows = [[visual * share for share in row] for row in table]
    exact = rows[-1]
    for low, high in pairwise(rows):
        if cost(low) <= total <= cost(high):
            span = cost(high) - cost(low)
            part = (total - cost(low)) / span if span else Fraction(0)
            exact = [a + part * (b - a) for a, b in zip(low, high, strict=True)]
            break
    counts = [max(1, math.floor(n)) for n in exact]
    while spent(counts) > total:  # At least one token per stage may have cost too much.
        stage = max(range(len(counts)), key=lambda s: (counts[s], s))
        counts[stage] -= 1
    before = None
    while before != counts:
        before = list(counts)
        for stage in reversed(range(len(counts))):
            room = (visual if stage == 0 else counts[stage - 1]) - counts[stage]
            counts[stage] += min(room, int((total - spent(counts)) // weights[stage]))
    return tuple(counts)


def stages_by_last(table: Table, visual: int, last: int) -> tuple[int, ...]:
    """Tokens of each stage, so that `last` are left in the end.

    Args:
        table: see `stages_by_total`; the last column does not fall.
        visual: M.
        last: tokens of the last stage, in 1..M.

    Returns:
        Counts, the table's rows interpolated linearly and rounded half up, none below `last`.

    Raises:
        ValueError: `last` out of range.
    """
    if not 1 <= last <= visual:
        raise ValueError(f"`last={last}` must lie in 1..{visual}.")
    low, high = next(
        rows for rows in pairwise(table) if rows[0][-1] * visual <= last <= rows[1][-1] * visual
    )
    span = (high[-1] - low[-1]) * visual
    part = (last - low[-1] * visual) / span if span else Fraction(0)
    exact = [visual * (a + part * (b - a)) for a, b in zip(low, high, strict=True)]
    return (*(max(last, math.floor(n + Fraction(1, 2))) for n in exact[:-1]), last)


def cuts_in(
    layers: tuple[int, ...] | None, source: Sequence[int], source_layers: int, num_layers: int
) -> tuple[int, ...]:
    """Cut layers that were asked for, or the source's at the same relative depth.

    Args:
        layers: ascending; None: the source's.
        source, source_layers, num_layers: see `scaled_cuts`.

    Raises:
        ValueError: a layer that the decoder does not have, or a decoder that is too shallow.
    """
    if layers is None:
        return scaled_cuts(source, source_layers, num_layers)
    if layers[-1] >= num_layers:
        raise ValueError(
            f"`layers={layers}` cut before layer {layers[-1]}, but the decoder has {num_layers} "
            f"layers; use at most {num_layers - 1}."
        )
    return layers
