"""The one way a page is made: a template of Jinja, filled in, with all that it needs inside."""

from __future__ import annotations

import base64
import json
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from vla_pruner.pages.colours import PAPER, SERIES


def render(template: str, **values: Any) -> str:
    """A page. Text is escaped wherever it stands; a value that a template misses is an error.

    Args:
        template: a file of `templates`.
        values: what it names.
    """
    return _environment().get_template(template).render(**values)


def script_json(values: Any) -> Markup:
    """JSON that cannot end the script element it stands in.

    Raises:
        ValueError: NaN or infinity, which JSON does not know.
    """
    text = json.dumps(values, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace("&", "\\u0026"))


def download(text: str, kind: str = "text/csv") -> str:
    """A file as an address that holds all of it."""
    return f"data:{kind};base64,{base64.b64encode(text.encode()).decode()}"


@cache
def _environment() -> Environment:
    found = Environment(
        loader=PackageLoader("vla_pruner.pages", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters["script_json"] = script_json
    found.filters["download"] = download
    found.globals |= {"source": source, "paper": PAPER, "series": SERIES}
    return found


def source(name: str) -> Markup:
    """A file of `templates` as it is: style, script."""
    return Markup(files("vla_pruner.pages").joinpath("templates", name).read_text("utf-8"))
