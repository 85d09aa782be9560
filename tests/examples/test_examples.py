"""Examples and notebooks run as they are."""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SAYS = {
    "prune_a_policy.py": r"50 of 200 visual tokens kept[\s\S]*difference from all tokens: \d",
    "new_method.py": r"brightest +deviates by \d[\s\S]*fastv[\s\S]*random",
    "new_model.py": r"dropping against hiding: \d",
    "live_evaluation.py": r"none +\d of 1\nvla-pruner@0.25 +\d of 1",
}


def run(code: list[str], folder: Path) -> str:
    result = subprocess.run(
        [sys.executable, *code],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("name", SAYS)
def test_an_example(name: str, tmp_path: Path) -> None:
    arguments = []
    if name == "live_evaluation.py":
        if find_spec("robosuite") is None:  # Importing it here would choose how MuJoCo draws.
            pytest.skip("the extra `sim` is not installed")
        arguments = ["1"]
    said = run([str(EXAMPLES / name), *arguments], tmp_path)
    assert re.search(SAYS[name], said), said


@pytest.mark.parametrize("notebook", sorted(EXAMPLES.glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook(notebook: Path, tmp_path: Path) -> None:
    """All of its cells, in order, in one process; pictures are drawn without a display."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert len(code) >= 3 and not any(
        cell.get("outputs") for cell in cells if cell["cell_type"] == "code"
    )
    script = tmp_path / "cells.py"
    script.write_text("import matplotlib\nmatplotlib.use('Agg')\n" + "\n".join(code))
    run([str(script)], tmp_path)


def test_the_list_of_examples_is_whole() -> None:
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w.]+\.(?:py|ipynb))` \|", text))
    assert named == {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")}
    assert {name for name in named if name.endswith(".py")} == set(SAYS)
