"""Figures of pages that `experiments/audit.py` does not read are those of committed rows."""

import csv
import importlib
import re
import sys
from collections import defaultdict
from pathlib import Path
from statistics import median
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
DOCS, RESULTS = ROOT / "docs", ROOT / "experiments" / "results"

ELSEWHERE = {
    "adding-a-method.md": "examples of a short form, no measurement",
    "analysis.md": "below",
    "composing.md": "tests/composing holds each row to its bound",
    "evaluating.md": "tests that were run, with setting, date and versions",
    "faq.md": "audit.py's mini-oft-latency.csv, and published.py below",
    "lerobot.md": "published.py, below",
    "libero.md": "episodes that were recorded, with date and versions",
    "methods-compared.md": "below",
    "paper-numbers.md": "tests/measure/test_paper.py",
    "policies/index.md": "published.py, below",
    "policies/openpi.md": "published.py, below",
    "serve/README.md": "limits, no measurement",
    "serving.md": "on paper, and below",
    "tune.md": "below",
}
"""Pages with figures: what holds them to what was measured."""


def script(name: str) -> ModuleType:
    """A module of experiments/."""
    sys.path.insert(0, str(ROOT / "experiments"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(ROOT / "experiments"))


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as opened:
        return list(csv.DictReader(opened))


def printed(page: str) -> str:
    return " ".join((DOCS / page).read_text("utf-8").split())


def test_every_page_with_figures_is_held_to_something() -> None:
    pytest.importorskip("scipy", reason="needs the extra sim, which brings scipy")
    audit = script("audit")
    held = {str(page.relative_to(ROOT)) for page in audit.PAGES}
    figure = re.compile(r"\d+ of \d+|\d+(?:\.\d+)? ?%|\d+\.\d+x\b")
    for page in sorted(DOCS.rglob("*.md")):
        name = str(page.relative_to(DOCS))
        if f"docs/{name}" in held or name.startswith("methods/"):
            continue
        text = re.sub(r"```.*?```|`[^`]*`", " ", page.read_text("utf-8"), flags=re.S)
        assert not figure.search(text) or name in ELSEWHERE, f"{name}: {figure.findall(text)[:3]}"


def test_methods_side_by_side() -> None:
    pareto = script("pareto")
    text = (DOCS / "methods-compared.md").read_text("utf-8").partition("<!-- table -->\n")[2]
    made = pareto.table(pareto.summary())
    one, other = ([line.split("|") for line in table.splitlines()] for table in (text, made))
    assert len(one) == len(other) > 30
    for old, new in zip(one, other, strict=True):
        assert old[:5] == new[:5] and old[6] == new[6]  # Other columns have drawn intervals.
        assert [re.sub(r" \(.*\)", "", cell) for cell in old] == [
            re.sub(r" \(.*\)", "", cell) for cell in new
        ]


MEASURES = {
    "attention that the prefill gives": ("prefill_visual", ("0.25",)),
    "attention that actions give": ("action_visual", ("0.25",)),
    "prefill and action, patches": ("prefill_action", ("0.25",)),
    "the same, an eighth": ("prefill_action", ("0.125",)),
    "consecutive actions": ("consecutive", ("0.25",)),
    "pool of both": ("pool_ratio", ("0.25", "0.125")),
}


def test_what_policies_look_at() -> None:
    text, seen = (DOCS / "analysis.md").read_text("utf-8"), {}
    for policy in ("smol-oft", "mini-oft"):
        for row in rows(DOCS / "analysis" / policy / "overlaps.csv"):
            ends = [float(row[name]) for name in ("mean", "lowest", "highest")]
            seen[policy, row["measure"], row["keep"]] = ends
    for label, (measure, budgets) in MEASURES.items():
        (cells,) = re.findall(rf"^\| {label}[^|]*\| ([^|]*) \| ([^|]*) \|$", text, flags=re.M)
        for policy, cell in zip(("smol-oft", "mini-oft"), cells, strict=True):
            found = [seen[policy, measure, keep] for keep in budgets]
            if measure == "pool_ratio":
                assert cell == ", ".join(f"{mean:.2f}" for mean, *_ in found)
            else:
                said = [float(number) for number in re.findall(r"\d+", cell)]
                assert said == pytest.approx([100 * v for v in found[0]], abs=0.51), label
    shared = [100 * seen["smol-oft", "prefill_action", keep][0] for keep in ("0.25", "0.125")]
    said = f"({shared[0]:.0f} % at a quarter, {shared[1]:.0f} % at an eighth)"
    assert said in printed("results.md")
    text = printed("analysis.md")
    missed = {
        (policy, row["keep"], row["predictor"]): float(row["missed"])
        for policy in ("smol-oft", "mini-oft")
        for row in rows(DOCS / "analysis" / policy / "forecasts.csv")
    }
    windows = [f"window w={w} gamma=0.8" for w in (2, 3, 5, 8)]
    said = [f"{100 * missed['mini-oft', '0.125', name]:.0f}" for name in windows]
    assert f"they miss {', '.join(said[:3])} and {said[3]} % of the best patches" in text
    assert f"the last step alone {100 * missed['mini-oft', '0.125', 'last step']:.0f} %" in text
    own = [
        f"{100 * missed['smol-oft', '0.25', name]:.0f} %" for name in ("last step", "vla-pruner")
    ]
    assert f"({own[0]} at a quarter); a pruning session" in text and f"misses {own[1]}, and" in text
    for keep, words in (("0.25", "(25 %)"), ("0.125", "(12.5 %)")):
        oracle = {
            row["a"]: float(row["mean"])
            for row in rows(DOCS / "analysis" / "mini-oft" / "agreement.csv")
            if (row["keep"], row["b"]) == (keep, "oracle")
        }
        best = max(oracle.values())
        assert re.search(rf"{best:.2f}\D+{oracle['random']:.2f} {re.escape(words)}", text), words


STATISTICS = {
    "mean": "mean",
    "nine of ten calls (p90)": "p90",
    "worst number of all": "worst",
    "gripper flips": "gripper_flips",
    "gripper alone": "gripper",
    "all but the gripper": "without_gripper",
    "whole chunks": "whole_chunk",
    "calls that drop tokens alone": "pruned_calls",
    "first third of an episode": "first_third",
    "middle third": "middle_third",
    "last third": "last_third",
}
BINS = ((0, 0.05), (0.05, 0.1), (0.1, 0.15), (0.15, 0.25), (0.25, 0.5), (0.5, 99))


def test_how_well_deviation_ranks() -> None:
    stats = pytest.importorskip("scipy.stats", reason="needs the extra sim, which brings scipy")
    text = (DOCS / "tune.md").read_text("utf-8").partition("## Does it say anything")[2]
    by: dict[str, list[dict[str, str]]] = defaultdict(list)
    for row in rows(RESULTS / "tune.csv"):
        by[row["policy"]].append(row)

    def success(policy: str) -> list[float]:
        return [int(row["solved"]) / int(row["episodes"]) for row in by[policy]]

    head = re.search(r"^\| statistic \| (.*) \|$", text, flags=re.M)
    assert head is not None
    columns = [cell.rsplit(", ", 1) for cell in head[1].split(" | ")]
    policies = [name for name, _ in columns]
    for policy, words in columns:
        assert int(words.split()[0]) == len(by[policy])
    for label, name in STATISTICS.items():
        (line,) = re.findall(rf"^\| {re.escape(label)} \| (.*) \|$", text, flags=re.M)
        for policy, cell in zip(policies, line.split(" | "), strict=True):
            values = [float(row[name] or 0) for row in by[policy]]
            found = stats.spearmanr(values, success(policy)).statistic
            if cell == "the same as the mean":
                assert values == [float(row["mean"]) for row in by[policy]]
                continue
            assert abs(float(cell.split()[0]) - found) < 0.01, (label, policy)  # Rows are rounded.
            low, high = map(float, re.findall(r"[-+]\d\.\d\d", cell)[1:])
            assert low <= found <= high
    smol = [float(row["mean"]) for row in by["smol-oft"]]
    found = stats.spearmanr(smol, success("smol-oft")).statistic
    assert f"The mean ranks them with {found:.2f}" in printed("tune.md")
    table = re.findall(r"^\| (?:up to|above|0\.)[^|]*\| ([\d, ]+) \|", text, flags=re.M)
    for (low, high), counts in zip(BINS, table, strict=True):
        inside = [
            sum(low < float(row["mean"]) <= high or low == float(row["mean"]) == 0 for row in by[p])
            for p in policies
        ]
        assert counts == ", ".join(map(str, inside)), (low, high)


def test_what_published_policies_save_by_formula() -> None:
    published = script("published")
    saved = {name: f"{100 * one.saved(0.25):.0f} %" for name, one in published.POLICIES.items()}
    assert saved["SmolVLA"] in printed("lerobot.md")
    for page in ("lerobot.md", "policies/openpi.md", "policies/index.md"):
        text = printed(page)
        assert saved["pi0"] in text and saved["pi0.5"] in text, page
    towers, *others = published.POLICIES["SmolVLA"].parts(1.0)
    share = f"{100 * towers / (towers + sum(others)):.0f} %"
    assert share in printed("lerobot.md") and share in printed("faq.md")


def test_doors_under_damaged_messages() -> None:
    text, seen = printed("serving.md"), defaultdict(list)
    for row in rows(RESULTS / "fuzz.csv"):
        assert len(seen[row["door"]]) == 0 or int(row["messages"]) > seen[row["door"]][-1][0]
        seen[row["door"]].append([int(row[name]) for name in ("messages", "mib", "descriptors")])
    spans = {
        door: [(min(v), max(v)) for v in zip(*found, strict=True)] for door, found in seen.items()
    }
    assert {span[0][1] for span in spans.values()} == {20_000} and "With 20000 messages" in text
    _, mib, descriptors = spans["vla-eval"]
    said = f"{mib[0]} to {mib[1]} MiB and descriptors {descriptors[0]} to {descriptors[1]} at every"
    assert said in text
    _, mib, descriptors = spans["openpi/v1/realtime/robot/openpi"]
    assert f"{mib[0]} to {mib[1]} MiB and {descriptors[1]} at openpi's other dialect" in text


def test_sixteen_clients_at_one_server() -> None:
    text, columns = printed("serving.md"), ("per_s", "per_cpu_s", "p50_ms", "p95_ms")
    found: dict[str, list[float]] = {}
    for size in ("1", "16x2"):
        rounds = [row for row in rows(RESULTS / "serving.csv") if row["batches"] == size]
        assert len(rounds) == 5
        found[size] = [median(float(row[name]) for row in rounds) for name in columns]
    found["ratio"] = [new / old for old, new in zip(found["1"], found["16x2"], strict=True)]
    for label, size, form in (
        ("1", "1", "{:.1f}"),
        ("up to 16, two replicas", "16x2", "{:.1f}"),
        ("ratio", "ratio", "{:.2f}x"),
    ):
        assert f"| {label} | " + " | ".join(map(form.format, found[size])) + " |" in text
