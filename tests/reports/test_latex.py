"""LaTeX: booktabs, captions, labels; grouped by budget, the best in bold; never too wide."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from vla_pruner.episodes.condition import Condition
from vla_pruner.episodes.control import Control
from vla_pruner.episodes.episode import Episode
from vla_pruner.episodes.policy_runner import Call
from vla_pruner.reports.compare import Group
from vla_pruner.reports.document import Heading, Items, Table, Text, to_markdown
from vla_pruner.reports.latex import escape, group_table, to_latex
from vla_pruner.reports.report import blocks_of
from vla_pruner.runs.job import Setup

NAMES = ["none", "fastv@0.5", "vla-pruner@0.5", "vla-pruner@0.25:window=1", "fastv@64"]
WON = {"none": 4, "fastv@0.5": 1, "vla-pruner@0.5": 3, "vla-pruner@0.25:window=1": 2, "fastv@64": 2}
TASKS = (
    "put both the alphabet soup and the tomato sauce in the basket",
    '50% off_& #1 {set} $x^2$ ~ \\ <tag> "quoted"',
)


@pytest.fixture(scope="module")
def group() -> Group:
    setup = Setup("a_suite", "my_policy", "abc", Control(("front",), 2, True), 9, TASKS)
    speed = {"none": 10.0, "fastv@0.5": 5.0}
    episodes = [
        Episode(
            name,
            seed,
            seed % 2,
            "lift",
            seed < WON[name],
            4,
            [Call(0, speed.get(name, 8.0), False, 300, 256, 99, 60, 100)],
        )
        for name in NAMES
        for seed in range(4)
    ]
    return Group(setup, [Condition.parse(name) for name in NAMES], episodes, 20, [])


def test_rows_are_grouped_by_budget_and_the_best_is_bold(group):
    latex = group_table(group, "tab:one")
    assert re.findall(r"\\itshape ([^}]*)", latex) == [
        r"50 \% of 256 visual tokens",
        r"25 \% of 256 visual tokens",
        "64 of 256 visual tokens",
    ]
    assert r"all tokens & 100.0 &  &  &  \\" in latex
    assert r"vla-pruner & \textbf{75.0} & $-25$ & 1.25$\times$ & 1.25$\times$ \\" in latex
    assert r"fastv & 25.0 & $-75$ & \textbf{2.00$\times$} & \textbf{2.00$\times$} \\" in latex
    # Alone in its budget, a row is not the best of anything.
    assert r"vla-pruner, window 1 & 50.0 &" in latex


def test_every_table_has_booktabs_a_caption_and_a_label_of_its_own(group):
    latex = to_latex([group], blocks_of([group]))
    tables = re.findall(r"\\begin\{(table\*?)\}.*?\\end\{\1\}", latex, flags=re.S)
    assert tables.count("table") == 1 and tables.count("table*") == 3
    for part in ("toprule", "midrule", "bottomrule", "caption{", "label{"):
        assert latex.count("\\" + part) >= len(tables), part
    assert r"\hline" not in latex and "(U+" not in latex
    labels = re.findall(r"\\label\{(.*?)\}", latex)
    assert len(set(labels)) == len(tables)
    assert all(re.fullmatch(r"tab:[a-z0-9-]+", label) for label in labels)


def test_rows_have_as_many_cells_as_columns(group):
    for body in re.findall(
        r"\\begin\{tabular\}\{(.*?)\\end\{tabular\}", to_latex([group], []), re.S
    ):
        columns = len(re.search(r"@\{\}([lr]+)@\{\}", body)[1])
        rows = [line for line in body.splitlines() if line.endswith(r"\\")]
        plain = [line for line in rows if "multicolumn" not in line]
        assert {line.count(" & ") for line in plain} == {columns - 1}


def test_signs_that_mean_something_are_printed():
    assert escape("a_b & 5 % < {x}") == r"a\_b \& 5 \% \textless{} \{x\}"
    assert escape("\\input{evil}\n^") == r"\textbackslash{}input\{evil\} \textasciicircum{}"
    assert escape("−3 ± 1") == "$-$3 $\\pm$ 1"  # noqa: RUF001


ODD = [
    "[a]",
    "*b",
    "a_b & c",
    "50 %",
    "#1 $x$",
    "{x}~^",
    "\\foo",
    "|<>|",
    "naïve",
    "→ µ 日本",
    "«Ð»",
    "\x07",
]


def test_signs_that_a_font_may_lack_and_those_that_join():
    assert escape("→ é") == "(U+2192) é" and escape("a\x07") == "a(U+0007)"
    assert escape("--keep a---b ?`") == "-{}-keep a-{}-{}-b ?{}`"
    assert escape("[1cm]") == "{}[1cm]" and escape("*") == "{}*"  # After the end of a row.


def test_sentences_cannot_leave_their_comment():
    latex = to_latex([], [Text("a\n\\end{document}"), Items(["b\n\\input{x}"])])
    lines = latex.splitlines()
    assert "% a \\end{document}" in lines and "% b \\input{x}" in lines


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex to compile tables with")
@pytest.mark.parametrize("columns", ["onecolumn", "twocolumn"])
def test_it_compiles_and_fits(group, tmp_path: Path, columns):
    if subprocess.run(["kpsewhich", "booktabs.sty"], capture_output=True).returncode:
        pytest.skip("pdflatex has no booktabs")
    wide = Table("wide", [f"a long column {n}" for n in range(20)], [["x" * 12] * 20])
    odd = Table(" ".join(ODD), ["name", "x"], [[cell, cell] for cell in ODD])
    long = Table("long", ["name"], [[f"row {n}"] for n in range(140)])
    blocks = [*blocks_of([group]), wide, odd, long]
    (tmp_path / "report.tex").write_text(to_latex([group], blocks), "utf-8")
    (tmp_path / "paper.tex").write_text(
        rf"\documentclass[{columns}]{{article}}\usepackage{{booktabs,graphicx}}"
        r"\begin{document}\input{report.tex}\end{document}"
    )
    command = ["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "paper.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:]
    log = (tmp_path / "paper.log").read_text(errors="replace")
    assert "Overfull" not in log and "Float too large" not in log
    assert (tmp_path / "paper.pdf").stat().st_size > 10_000


def test_odd_names_do_not_leave_their_cell_in_markdown():
    table = Table("t", ["a|b"], [["x\ny"], ["<script>alert(1)</script>"], ["p < 0.05"]])
    text = to_markdown([Heading("one\n# two"), Items(["a\n* b"]), table])
    assert text.splitlines() == [
        "## one # two",
        "",
        "* a * b",
        "",
        "| a\\|b |",
        "| --- |",
        "| x y |",
        "| \\<script>alert(1)\\</script> |",
        "| p < 0.05 |",
    ]
