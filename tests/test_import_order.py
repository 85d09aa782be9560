"""Rooms lie in one line, and nothing is imported from a room further down it, lazily or not."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "vla_pruner"
PACKAGE = "vla_pruner"

ORDER = (
    "kernels",
    "pruning",
    "baselines",
    "methods",
    "core",
    "temporal",
    "towers",
    "vla_cache",
    "models",
    "lerobot",
    "measure",
    "scenes",
    "episodes",
    "runs",
    "reports",
    "pages",
    "calibration",
    "analysis",
    "tuning",
    "serving",
    "doors",
    "realtime",
    "reference",
    "commands",
    "cli",
)
"""A room may import from itself and from those before it."""

ENDS = ("lerobot", "reference", "serving", "doors", "realtime", "commands")
"""Rooms that no other room needs; `cli` loads the commands, and they the server and its doors."""
MAY_USE = {
    "serving": {"doors", "commands"},
    "doors": {"commands"},
    "realtime": {"commands"},
    "commands": {"cli"},
}

NAMED = rf"{PACKAGE}(\.\w+)+"
LARGEST = 13
"""Files of a room, `__init__.py` counted; `methods` has one per method, `core` one per idea."""
ROOMS = (
    "kernels",
    "pruning",
    "baselines",
    "temporal",
    "towers",
    "vla_cache",
    "scenes",
    "episodes",
    "runs",
    "reports",
    "pages",
    "measure",
    "analysis",
    "calibration",
    "tuning",
    "serving",
    "doors",
    "realtime",
)
WITH_ROOMS = ("models", "commands")


def module_of(path: Path) -> str:
    """Dotted name of a source file."""
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(text: str, module: str, is_package: bool) -> Iterator[tuple[str, int]]:
    """Every module that a source names in an import, or as a string that could be one."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = module.split(".")
                up = up[: len(up) - node.level + is_package]
                base = ".".join([*up, *([node.module] if node.module else [])])
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Constant) and re.fullmatch(NAMED, str(node.value)):
            yield str(node.value), node.lineno


def room_of(module: str) -> str | None:
    """The room of a module of this package."""
    parts = module.split(".")
    return parts[1] if parts[0] == PACKAGE and len(parts) > 1 else None


def edges() -> Iterator[tuple[str, str, str]]:
    """Room, the room that it imports from, and where."""
    for path in sorted(SOURCE.rglob("*.py")):
        module = module_of(path)
        room = room_of(module)
        if room not in ORDER:
            continue
        for name, line in imports(path.read_text("utf-8"), module, path.name == "__init__.py"):
            found = room_of(name)
            if found in ORDER and found != room:
                yield room, found, f"{path.relative_to(SOURCE)}:{line} imports {name}"


def test_every_room_has_its_place() -> None:
    rooms = {path.name for path in SOURCE.iterdir() if (path / "__init__.py").exists()}
    assert rooms == set(ORDER) - {"cli"}


def test_no_room_imports_from_one_behind_it() -> None:
    wrong = [where for room, found, where in edges() if ORDER.index(found) > ORDER.index(room)]
    assert wrong == []


def test_ends_are_ends() -> None:
    wrong = [
        where
        for room, found, where in edges()
        if found in ENDS and room not in MAY_USE.get(found, set())
    ]
    assert wrong == []


def test_the_map_draws_the_same_order() -> None:
    text = (ROOT / "docs" / "map.md").read_text("utf-8")
    found = re.search(r"^kernels <- .*?(?=\n```)", text, flags=re.MULTILINE | re.DOTALL)
    assert found is not None
    assert re.findall(r"\w+", found[0]) == list(ORDER)


@pytest.mark.parametrize("room", ROOMS)
def test_no_room_is_a_hall(room: str) -> None:
    assert len(list((SOURCE / room).rglob("*.py"))) <= LARGEST


@pytest.mark.parametrize("room", WITH_ROOMS)
def test_rooms_with_rooms_in_them_are_no_halls_either(room: str) -> None:
    folders = {path.parent for path in (SOURCE / room).rglob("*.py")}
    halls = {str(one): n for one in folders if (n := len(list(one.glob("*.py")))) > LARGEST}
    assert len(folders) > 1
    assert halls == {}


def test_every_word_has_a_file() -> None:
    from vla_pruner.cli import COMMANDS

    files = {path.stem for path in (SOURCE / "commands").rglob("*.py")}
    assert set(COMMANDS) <= files


@pytest.mark.parametrize(
    ("text", "module", "expected"),
    [
        ("def f():\n    from ..runs import store", "vla_pruner.scenes.a", "vla_pruner.runs.store"),
        ("from .b import c", "vla_pruner.scenes", "vla_pruner.scenes.b.c"),
        ("import vla_pruner.runs.store", "vla_pruner.cli", "vla_pruner.runs.store"),
        ("load('vla_pruner.runs.store')", "vla_pruner.cli", "vla_pruner.runs.store"),
    ],
)
def test_imports_are_found_wherever_they_stand(text: str, module: str, expected: str) -> None:
    assert expected in [n for n, _ in imports(text, module, module == "vla_pruner.scenes")]
