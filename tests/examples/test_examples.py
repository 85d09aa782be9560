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
    "serve_act.py": r"with 100%[\s\S]*8 actions, with 25% of the visual tokens\n$",
    "serve_openpi.py": r"all tokens[\s\S]*\(\d+, 7\) 50\n$",
    "tune.py": r"none +deviates by 0\.000 within[\s\S]*random@0\.25 +deviates by \d",
}
NEEDS = {"live_evaluation.py": "robosuite", "serve_act.py": "h11", "serve_openpi.py": "websockets"}
CLIENT = str(EXAMPLES.parent / "clients" / "python" / "src")


def run(code: list[str], folder: Path) -> str:
    result = subprocess.run(
        [sys.executable, *code],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([CLIENT, *filter(None, sys.path)])},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("name", SAYS)
def test_an_example(name: str, tmp_path: Path) -> None:
    if name in NEEDS and find_spec(NEEDS[name]) is None:  # robosuite would choose how MuJoCo draws.
        pytest.skip(f"{NEEDS[name]} is not installed: an extra")
    arguments = ["1"] if name == "live_evaluation.py" else []
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
    in_lerobot = {"lerobot_rollout.py"}  # tests/lerobot_policies/test_lerobot_robot.py
    assert {name for name in named if name.endswith(".py")} == set(SAYS) | in_lerobot
