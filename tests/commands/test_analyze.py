"""`vla-pruner analyze` from arguments to the page, without a simulator."""

import argparse
import csv
import html
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from toy_task import VISUAL, ToyScene, save_policy, toy_task
from vla_pruner.analysis import page
from vla_pruner.analysis.record import Trace
from vla_pruner.commands import analyze as command
from vla_pruner.reports.summary import percent

KEPT = {"vla-pruner@0.25": 8, "fastv@0.25": 8}


class InterruptedScene(ToyScene):
    """Ctrl-C arrives when the second episode starts."""

    def reset(self, seed: int, target: int) -> dict:
        if self.resets:
            raise KeyboardInterrupt
        return super().reset(seed, target)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_policy(tmp_path_factory.mktemp("policy"))


def run(policy: str, out: Path, *more: str, scene: ToyScene | None = None) -> tuple[int, str]:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    words = ["--policy", policy, "--out", str(out), "--episodes", "2", *more]
    console = Console(file=io.StringIO(), width=80)
    code = command.analyze(parser.parse_args(words), toy_task(scene), console)
    return code, console.file.getvalue()


@pytest.fixture(scope="module")
def analysis(policy: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Interrupted after the first of two episodes, then continued."""
    out = tmp_path_factory.mktemp("analysis") / "page"
    scene = InterruptedScene()
    code, text = run(policy, out, scene=scene)
    assert code == 130
    assert scene.closed
    assert "after 1 of 2 episodes" in text
    assert "Partial" in (out / "index.html").read_text("utf-8")
    first = (out / "traces" / "100.npz").read_bytes()
    code, text = run(policy, out, "--resume")
    assert code == 0
    assert "Analysis: file://" in text
    assert (out / "traces" / "100.npz").read_bytes() == first
    return out


def rows(out: Path, name: str) -> list[dict[str, str]]:
    return list(csv.DictReader((out / f"{name}.csv").open()))


def test_a_trace_holds_the_scores_of_all_tokens_and_what_methods_keep(analysis: Path) -> None:
    trace = Trace.load(analysis / "traces" / "100.npz")
    calls = len(trace.steps)
    assert trace.success
    assert trace.steps.tolist() == [0, 2, 4, 6]
    for scores in (trace.semantic, trace.action):
        assert scores.shape == (calls, VISUAL)
        assert (scores > 0).all()
    assert trace.frames.shape == (calls, 2, 112, 112, 3)
    assert trace.frames.std() > 0
    for name, kept in KEPT.items():
        replay = trace.replays[name]
        sizes = np.where(replay.full, VISUAL, kept)
        assert replay.kept.sum(axis=1).tolist() == sizes.tolist()
    assert trace.replays["vla-pruner@0.25"].full.tolist() == [True, True, True, False]
    assert not trace.replays["fastv@0.25"].full.any()


def test_fastv_keeps_the_same_when_the_full_policy_drives(analysis: Path) -> None:
    first, second = (Trace.load(analysis / "traces" / f"{seed}.npz") for seed in (100, 101))
    assert not np.array_equal(first.semantic[0], second.semantic[0])
    assert first.replays["vla-pruner@0.25"].forecast is not None
    assert first.replays["fastv@0.25"].forecast is None


def test_tables_cover_every_call_and_stay_in_range(analysis: Path) -> None:
    steps = rows(analysis, "steps")
    assert len(steps) == 8
    assert [row["consecutive"] == "" for row in steps[:4]] == [True, False, False, False]
    assert all(0 <= float(row["prefill_action"]) <= 1 for row in steps)
    assert all(1 <= float(row["pool_ratio"]) <= 2 for row in steps if row["pool_ratio"])
    first = Trace.load(analysis / "traces" / f"{steps[0]['seed']}.npz")
    assert float(steps[0]["prefill_visual"]) == pytest.approx(float(first.semantic[0].sum()))
    assert all(0 < float(row["action_visual"]) < 1 for row in steps)
    predictors = {row["predictor"]: row for row in rows(analysis, "forecasts")}
    assert {"last step", "window w=3 gamma=0.8", "vla-pruner", "vla-pruner (carry)"} <= set(
        predictors
    )
    # The first pruned call follows full ones alone: nothing has been censored yet.
    paper, session = predictors["window w=3 gamma=0.8"], predictors["vla-pruner"]
    assert session["calls"] == "2"
    assert float(session["missed"]) == float(paper["missed"])
    assert float(session["distance"]) == pytest.approx(float(paper["distance"]), abs=1e-5)
    pairs = {(row["a"], row["b"]) for row in rows(analysis, "agreement")}
    assert ("vla-pruner", "fastv") in pairs


def test_the_page_is_small_and_loads_nothing(analysis: Path) -> None:
    text = (analysis / "index.html").read_text("utf-8")
    assert len(text) < 3_000_000
    addresses = re.findall(r"""(?:src|href)=["']([^"']*)["']""", text)
    assert len(addresses) >= 5
    assert all(address.startswith(("data:", "#")) for address in addresses)
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|url\((?!#)|@import|fetch\(", text)
    assert "Partial" not in text
    assert "nan" not in re.sub(r"data:[^\"]*", "", text).lower().split()


def data_of(out: Path) -> dict:
    text = (out / "index.html").read_text("utf-8")
    return json.loads(re.search(r'<script id="data"[^>]*>(.*?)</script>', text, re.S)[1])


def test_headings_say_what_was_found(analysis: Path) -> None:
    text = html.unescape((analysis / "index.html").read_text("utf-8"))
    overlaps = {row["measure"]: float(row["mean"]) for row in rows(analysis, "overlaps")}
    share = percent(overlaps["prefill_action"])
    assert f"<h1>Of the patches that the prompt looks at most, the actions look at {share}" in text
    best = min(rows(analysis, "forecasts"), key=lambda row: float(row["missed"]))
    assert (
        f"The best forecast, {best['predictor']}, misses {percent(float(best['missed']))}" in text
    )
    most = max(rows(analysis, "agreement"), key=lambda row: float(row["mean"]))
    assert f"{most['a']} and {most['b']} keep most in common" in text
    between = overlaps["consecutive"]
    word = "more" if between > overlaps["prefill_action"] else "less"
    assert f"share {percent(between)} of their best patches, {word} than" in text


def test_headings_claim_nothing_where_nothing_was_measured() -> None:
    empty = [{"measure": m, "keep": 0.5, "mean": None} for m in ("prefill_action", "consecutive")]
    assert page.headline(empty) == "What the policy looks at"
    assert page.overlap_heading(empty) == "Overlap of prefill and action attention"
    assert page.forecast_heading([]) == "How well the next step's attention can be forecast"
    assert page.agreement_heading([]) == "Agreement of the methods"
    assert "less than" in page.overlap_heading(
        [
            {"measure": "prefill_action", "keep": 0.5, "mean": 0.8},
            {"measure": "consecutive", "keep": 0.5, "mean": 0.3},
        ]
    )


def test_columns_of_numbers_stand_to_the_right(analysis: Path) -> None:
    text = (analysis / "index.html").read_text("utf-8")
    table = text[text.index("Errors of forecasts") :].partition("</table>")[0]
    cells = re.findall(r"<td([^>]*)>([^<]*)</td>", table)
    assert len(cells) >= 10
    assert all('class="num tight"' in attributes for attributes, _ in cells)
    decimals = {len(cell.partition(".")[2]) for _, cell in cells if "." in cell}
    assert decimals == {3}


def test_films_show_what_each_method_keeps_of_the_same_images(analysis: Path) -> None:
    data = data_of(analysis)
    trace = Trace.load(analysis / "traces" / "100.npz")
    scene = data["scenes"][0]
    assert [one["name"] for one in data["conditions"]] == ["all tokens", *KEPT]
    assert len(scene["sheets"]) == 2 and all(one.startswith("data:") for one in scene["sheets"])
    for name in KEPT:
        calls = scene["runs"][name]["recording"]["calls"]
        kept = [[one != "0" for one in call["kept"]] for call in calls]
        assert np.array_equal(kept, trace.replays[name].kept)
    assert scene["runs"]["all tokens"]["recording"]["calls"][0]["semantic"]
    assert scene["start"] == 3, "the first call that both prune"


def test_impossible_requests_are_refused(policy: str, analysis: Path, tmp_path: Path) -> None:
    for words, message in (
        (["--methods", "none"], "leave it out"),
        (["--methods", "fastv,fastv"], "there twice"),
        (["--methods", "fast"], "fast"),
        (["--resume"], "nothing to continue"),
        (["--keep", "400"], r"vla-pruner@400: keeping 400 tokens asks for more than the 32 visual"),
        (["--methods", "fitprune"], r"fitprune@0\.25: .*needs a calibration recipe"),
        (["--layer", "4"], "vla-pruner@0.25: .*4 layers"),
    ):
        with pytest.raises(ValueError, match=message):
            run(policy, tmp_path / "new", *words)
        assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="another replays"):
        run(policy, analysis, "--resume", "--keep", "0.5")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="no analysis"):
        run(policy, tmp_path / "other")


def test_methods_are_compared_with_the_oracle(policy: str, tmp_path: Path) -> None:
    words = ["--episodes", "1", "--methods", "fastv", "--oracle", "--stride", "4"]
    assert run(policy, tmp_path / "page", *words)[0] == 0
    best = Trace.load(tmp_path / "page" / "traces" / "100.npz").replays["oracle@0.25"]
    assert (best.kept.sum(axis=1) == 8).all()
    (row,) = rows(tmp_path / "page", "agreement")
    assert {row["a"], row["b"]} == {"fastv", "oracle"}
    assert 0 <= float(row["mean"]) < 1
    with pytest.raises(ValueError, match="another stride"):
        run(policy, tmp_path / "page", *words[:-1], "2", "--resume")


def test_agreement_is_drawn_as_a_square(analysis: Path) -> None:
    text = (analysis / "index.html").read_text("utf-8")
    square = re.search(r'<table class="plain cards square">(.*?)</table>', text, re.S)[1]
    names = re.findall(r'<th scope="row">(.*?)</th>', square)
    assert names == re.findall(r'<th scope="col"[^>]*>([^<]+)</th>', square)
    cells = re.findall(r"<td[^>]*>(.*?)</td>", square)
    assert len(cells) == len(names) ** 2
    for row in rows(analysis, "agreement"):
        a, b = names.index(row["a"]), names.index(row["b"])
        expected = f"{float(row['mean']):.2f}"
        assert cells[a * len(names) + b] == cells[b * len(names) + a] == expected
