"""Every figure of README.md and docs/results.md is recomputed from the rows that are committed."""

import importlib
import re
import sys
from pathlib import Path

import pytest

from vla_pruner.measure import statistics

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def audit():
    pytest.importorskip("scipy", reason="needs the extra sim, which brings scipy")
    sys.path.insert(0, str(ROOT / "experiments"))
    try:
        return importlib.import_module("audit")
    finally:
        sys.path.remove(str(ROOT / "experiments"))


@pytest.fixture(scope="module")
def recompute(audit):
    return sys.modules["recompute"]


def test_results_are_those_of_their_rows(audit):
    page = ROOT / "docs" / "results.md"
    assert audit.audit(page) == []
    assert page.read_text("utf-8").count("<!-- rows: ") > 8
    assert len(page.read_text("utf-8").splitlines()) <= 175


def test_the_figures_of_every_audited_page_are_those_of_their_rows(audit):
    assert len(audit.PAGES) > 5
    for page in audit.PAGES:
        assert audit.MARK.search(page.read_text("utf-8")), page.name
        assert audit.audit(page) == [], page.name


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("56 of 100 (46-65 %)", "57 of 100 (46-65 %)", "rows say '56 of 100"),
        ("-44 (-54 to -35)", "-44 (-53 to -35)", "rows say '-44"),
        ("Down it goes.", "Down it goes, to 12 of 100.", "'12 of 100' stands in no table"),
        ("Down it goes.", "Down it goes, 1.38x.", "'1.38x' stands in no table"),
        ("Down it goes.", "Down it goes, by 44 %.", "'44 %' stands in no table"),
        ("<!-- rows: mini-oft.csv -->", "", "names no rows"),
        ("`fastv@0.125`", "`fastv@0.126`", "holds no row of fastv@0.126"),
    ],
)
def test_a_figure_that_is_not_that_of_its_rows_is_found(audit, tmp_path, before, after, message):
    text = (
        "## One claim\nDown it goes.\n<!-- rows: mini-oft.csv -->\n"
        "| condition | solved | difference |\n|---|---|---|\n"
        "| `none` | 100 of 100 (96-100 %) | - |\n"
        "| `fastv@0.125` | 56 of 100 (46-65 %) | -44 (-54 to -35), p = 1.1e-13 |\n"
    )
    page = tmp_path / "page.md"
    page.write_text(text)
    assert audit.audit(page) == []
    assert before in text
    page.write_text(text.replace(before, after))
    assert any(message in wrong for wrong in audit.audit(page)), audit.audit(page)


def test_the_audit_writes_what_it_computed(audit, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- rows: mini-oft.csv -->\n| condition | solved |\n|---|---|\n| `fastv@0.125` | ? |\n"
    )
    assert audit.audit(page, write=True) == []
    assert "| `fastv@0.125` | 56 of 100 (46-65 %) |" in page.read_text()


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (3, 1), (1, 17), (0, 12), (20, 20)])
def test_two_ways_to_compute_the_same(recompute, gained, lost):
    pairs = statistics.PairedSuccess(gained, lost, 50)
    assert recompute.mcnemar(gained, lost) == pytest.approx(pairs.p_value())
    ours, theirs = pairs.interval(), recompute.tango(gained, lost, 50)
    assert theirs == (pytest.approx(ours.low, abs=2e-3), pytest.approx(ours.high, abs=2e-3))
    wilson = statistics.wilson(gained, 50)
    assert recompute.wilson(gained, 50) == (pytest.approx(wilson.low), pytest.approx(wilson.high))
    values = [0.03, 0.01, 0.2, 0.04]
    assert recompute.holm(values) == pytest.approx(statistics.holm(values))


def test_commands_of_the_results_are_printed_whole():
    text = (ROOT / "docs" / "results.md").read_text("utf-8")
    entries = re.split(r"\n## (?=\d{4}-)", text.partition("\n## The paper's claims")[0])[1:]
    assert len(entries) > 8
    for entry in entries:
        assert re.search(r"`vla-pruner \w+ [^`]+`", entry), entry.partition("\n")[0]
        assert re.search(r"\]\(\.\./experiments/results/[\w.-]+\)", entry)
