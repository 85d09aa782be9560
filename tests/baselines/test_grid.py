"""Neighbourhoods on grids, cell by cell."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_pruner.baselines.grid import close_gaps, count_around, dilate, grids

SHAPES = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=3)


def around(shapes, token: int) -> list[int]:
    """The tokens in the 3 x 3 cells around one, itself included."""
    start = 0
    for rows, columns in shapes:
        if token < start + rows * columns:
            row, column = divmod(token - start, columns)
            return [
                start + r * columns + c
                for r in range(max(row - 1, 0), min(row + 2, rows))
                for c in range(max(column - 1, 0), min(column + 2, columns))
            ]
        start += rows * columns
    raise AssertionError


@settings(max_examples=40, deadline=None)
@given(shapes=SHAPES, seed=st.integers(0, 10**6))
def test_counts_and_morphology_cell_by_cell(shapes, seed):
    size = sum(rows * columns for rows, columns in shapes)
    mask = torch.rand(2, size, generator=torch.Generator().manual_seed(seed)) < 0.4
    counted, wide = count_around(mask, shapes), dilate(mask, shapes)
    for row in range(2):
        for token in range(size):
            near = [bool(mask[row, i]) for i in around(shapes, token)]
            assert int(counted[row, token]) == sum(near)
            assert bool(wide[row, token]) == any(near)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 6), columns=st.integers(1, 6), seed=st.integers(0, 10**6))
def test_closing_on_a_grid_that_goes_on(rows, columns, seed):
    mask = torch.rand(1, rows * columns, generator=torch.Generator().manual_seed(seed)) < 0.4
    there = {divmod(int(i), columns) for i in mask[0].nonzero()[:, 0]}
    steps = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    grown = {(r + i, c + j) for r, c in there for i, j in steps}
    closed = {(r, c) for r, c in grown if all((r + i, c + j) in grown for i, j in steps)}
    found = {divmod(int(i), columns) for i in close_gaps(mask, ((rows, columns),))[0].nonzero()}
    assert found == {(r, c) for r, c in closed if 0 <= r < rows and 0 <= c < columns}
    assert there <= found


def test_grids_are_square_unless_told_otherwise():
    assert grids((16, 9)) == ((4, 4), (3, 3))
    assert grids((20, 10), columns=5) == ((4, 5), (2, 5))
    with pytest.raises(ValueError, match="20 visual tokens of a camera are not a square"):
        grids((16, 20))
    with pytest.raises(ValueError, match="not a grid with `columns=6`"):
        grids((12, 20), columns=6)
