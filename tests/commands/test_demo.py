"""`vla-pruner demo` from arguments to the report, without a simulator."""

import argparse
import base64
import csv
import dataclasses
import io
import json
import re
import sqlite3
from contextlib import closing
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from toy_task import ToyScene, save_policy, toy_task
from vla_pruner.commands import demo
from vla_pruner.pages.engine import script_json
from vla_pruner.runs.store import FILE

CONDITIONS = ["none", "vla-pruner@0.5", "vla-pruner@0.25"]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_policy(tmp_path_factory.mktemp("policy"))


def arguments(policy: str, out: Path, *more: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return parser.parse_args(["--policy", policy, "--out", str(out), "--episodes", "2", *more])


def run(args: argparse.Namespace, scene: ToyScene | None = None) -> tuple[int, str]:
    console = Console(file=io.StringIO(), width=80)
    code = demo.demo(args, toy_task(scene), console)
    return code, console.file.getvalue()


def kept_episodes(out: Path) -> list[tuple]:
    """Condition, seed and calls of each episode in the store, oldest first."""
    with closing(sqlite3.connect(out / FILE)) as base:
        return list(base.execute("SELECT condition, seed, calls FROM episodes ORDER BY rowid"))


class InterruptedScene(ToyScene):
    """Ctrl-C arrives when the scene has been reset a number of times."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after = after

    def reset(self, seed: int, target: int) -> dict:
        if len(self.resets) == self.after:
            raise KeyboardInterrupt
        return super().reset(seed, target)


class Page(HTMLParser):
    """Everything in a page that a browser would fetch, its table, and its data."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.rows = 0
        self.downloads: dict[str, str] = {}
        self.stack: list[dict] = []
        self.data = ""
        self.text = path.read_text("utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.fetched += [v for k, v in values.items() if k in ("src", "href", "srcset")]
        self.rows += "data-condition" in values
        if "download" in values:
            self.downloads[values["download"]] = values["href"]
        self.in_data = values.get("id") == "data"

    def handle_data(self, text):
        if getattr(self, "in_data", False):
            self.data += text


@pytest.fixture(scope="module")
def report(policy: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("demo") / "report"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "_TIMED_MS", 1e9)  # however busy the machine is
        code, text = run(arguments(policy, out))
    assert code == 0
    return out, text


def test_the_report_has_its_files_and_the_terminal_its_table(report):
    out, text = report
    assert {path.name for path in out.iterdir()} == {
        "index.html",
        "results.json",
        "results.csv",
        "episodes.csv",
        "episodes.sqlite",
        "episodes.sqlite.lock",
        "observations",
        "recordings",
    }
    results = json.loads((out / "results.json").read_text())
    assert results["complete"]
    assert [row["name"] for row in results["rows"]] == CONDITIONS
    assert results["command"].startswith("vla-pruner demo --method vla-pruner --keep 0.5 0.25")
    assert {"torch", "cpu", "commit"} <= set(results["environment"])
    assert len(list(csv.DictReader((out / "episodes.csv").open()))) == 6
    assert "all tokens" in text
    assert "Report: file://" in text


def test_latency_is_that_of_replays_in_turn(report):
    out, text = report
    results = json.loads((out / "results.json").read_text())
    apart = results["measured_apart"]
    assert list(apart) == CONDITIONS
    (calls,) = {timing["every"]["calls"] for timing in apart.values()}
    (rounds,) = {timing["rounds"] for timing in apart.values()}
    assert calls == len(results["episodes"][0]["calls"]["latency_ms"])
    assert rounds == demo._ROUNDS
    page = Page(out / "index.html").text
    for timing in apart.values():
        assert f"{timing['every']['median_ms']:.1f} ms" in page
    fewest = apart["vla-pruner@0.25"]["every"]["speedup"]
    assert f"{fewest:.2f}x" in page
    assert f"the {calls} calls of the first scene in turn, {rounds} times" in page
    assert f"{fewest:.2f}" in text
    (row,) = [
        row
        for row in csv.DictReader((out / "results.csv").open())
        if row["name"] == "vla-pruner@0.25"
    ]
    assert float(row["apart.every.speedup"]) == fewest


def test_calls_that_take_long_are_not_replayed(policy, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "_TIMED_MS", 1e-3)
    scene = ToyScene()
    code, text = run(arguments(policy, tmp_path / "report"), scene)
    assert code == 0
    assert len(scene.resets) == 3 + 6
    results = json.loads((tmp_path / "report" / "results.json").read_text())
    assert results["measured_apart"] == {}
    assert f"{results['rows'][0]['all_calls']['median_ms']:.1f}" in text
    assert "bootstrap over scenes" in Page(tmp_path / "report" / "index.html").text


def test_ctrl_c_among_the_replays_leaves_the_episodes_latencies(policy, tmp_path, monkeypatch):
    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "report"
    with monkeypatch.context() as patch:
        patch.setattr(demo, "measure", interrupt)
        code, _ = run(arguments(policy, out))
    assert code == demo.INTERRUPTED
    results = json.loads((out / "results.json").read_text())
    assert results["complete"] and results["measured_apart"] == {}
    assert run(arguments(policy, out, "--resume"))[0] == 0
    results = json.loads((out / "results.json").read_text())
    assert list(results["measured_apart"]) == CONDITIONS
    kept = results["measured_apart"]

    more = ["--resume", "--keep", "0.5", "0.25", "4"]
    with monkeypatch.context() as patch:
        patch.setattr(demo, "measure", interrupt)
        assert run(arguments(policy, out, *more))[0] == demo.INTERRUPTED
    # Nothing of what was timed without the new condition stands beside its closed-loop latency.
    assert json.loads((out / "results.json").read_text())["measured_apart"] == {}

    assert run(arguments(policy, out, "--resume"))[0] == 0
    assert json.loads((out / "results.json").read_text())["measured_apart"] == kept


def test_the_page_loads_nothing(report):
    page = Page(report[0] / "index.html")
    assert page.fetched
    assert all(address.startswith("data:") for address in page.fetched)
    style = page.text.split("<style>")[1].split("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    script = page.text.rsplit("<script>")[1]
    assert not re.search(
        r"https?://(?!www\.w3\.org/2000/svg)|fetch\(|XMLHttpRequest|import\(", script
    )
    assert not re.search(r"\{\{|\{%", page.text.split("<script")[0])


def test_the_page_shows_every_run_of_every_scene(report):
    out, _ = report
    page = Page(out / "index.html")
    data = json.loads(page.data)
    assert page.rows == len(CONDITIONS)
    assert [c["name"] for c in data["conditions"]] == CONDITIONS
    assert [scene["name"] for scene in data["scenes"]] == ["cup", "plate"]
    for scene in data["scenes"]:
        assert set(scene["runs"]) == set(CONDITIONS)
        for run in scene["runs"].values():
            assert run["recording"]["frames"] == run["steps"] + 1
    assert "2 of 2" in page.text


def test_films_wait_at_a_call_that_drops_tokens(report):
    data = json.loads(Page(report[0] / "index.html").data)
    for scene in data["scenes"]:
        assert scene["start"] > 0
        for name in CONDITIONS[1:]:
            calls = scene["runs"][name]["recording"]["calls"]
            now = [call for call in calls if call["step"] <= scene["start"]][-1]
            assert "0" in now["kept"] and not now["warm_up"]
    assert "play(true)" not in Page(report[0] / "index.html").text


def test_a_film_has_what_its_time_line_shows(report):
    data = json.loads(Page(report[0] / "index.html").data)
    for scene in data["scenes"]:
        for run in scene["runs"].values():
            for call in run["recording"]["calls"]:
                assert call["latency_ms"] > 0
                assert [len(action) for action in call["actions"]] == [7] * len(call["actions"])
                assert len(call["actions"]) == 2, "those that were carried out"


def test_the_page_leads_with_what_was_found(report):
    text = Page(report[0] / "index.html").text
    best = re.search(r"<h1>(.*?)</h1>", text)[1]
    assert re.match(r"With \d+ % of its visual tokens the policy solves", best)
    assert (
        text.index("<h1>")
        < text.index("class='answers'".replace("'", '"'))
        < text.index('id="watch"')
    )
    assert ("Why it is no faster" in text) == ("no faster here" in best)
    if "no faster here" in best:
        assert "4 layers of width 32" in text


def test_the_page_carries_the_numbers_as_files(report):
    out, _ = report
    downloads = Page(out / "index.html").downloads
    content = base64.b64decode(downloads["results.csv"].split(",")[1]).decode()
    assert content == (out / "results.csv").read_text()
    results = json.loads(base64.b64decode(downloads["results.json"].split(",")[1]))
    assert results["rows"] == json.loads((out / "results.json").read_text())["rows"]


def test_text_cannot_end_the_script_it_stands_in():
    text = script_json({"instruction": "</script><script>alert(1)</script>"})
    assert "<" not in text
    assert json.loads(text)["instruction"].startswith("</script>")


def test_ctrl_c_leaves_a_valid_report_that_resume_completes(policy, tmp_path):
    out = tmp_path / "report"
    scene = InterruptedScene(after=3 + 4)  # three warm-ups, then four episodes
    code, text = run(arguments(policy, out), scene)
    assert code == demo.INTERRUPTED
    assert "Interrupted after 4 of 6 episodes" in text
    assert "--resume" in text
    assert scene.closed
    page = Page(out / "index.html")
    assert "Partial report: 4 of 6" in page.text
    assert not json.loads((out / "results.json").read_text())["complete"]
    assert sum(len(s["runs"]) for s in json.loads(page.data)["scenes"]) == 4

    before = kept_episodes(out)
    scene = ToyScene()
    code, _ = run(arguments(policy, out, "--resume"), scene)
    assert code == 0
    # Two conditions warm up, two episodes were missing, one is seen again to be replayed.
    assert len(scene.resets) == 2 + 2 + 1
    assert kept_episodes(out)[:4] == before
    page = Page(out / "index.html")
    assert "Partial report" not in page.text
    assert all(len(scene["runs"]) == 3 for scene in json.loads(page.data)["scenes"])


def test_ctrl_c_before_the_first_episode_leaves_a_report_too(policy, tmp_path):
    code, _ = run(arguments(policy, tmp_path / "report"), InterruptedScene(after=0))
    assert code == demo.INTERRUPTED
    page = Page(tmp_path / "report" / "index.html")
    assert "No episode has finished yet" in page.text
    assert json.loads(page.data)["scenes"] == []


def test_an_earlier_report_is_set_aside(policy, tmp_path):
    out = tmp_path / "report"
    for episodes in ("1", "2", "1"):
        run(arguments(policy, out, "--episodes", episodes, "--keep", "0.5"))
    count = [len(kept_episodes(folder)) for folder in (out, tmp_path / "report.previous")]
    assert count == [2, 4]


def test_a_folder_with_other_things_is_not_touched(policy, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="no demo report"):
        run(arguments(policy, tmp_path))
    with pytest.raises(ValueError, match="nothing to continue"):
        run(arguments(policy, tmp_path, "--resume"))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--method", "none"], "name a method that prunes"),
        (["--keep", "0.5", "0.5"], "there twice"),
        (["--keep", "1.5"], r"\(0, 1\]"),
        (["--keep", "half"], "a fraction such as"),
        (["--method", "vlapruner"], "did you mean"),
        (["--episodes", "11"], "there are 10 scenes"),
    ],
)
def test_impossible_arguments_are_explained(policy, tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        run(arguments(policy, tmp_path / "report", *more))
    assert not (tmp_path / "report").exists()


def test_amounts_may_be_separated_by_commas(policy, tmp_path):
    run(arguments(policy, tmp_path / "report", "--episodes", "1", "--keep", "0.5,4"))
    rows = json.loads((tmp_path / "report" / "results.json").read_text())["rows"]
    assert [row["visual_kept"] for row in rows] == [32, 16, 4]


def test_the_policy_of_another_suite_is_refused(tmp_path):
    """Before the simulator is asked for anything: it would solve none of these scenes."""
    suite = dataclasses.replace(toy_task(), name="robosuite_pickplace")
    args = arguments("mini-oft-libero", tmp_path / "report")
    with pytest.raises(ValueError, match=r"was trained for libero_spatial.*name one of these with"):
        demo.demo(args, suite, Console(file=io.StringIO()))
    assert not (tmp_path / "report").exists()
