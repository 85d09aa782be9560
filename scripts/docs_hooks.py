"""What the documentation site needs beyond its pages: outward links, and the list of methods.

Pages link to sources as they would on a code host (`../src/...`). The site has no sources: such a
link becomes the path itself.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

_COMMAND = re.compile(r"^([^|`\s*#-].*)\n(`vla-pruner )", flags=re.MULTILINE)
_RESULTS = "results.md"
_WIDE = ("models.md", "methods-compared.md")
"""Pages of one wide table, which takes the place of their table of contents."""
_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)")
_PICTURE = re.compile(r"^!\[([^\]]*)\]\(([^)\s]+)\)$", flags=re.MULTILINE)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fill in the methods' pages, so that a new method needs no entry."""
    pages = sorted(Path(config.docs_dir, "methods").glob("*.md"))
    methods: list[Any] = ["methods/README.md"]
    methods += [{page.stem: f"methods/{page.name}"} for page in pages if page.stem != "README"]
    assert config.nav is not None
    for entry in config.nav:
        if isinstance(entry, dict) and entry.get("Methods") == "METHODS":
            entry["Methods"] = methods
    return config


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Outward links become paths, file names titles; commands of the results begin paragraphs."""

    if page.file.src_uri in _WIDE:
        page.meta["hide"] = ["toc"]

    def replace(match: re.Match[str]) -> str:
        text, target = match.groups()
        path = target.partition("#")[0]
        if not path or "://" in path or path.startswith("mailto:"):
            return match[0]
        inside = posixpath.normpath(
            posixpath.join(posixpath.dirname(page.file.src_uri), path.rstrip("/"))
        )
        if not inside.startswith("..") and not inside.endswith(".py"):
            return f"[{_title(inside, config)}]({target})" if text.endswith(".md") else match[0]
        path = inside.removeprefix("../") if inside.startswith("..") else f"docs/{inside}"
        return (
            f"`{path}`"
            if text.strip("`").endswith(posixpath.basename(path))
            else f"{text} (`{path}`)"
        )

    linked = _PICTURE.sub(r"[![\1](\2)](\2)", _LINK.sub(replace, markdown))  # opens at full size
    return _COMMAND.sub(r"\1\n\n\2", linked) if page.file.src_uri == _RESULTS else linked


def _title(page: str, config: MkDocsConfig) -> str:
    """The first heading of a page of the site."""
    first = Path(config.docs_dir, page).read_text("utf-8").splitlines()[0]
    return first.removeprefix("# ")
