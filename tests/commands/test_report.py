"""Reports: every number from episodes that can be counted by hand, in four formats."""

import csv
import dataclasses
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from toy_task import CAMERAS, OBJECTS, STEP_LIMIT, toy_task
from vla_pruner.cli import main
from vla_pruner.episodes.condition import Condition
from vla_pruner.episodes.control import Control
from vla_pruner.episodes.episode import Episode
from vla_pruner.episodes.policy_runner import Call
from vla_pruner.pages.report_page import aligned, report_page
from vla_pruner.reports.compare import compare, per_task, read_runs, relative, table_one
from vla_pruner.reports.document import Table, Text, to_markdown
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
    """What a browser would fetch of a page, its rows of dots, its shaded cells, and its data."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched, self.tags, self.shaded, self.rows, self.inputs = [], [], 0, [], []
        self.data, self._in_data = "", False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.append(tag)
        self.fetched += [v for k, v in values.items() if k in ("src", "href", "srcset")]
        self.shaded += "background" in (values.get("style") or "") and tag == "td"
        self._in_data = values.get("id") == "data"
        if tag == "tr" and "data-condition" in values:
            self.rows.append((values["data-condition"], values["data-method"]))
        if tag == "input":
            self.inputs.append((values["name"], values["value"]))

    def handle_data(self, text):
        if self._in_data:
            self.data += text


def page_of(run_folder: Path, **more) -> tuple[str, Page]:
    groups = read_runs([run_folder])
    text = report_page(groups, blocks_of(groups), **more)
    return text, Page(text)


def test_the_page_is_self_contained(run_folder):
    text, page = page_of(run_folder, files={"report.csv": "a,b"})
    assert page.fetched and all(one.startswith(("data:", "#")) for one in page.fetched)
    assert not re.search(
        r"https?://(?!www\.w3\.org/2000/svg)|url\((?!#)|@import|fetch\(|XMLHttpRequest|import\(",
        text,
    )
    assert page.tags.count("svg") == 4 + 2 + 1  # the curves, and the lines of two legends


def test_the_page_has_a_row_of_dots_for_every_condition_of_every_suite(run_folder):
    text, page = page_of(run_folder)
    easy = [("none", "none"), ("vla-pruner@0.5", "vla-pruner")]
    assert page.rows == [*easy, ("vla-pruner@0.25:window=1", "vla-pruner"), *easy]
    for number in ("3 of 4", "1 of 2", "2.00x", "±0 points", "Partial: 2 episodes of toy in easy"):
        assert number in text


def test_conditions_can_be_chosen_by_budget_and_by_method(run_folder):
    _, page = page_of(run_folder)
    assert [one for one in page.inputs if one[0] != "order"] == [
        ("budget", "50 %"),
        ("budget", "25 %"),
        ("method", "vla-pruner"),
    ]


def test_tables_shade_tasks_by_their_success(run_folder):
    text, page = page_of(run_folder)
    assert page.shaded == 2 * 3 + 2 * 2
    assert "background:rgb(var(--shade)/0.23)" in text  # half of the darkest, 0.45


def test_every_episode_is_in_the_page_with_its_film_if_there_is_one(run_folder):
    groups = read_runs([run_folder])
    films = {groups[0]: {("none", 101): "films/toy/101.html#run=none"}}
    page = Page(report_page(groups, blocks_of(groups), films=films, watch="vla-pruner watch run"))
    data = json.loads(page.data)
    easy, hard = data["groups"]
    assert data["watch"] == "vla-pruner watch run"
    runs = {one["name"]: one["runs"] for one in easy["conditions"]}
    assert runs["none"][0] == [100, 1, 4, 2, 0, 0]
    assert runs["none"][1] == [101, 1, 4, 2, 0, 1, "films/toy/101.html#run=none"]
    assert runs["vla-pruner@0.5"][2] == [102, 0, 4, 2, 1, 0]
    assert [one["budget"] for one in easy["conditions"]] == ["all", "50 %", "25 %"]
    assert len(hard["conditions"]) == 2


def test_names_from_elsewhere_cannot_become_part_of_the_page(tmp_path):
    bad = "</script><img src=x onerror=alert(1)>"
    setup = dataclasses.replace(EASY, policy=f"evil{bad}", tasks=(bad, "<b>"))
    plans = [Planned(setup, one, {}, None, 0, 1) for one in (NONE, HALF)]
    with Store(tmp_path, write=True) as store:
        store.begin(plans, {**STAMP, "cpu": bad})
        for plan in plans:
            store.add(Job(plan, toy_task(), 100), episode(plan.condition, 100, True))
    text, page = page_of(tmp_path, watch=f"vla-pruner watch {bad}")
    assert "img" not in page.tags and "b" in page.tags
    assert "<img" not in text
    assert json.loads(page.data)["groups"][0]["tasks"] == [bad, "<b>"]


def test_columns_of_numbers_are_told_from_columns_of_words():
    table = Table("t", ["a", "b", "c", "d"], [["x", "5 %", "-", "fast"], ["y", "+3", "12", "1"]])
    assert aligned(table) == [False, True, True, False]


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


def test_signs_that_mean_something_to_markdown_are_escaped():
    assert "| a_b | c\\|d |" in to_markdown([Table("t", ["a_b", "c|d"], [["x<y", "5 %"]])])
    assert to_markdown([Text("plain")]) == "plain\n"
