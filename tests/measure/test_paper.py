"""What the paper prints, and what its formulas give."""

from pathlib import Path

import pytest

from vla_pruner.measure.paper import PRINTED, table

PAGE = Path(__file__).parents[2] / "docs" / "paper-numbers.md"


def test_the_page_holds_the_table_that_the_command_makes():
    assert table() in PAGE.read_text(encoding="utf-8")


def test_openvla_follows_from_the_formulas_and_oft_does_not():
    ours = [cell for cell in PRINTED if cell.method == "VLA-Pruner" and cell.table[0] == "1"]
    assert [round(cell.formula()[1], 1) for cell in ours] == [59.9, 40.0, 30.1, 60.0, 40.3, 30.6]
    away = [cell.formula()[1] - cell.percent for cell in ours]
    assert all(abs(points) < 0.25 for points in away[:3])
    assert all(points > 2 for points in away[3:])


@pytest.mark.parametrize("cell", PRINTED, ids=lambda cell: f"{cell.table} {cell.method}")
def test_as_many_full_layers_give_the_printed_ratio(cell):
    """Eq. 13 is linear in K; checked between whole layers."""
    layers = cell.full_layers()
    below = int(layers // 1)
    if below < 0:
        assert cell.percent < cell.formula(0)[1]
        return
    low, high = cell.formula(below)[1], cell.formula(below + 1)[1]
    assert low + (layers - below) * (high - low) == pytest.approx(cell.percent, abs=1e-9)
