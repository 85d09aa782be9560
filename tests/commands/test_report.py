"""Reports: every number from episodes that can be counted by hand, in four formats."""

import csv
import dataclasses
import io
from html.parser import HTMLParser
from pathlib import Path

import pytest

from toy_task import CAMERAS, OBJECTS, STEP_LIMIT, toy_task
from vla_pruner.cli import main
from vla_pruner.episodes.condition import Condition
from vla_pruner.episodes.control import Control
from vla_pruner.episodes.episode import Episode
from vla_pruner.episodes.policy_runner import Call
from vla_pruner.reports.compare import compare, per_task, read_runs, relative, table_one
from vla_pruner.reports.document import Table, Text, to_html, to_latex, to_markdown
from vla_pruner.reports.plots import curves
from vla_pruner.reports.report import blocks_of, rows_of
from vla_pruner.runs.job import Job, Planned, Setup
from vla_pruner.runs.store import Store

NONE, HALF, QUARTER = map(Condition.parse, ["none", "vla-pruner@0.5", "vla-pruner@0.25:window=1"])
EASY = Setup("easy", "toy", "abc", Control(CAMERAS, 2, True), STEP_LIMIT, OBJECTS)
HARD = dataclasses.replace(EASY, suite="hard", stand_in_assets=True)
STAMP = {"date": "2026-01-01", "vla-pruner": "1.2", "commit": "f00", "torch": "2"}
SOLVED = {
    ("easy", "none"): [1, 1, 1, 0],
    ("easy", "vla-pruner@0.5"): [1, 1, 0, 1],
    ("easy", "vla-pruner@0.25:window=1"): [0, 1],
    ("hard", "none"): [1, 0, 0, 0],
    ("hard", "vla-pruner@0.5"): [1, 1, 0, 0],
}


def episode(condition: Condition, seed: int, success: bool) -> Episode:
    full = Call(0, 10.0, condition != NONE, 40, 20, 20, 100, 100)
    cut = Call(2, 5.0, False, 40, 20, 10, 60, 100)
    calls = [full, full if condition == NONE else cut]
    return Episode(condition.name, seed, seed % 2, "lift, please", bool(success), 4, calls)


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    plans = [
        Planned(setup, condition, {}, None, 0, 4)
        for setup in (EASY, HARD)
        for condition in (NONE, HALF, QUARTER)
    ]
    with Store(folder, write=True) as store:
        store.begin(plans, STAMP)
        for plan in plans:
            solved = SOLVED.get((plan.setup.suite, plan.condition.name), [])
            for number, success in enumerate(solved):
                seed = 100 + number
                job = Job(plan, toy_task(), seed)
                store.add(job, episode(plan.condition, seed, bool(success)))
    return folder


def test_relative_accuracy_is_the_mean_over_suites_on_common_scenes(run_folder):
    easy, hard = read_runs([run_folder])
    assert relative(easy, HALF.name) == 3 / 3
    assert relative(hard, HALF.name) == 2 / 1
    assert relative(easy, QUARTER.name) == 1 / 2
    assert relative(hard, QUARTER.name) is None
    lines = table_one({group: group.summary() for group in (easy, hard)})
    assert [(line.label, line.relative_accuracy) for line in lines] == [
        ("all tokens", 1.0),
        ("vla-pruner, 50 %", 1.5),
        ("vla-pruner, 25 %, window 1", None),
    ]
    half = lines[1]
    assert set(half.rows) == {"easy", "hard (stand-in assets)"}
    assert half.prefill_ratio == pytest.approx(0.8)
    assert half.pruned_prefill_ratio == pytest.approx(0.6)
    assert half.speedup == pytest.approx(10 / 7.5)
    assert half.pruned_speedup == pytest.approx(2.0)


def test_pairs_are_taken_with_any_condition(run_folder):
    easy, _ = read_runs([run_folder])
    found = compare(easy, HALF.name)
    assert list(found) == ["all tokens", "vla-pruner, 25 %, window 1"]
    none, quarter = found.values()
    assert (none.gained, none.lost, none.pairs) == (1, 1, 4)
    assert (quarter.gained, quarter.lost, quarter.pairs) == (0, 1, 2)


def test_tasks_are_counted_apart(run_folder):
    easy, hard = read_runs([run_folder])
    assert list(per_task(easy).values()) == [[(2, 2), (1, 2)], [(1, 2), (2, 2)], [(0, 1), (1, 1)]]
    assert per_task(hard)["vla-pruner, 25 %, window 1"] == [(0, 0), (0, 0)]


def test_markdown_says_what_is_missing_and_what_was_measured(run_folder):
    text = to_markdown(blocks_of(read_runs([run_folder]), HALF.name))
    assert "Partial: 2 episodes of toy in easy are missing" in text
    assert "Partial: 4 episodes of toy in hard (stand-in assets) are missing" in text
    assert "Stand-in assets: some objects" in text
    assert (
        "| toy | vla-pruner, 50 % | 75.0 % (3 of 4) | 50.0 % (2 of 4) | 150 % | 80 % | 60 % "
        "| 1.33x | 2.00x |" in text
    )
    assert "### Against vla-pruner@0.5" in text
    assert "| all tokens | 4 | 1 | 1 | +0 points (" in text
    assert "| vla-pruner, 25 %, window 1 | 0 of 1 | 1 of 1 |" in text
    assert "Relative accuracy: mean over suites" in text
    assert "commit: f00" in text


class Page(HTMLParser):
    """What a browser would fetch, and how many rows, shaded cells and plots there are."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched, self.tags, self.shaded = [], [], 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.append(tag)
        self.fetched += [v for k, v in values.items() if k in ("src", "href", "srcset")]
        self.shaded += "background" in (values.get("style") or "") and tag == "td"


def test_the_page_is_self_contained_with_heat_map_and_curves(run_folder):
    text = to_html(blocks_of(read_runs([run_folder])))
    page = Page(text)
    assert page.fetched == []
    assert "script" not in page.tags
    assert page.tags.count("svg") == 4 + 6  # the curves, and two lines in each of their legends
    assert page.shaded == 2 * 3 + 2 * 2
    assert "rgb(56 132 255/0.50)" in text


def test_csv_has_every_condition_once(run_folder):
    rows = rows_of(read_runs([run_folder]))
    assert [(row["suite"], row["name"]) for row in rows] == list(SOLVED)
    assert [row["stand_in_assets"] for row in rows] == [False] * 3 + [True] * 2
    assert rows[1]["pruned_calls.speedup"] == pytest.approx(2.0)


def test_the_command_writes_all_formats(run_folder, tmp_path, capsys):
    out = tmp_path / "report"
    assert main(["report", str(run_folder), "--against", "vla-pruner@0.5", "--out", str(out)]) == 0
    assert {path.name for path in out.iterdir()} == {
        "episodes.csv",
        *(f"report.{e}" for e in ["md", "html", "tex", "csv"]),
    }
    (group, *_) = groups = read_runs([run_folder])
    episodes = list(csv.DictReader((out / "episodes.csv").open()))
    assert len(episodes) == sum(len(group.episodes) for group in groups)
    assert sum(row["success"] == "True" for row in episodes) == sum(
        episode.success for group in groups for episode in group.episodes
    )
    assert {row["weights"] for row in episodes} == {group.setup.weights}
    found = list(csv.DictReader(io.StringIO((out / "report.csv").read_text())))
    assert found[1]["successes"] == "3"
    assert (out / "report.md").read_text() in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{run}", "{run}"], "so does another run"),
        (["{run}", "--against", "fastv@0.5"], "--against fastv@0.5: the runs hold none"),
        (["nowhere"], "make it with `vla-pruner eval`"),
    ],
)
def test_reports_that_cannot_be_made_say_why(run_folder, capsys, words, message):
    assert main(["report", *(word.format(run=run_folder) for word in words)]) == 2
    assert message in capsys.readouterr().err


def test_a_report_needs_neither_recipe_nor_suite(tmp_path):
    condition = Condition("fitprune", 0.5, (("recipe", "gone.json"),))
    plan = Planned(EASY, condition, {}, "cafe", 0, 1)
    with Store(tmp_path, write=True) as store:
        store.begin([plan], STAMP)
        store.add(Job(plan, toy_task(), 100), episode(condition, 100, True))
    (group,) = read_runs([tmp_path])
    assert [row.name for row in group.summary().rows] == ["fitprune@0.5:recipe=gone.json"]


# -- formats -------------------------------------------------------------------------------------


def test_signs_that_mean_something_to_a_format_are_escaped():
    table = Table("50 % & more", ["a_b", "c|d"], [["x<y", "5 %"]])
    assert "| a_b | c\\|d |" in to_markdown([table])
    page = to_html([Text("<script>"), table])
    assert "&lt;script&gt;" in page
    assert "x&lt;y" in page
    latex = to_latex([table])
    assert r"\caption{50 \% \& more}" in latex
    assert r"a\_b & c\textbar{}d \\" in latex
    assert r"x\textless{}y & 5 \% \\" in latex


def test_latex_tables_have_as_many_columns_as_they_say():
    latex = to_latex([Table("t", ["a", "b", "c"], [["1", "2", "3"]])])
    assert r"\begin{tabular}{lrr}" in latex
    rows = [line for line in latex.splitlines() if line.endswith(r"\\")]
    assert [line.count("&") for line in rows] == [2, 2]
    assert latex.count(r"\begin{") == latex.count(r"\end{")


def test_a_curve_is_higher_where_the_value_is():
    svg = curves({"m": [(0.0, 0.0, 0.0, 0.5), (1.0, 1.0, 0.5, 1.0)]}, x_label="x")
    path = svg.partition("<path d='")[2].partition("'")[0]
    (_, low), (_, high) = [tuple(map(float, p[1:].split(","))) for p in path.split()]
    assert high < low
    assert svg.count("<circle") == 2
