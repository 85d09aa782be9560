"""Python that a page prints runs (`py` marks what needs more), and the list of pages is whole."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
ELSEWHERE = {
    "adding-a-method.md": "test_pages.py",
    "adding-a-model.md": "test_pages.py",
    "serving.md": "a script of uv's, with the packages that it names",
    **{f"serve/{name}.md": "test_real_clients.py" for name in ("act", "client", "gr00t", "openpi")},
}
COMPILES = ("capture.md",)


def python_blocks(page: Path) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def pages() -> list[Path]:
    found = {str(page.relative_to(DOCS)): page for page in sorted(DOCS.rglob("*.md"))}
    with_python = {name: page for name, page in found.items() if python_blocks(page)}
    assert with_python.keys() >= ELSEWHERE.keys()
    return [page for name, page in with_python.items() if name not in ELSEWHERE]


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=pytest.mark.slow if page.name in COMPILES else ())
        for page in pages()
    ],
    ids=lambda page: page.stem,
)
def test_the_python_of_a_page_runs_as_it_is(page: Path) -> None:
    names: dict[str, object] = {}
    for number, block in enumerate(python_blocks(page), start=1):
        exec(compile(block, f"{page.name}, block {number}", "exec"), names)
    assert "policy" in names and not names["policy"]._forward_hooks


def test_every_page_is_in_the_navigation_and_every_entry_is_a_page() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    named = set(re.findall(r"[\w/-]+\.md", text.partition("\nnav:")[2]))
    found = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    assert "METHODS" in text
    methods = {page for page in found if page.startswith("methods/")}
    assert named == found - methods
    assert yaml.safe_load(text.partition("\nnav:")[0])["strict"] is True


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda page: page.stem)
def test_code_inside_a_list_belongs_to_it_on_the_site_as_well(page: Path) -> None:
    """The site's Markdown wants four spaces; with fewer the rest of the list is one paragraph."""
    fences = re.findall(r"^ +(?=```)", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert all(len(fence) % 4 == 0 for fence in fences)
