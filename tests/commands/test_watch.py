"""`vla-pruner watch`: an episode of a run, played again, on a page that the report links to."""

import json
import re
from pathlib import Path
from urllib.parse import unquote

import pytest

from toy_task import save_policy
from vla_pruner.cli import main
from vla_pruner.pages.films import first_pruned
from vla_pruner.reports.compare import read_runs
from vla_pruner.runs.video import kept_recording, video_path

SUITE = "toy_task:toy_task"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two scenes on all tokens and on half of them, and films of the first."""
    out = tmp_path_factory.mktemp("watch") / "run"
    policy = save_policy(tmp_path_factory.mktemp("policy"))
    words = ["eval", "--policy", policy, "--suite", SUITE, "--conditions", "none,vla-pruner@0.5"]
    assert main([*words, "--episodes", "2", "--workers", "1", "--out", str(out)]) == 0
    assert main(["watch", str(out), "--scenes", "100"]) == 0
    assert main(["report", str(out)]) == 0
    return out


def page_data(path: Path) -> dict:
    text = path.read_text("utf-8")
    return json.loads(re.search(r'<script id="data"[^>]*>(.*?)</script>', text, re.S)[1])


def test_the_report_opens_the_film_of_a_recorded_episode(run):
    data = page_data(run / "report.html")
    addresses = [
        numbers[6] if len(numbers) == 7 else None
        for condition in data["groups"][0]["conditions"]
        for numbers in condition["runs"]
    ]
    assert [address is not None for address in addresses] == [True, False] * 2
    for address, name in zip(addresses[::2], ["none", "vla-pruner@0.5"], strict=True):
        page, _, wanted = address.partition("#")
        assert unquote(wanted) == f"run={name}"
        assert (run / unquote(page)).exists()
    assert data["watch"].startswith("vla-pruner watch ")


def test_a_film_shows_the_episode_that_the_run_holds(run):
    (page,) = run.glob("films/*/*/100.html")
    text = page.read_text("utf-8")
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|url\((?!#)|@import", text)
    data = page_data(page)
    (scene,) = data["scenes"]
    assert list(scene["runs"]) == ["none", "vla-pruner@0.5"]
    assert data["focus"] == "vla-pruner@0.5"
    stored = {one.condition: one for one in read_runs([run])[0].episodes if one.seed == 100}
    for name, shown in scene["runs"].items():
        recording = shown["recording"]
        assert (shown["success"], shown["steps"]) == (stored[name].success, stored[name].steps)
        assert recording["frames"] == stored[name].steps + 1
        assert [call["step"] for call in recording["calls"]] == [c.step for c in stored[name].calls]
        assert recording["differs"] is None
    back = re.search(r'<a href="([^"]*)">Back to the report', text)[1]
    assert (page.parent / back).resolve() == (run / "report.html").resolve()


def test_a_playing_that_is_another_episode_says_so(run):
    (group,) = read_runs([run])
    path = video_path(run, group.setup, "none", 100)
    kept = kept_recording(path)
    path.with_suffix(".json").write_text(
        json.dumps({**kept, "differs": "in call 2 <b>", "steps": 3})
    )
    try:
        assert main(["report", str(run)]) == 0
        (page,) = run.glob("films/*/*/100.html")
        assert "it is not the episode of the run: in call 2 &lt;b&gt;" in page.read_text("utf-8")
        assert page_data(page)["scenes"][0]["runs"]["none"]["steps"] == 3
    finally:
        path.with_suffix(".json").write_text(json.dumps(kept))


def test_a_damaged_recording_is_no_film(run):
    (group,) = read_runs([run])
    path = video_path(run, group.setup, "none", 100)
    before = path.with_suffix(".json").read_text()
    path.with_suffix(".json").write_text(before[:50])
    try:
        assert kept_recording(path) is None
    finally:
        path.with_suffix(".json").write_text(before)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--scenes", "first"], "--scenes first: name scenes by number"),
        (["--scenes", "107"], "no such episode has finished in"),
        (["--scenes", "100", "--conditions", "fastv@0.5"], "holds none, vla-pruner@0.5"),
        (["--scenes", "100", "--policy", "other"], "nothing of this --policy"),
    ],
)
def test_what_has_not_run_cannot_be_watched(run, capsys, words, message):
    assert main(["watch", str(run), *words]) == 2
    assert message in capsys.readouterr().err


def test_films_start_where_every_pruned_run_has_dropped_tokens():
    def recording(*kept: str) -> dict:
        return {"calls": [{"step": 2 * n, "kept": one} for n, one in enumerate(kept)]}

    full, early, late = recording("44", "44"), recording("40", "40"), recording("44", "44", "04")
    assert first_pruned([full, early, late, None]) == 4
    assert first_pruned([full, early]) == 0
    assert first_pruned([full]) == 0
