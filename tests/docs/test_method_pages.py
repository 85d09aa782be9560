"""Every method has a page, and the options that it names are those of the code."""

import ast
import re
from dataclasses import fields
from pathlib import Path

import pytest

import vla_pruner as vp

PAGES = Path(__file__).parents[2] / "docs" / "methods"
COMMON = {"keep", "layer", "budget", "recipe", "other_weights"}
"""Options that several methods share; explained where they differ."""


def page(name: str) -> str:
    return (PAGES / f"{name}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", list(vp.list_methods()))
def test_a_page_names_every_option_of_its_method(name):
    text, method = page(name), vp.list_methods()[name]
    assert text.startswith(f"# {name}\n")
    own = {field.name for field in fields(method)} - COMMON
    assert {option for option in own if not re.search(rf"\b{option}\b", text)} == set()
    if method.paper:
        assert method.paper in text


@pytest.mark.parametrize("name", list(vp.list_methods()))
def test_defaults_on_a_page_are_those_of_the_code(name):
    """Rows such as: | `window`, `gamma` | 3, 0.8 | what they do |."""
    defaults = {field.name: field.default for field in fields(vp.list_methods()[name])}
    table = page(name).partition("| option | default |")[2]
    for cells in re.findall(r"^\| (`.*?) \| (.*?) \|", table, flags=re.MULTILINE):
        options = re.findall(r"`(\w+)`", cells[0])
        values = ast.literal_eval(cells[1].replace("`", ""))
        for option, value in zip(options, values if len(options) > 1 else [values], strict=True):
            assert defaults[option] == value, option


def test_the_overview_lists_every_method():
    rows = re.findall(r"^\| \[([\w-]+)\]\(\1\.md\) \|", page("README"), flags=re.MULTILINE)
    assert rows == list(vp.list_methods())


def test_every_page_is_about_something_and_its_links_lead_somewhere():
    known = {*vp.list_methods(), "oracle"}
    for file in PAGES.glob("*.md"):
        assert file.stem in known or file.stem == "README"
        for link in re.findall(r"\]\(([^)#\s]+)\)", file.read_text(encoding="utf-8")):
            assert "://" in link or (PAGES / link).exists(), f"{file.name} links to {link}"


@pytest.fixture(scope="module")
def policies():
    """What `model` and `pi0` stand for on these pages."""
    return {"model": vp.models.load("mini-oft"), "pi0": vp.models.load("mini-pi0")}


@pytest.mark.parametrize("name", list(vp.list_methods()))
def test_examples_on_a_page_can_be_attached(name, policies):
    """Each `vp.prune` call, on a policy that ships; one with a recipe names options that exist."""
    known = {field.name for field in fields(vp.list_methods()[name])}
    calls = re.findall(r"vp\.prune\(\s*(?:model|pi0), \"[\w-]+\".*?\)", page(name), re.DOTALL)
    assert calls
    for call in calls:
        assert set(re.findall(r"(\w+)=", call)) <= known | {"adapter"}
        if name != "prefix-reuse":
            assert f'"{name}"' in call
        if "recipe=" not in call and "adapter=" not in call:
            eval(call, {"vp": vp, **policies}).remove()
