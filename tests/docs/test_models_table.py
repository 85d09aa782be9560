"""The table of tested models: complete, true to the tests it names, and the same in the docs."""

from __future__ import annotations

from pathlib import Path

import pytest

from vla_pruner import cli
from vla_pruner.models import matrix
from vla_pruner.models.base import built_in

ROOT = Path(__file__).parents[2]


def test_every_family_has_a_row():
    tested = {row.family for row in matrix.read()}
    assert tested >= {family.name for family in built_in()}
    assert tested <= {family.name for family in built_in()} | {"decoder"}


@pytest.mark.parametrize("row", matrix.read(), ids=lambda row: f"{row.family}-{row.model}")
def test_the_tests_that_a_row_names_exist(row):
    assert row.tests and set(row.tests) <= set(matrix.CHECKS)
    for test in {name for names in row.tests.values() for name in names}:
        file, _, name = test.partition("::")
        text = (ROOT / file).read_text(encoding="utf-8")
        assert f"def {name}(" in text and "proves" in text.split(f"def {name}(")[1].split("):")[0]


def test_the_page_is_the_table(capsys):
    assert cli.main(["models", "--markdown"]) == cli.OK
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out == page, "run: vla-pruner models --markdown > docs/models.md"


def test_models_command_shows_what_was_tested(capsys):
    assert cli.main(["models", "hf-vlm"]) == cli.OK
    shown = capsys.readouterr().out
    assert "LlavaForConditionalGeneration" in shown and "reference" in shown


def test_new_rows_replace_those_of_the_same_class(tmp_path):
    file = tmp_path / "tested.json"
    old = matrix.Row("a", "Model", False, {"batch": ["x"], "undo": ["y"]}, {"torch": "1"})
    other = matrix.Row("a", "Model", True, {"batch": ["z"]}, {"torch": "1"})
    matrix.write([old, other], file)
    new = matrix.Row("a", "Model", False, {"batch": ["x"]}, {"torch": "2"})
    matrix.write([new], file)
    assert matrix.read(file) == [new, other]
    assert matrix.read(tmp_path / "none.json") == []
