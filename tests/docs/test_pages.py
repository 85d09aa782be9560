"""The code of the documentation runs, and its entry points work."""

import dataclasses
import re
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType

import pytest
import torch

import vla_pruner as vp
from vla_pruner.methods import Evidence, OneCut

DOCS = Path(__file__).parents[2] / "docs"
NOT_ON_THE_PAGE = {"layer", "number", "keep_count"}
"""Parts of `Evidence` that a method which cuts once does not need."""


def blocks(page: str, language: str) -> list[str]:
    """Code blocks of a page, in order."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture
def follow(monkeypatch: pytest.MonkeyPatch):
    """Runs a page's Python as the module it names, and installs its entry point."""

    def run(page: str, registry: str) -> ModuleType:
        (table,) = [tomllib.loads(block) for block in blocks(page, "toml")]
        ((group, entries),) = table["project"]["entry-points"].items()
        ((name, target),) = entries.items()
        entry = EntryPoint(name=name, value=target, group=group)

        module = ModuleType(entry.module)
        monkeypatch.setitem(sys.modules, entry.module.partition(".")[0], ModuleType("my_package"))
        monkeypatch.setitem(sys.modules, entry.module, module)
        python = blocks(page, "python")
        assert len(python) >= 3
        for number, block in enumerate(python, start=1):
            exec(compile(block, f"{page}, block {number}", "exec"), vars(module))
        monkeypatch.setattr(
            f"{registry}.entry_points", lambda group: [entry] if group == entry.group else []
        )
        return module

    return run


def test_the_snippet_of_the_readme_runs_as_it_is() -> None:
    text = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(snippet, "README.md", "exec"), names)
    assert names["actions"].shape == (8, 7)
    assert names["session"].last.visual_full == 200
    assert not names["policy"]._forward_hooks


def test_adding_a_method(follow) -> None:
    page = follow("adding-a-method.md", "vla_pruner.methods")
    assert vp.list_methods()["prompt-top"] is page.PromptTop
    for method in ("prompt-top@8:layer=2", "prompt-top@0.125:layer=2"):
        with vp.prune(page.model, method, adapter=page.where) as session:
            page.model(inputs_embeds=page.embeds)
            assert session.last.visual_kept == 8
            assert [stage.layer for stage in session.last.stages] == [2]
    with pytest.raises(ValueError, match="novelty"):
        page.UnusualTop(novelty=-1.0)


def test_what_a_method_may_override_is_there_and_in_the_file_that_is_named() -> None:
    text = (DOCS / "adding-a-method.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| .* \| `(\w+)` \| `([\w/]+\.py)` \|$", text, flags=re.MULTILINE)
    assert len(rows) > 12
    for name, file in rows:
        assert hasattr(OneCut, name), name
        example = (DOCS.parent / "src" / "vla_pruner" / file).read_text(encoding="utf-8")
        assert re.search(rf"^    (def )?{name}\b", example, flags=re.MULTILINE), f"{file}: {name}"
    table = text.partition("| in `evidence` |")[2].partition("\n\n")[0]
    cells = re.findall(r"^\| (`.*?`) \|", table, flags=re.MULTILINE)
    named = {name for cell in cells for name in re.findall(r"\w+", cell)}
    assert named == {field.name for field in dataclasses.fields(Evidence)} - NOT_ON_THE_PAGE


def test_adding_a_model(follow) -> None:
    page = follow("adding-a-model.md", "vla_pruner.models.base")
    assert "reach" in vp.list_models()
    with vp.prune(page.policy, "vla-pruner", keep=0.25) as session, torch.no_grad():
        for _ in range(4):
            page.policy(page.images, page.words)
        assert session.last.views == (16, 16)
        assert session.last.visual_kept == 8


def test_links_between_pages_lead_somewhere() -> None:
    pages = [*DOCS.rglob("*.md"), *DOCS.parent.glob("*.md"), *DOCS.parent.glob("*/*.md")]
    pages.append(DOCS.parent / "llms.txt")
    assert len(pages) >= 6
    for page in pages:
        for link in re.findall(r"\]\(([^)#\s]+)\)", page.read_text(encoding="utf-8")):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_files_that_the_map_names_exist() -> None:
    source = DOCS.parent / "src" / "vla_pruner"
    text = (DOCS / "map.md").read_text(encoding="utf-8")
    rooms = re.findall(r"^\| `(\w+)/` \|.*\| `([\w/]+\.py)`", text, flags=re.MULTILINE)
    assert len(rooms) >= 6
    for room, file in rooms:
        assert (source / room / file).exists(), f"docs/map.md names {room}/{file}"


def test_the_reading_list_of_the_map_is_as_long_as_it_says() -> None:
    source = DOCS.parent / "src" / "vla_pruner"
    text = (DOCS / "map.md").read_text(encoding="utf-8")
    part = text.partition("## One pruned step")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| \d+ \| `([\w/]+\.py)` \| (\d+) \| (.*) \|$", part, flags=re.MULTILINE)
    (total,) = re.findall(r"^\| \| sum \| (\d+) \|", part, flags=re.MULTILINE)
    assert 5 < len(rows) <= 10 and sum(int(count) for _, count, _ in rows) == int(total) <= 2200
    for file, count, look_for in rows:
        home = DOCS.parent if file.startswith("docs/") else source
        found = (home / file).read_text(encoding="utf-8")
        lines = len(found.splitlines())
        assert abs(lines - int(count)) <= max(5, lines // 20), f"{file} has {lines} lines"
        for name in re.findall(r"`(\w+)`", look_for):
            assert re.search(rf"(def|class) {name}\b", found), f"{file} has no {name}"


def test_the_contract_of_a_decoder_names_what_checks_it() -> None:
    text = (DOCS / "adding-a-model.md").read_text(encoding="utf-8")
    part = text.partition("## What a decoder has to do")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| .* \| (`.*`) \| .* \|$", part, flags=re.MULTILINE)
    assert len(rows) > 10
    for row in rows:
        for file, name in re.findall(r"`(\w+\.py)`(?:, `(?:[A-Z]\w*\.)?(\w+)`)?", row):
            found = (DOCS.parent / "src" / "vla_pruner" / "core" / file).read_text(encoding="utf-8")
            assert not name or re.search(rf"(def|class) {name}\b", found), f"{file}: {name}"
    vlms = (DOCS / "policies" / "transformers-vlm.md").read_text(encoding="utf-8")
    kinds = re.findall(r"PaliGemma, .*?\sand\sQwen3-VL", vlms, flags=re.DOTALL)
    tests = (DOCS.parent / "tests" / "models" / "test_hf_vlm.py").read_text(encoding="utf-8")
    built = re.findall(r'^    "([\w.-]+)": ', tests.partition("BUILD = {")[2], flags=re.MULTILINE)
    assert {kind.lower() for kind in re.split(r",\s+|\s+and\s+", kinds[0])} == set(built)
