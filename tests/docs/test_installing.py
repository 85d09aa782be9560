"""What the pages say of installing: from a checkout, extras that exist, and what pruning needs."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]

NEEDED = """
import sys
import numpy as np, torch
from transformers import AutoTokenizer, DynamicCache, LlamaForCausalLM
before = {name.partition(".")[0] for name in sys.modules}
import vla_pruner as vp
policy = vp.models.load("mini-oft")
with vp.prune(policy, "vla-pruner", keep=0.25) as session:
    session.reset()
    for _ in range(4):
        scene, wrist = np.zeros((2, 160, 160, 3), np.uint8)
        policy.predict_action([scene, wrist], "pick up", np.zeros(8), unnorm_key="pick_place")
assert not session.last.warm_up
after = {name.partition(".")[0] for name in sys.modules}
print(*sorted(after - before - set(sys.stdlib_module_names)))
"""


def installs() -> list[tuple[str, str]]:
    """Page and line of everything that is installed."""
    return [
        (str(page.relative_to(ROOT)), line)
        for page in PAGES
        for line in re.findall(r"pip install [^`\n]*", page.read_text("utf-8"))
    ]


def test_nothing_is_installed_from_an_index_that_does_not_have_it() -> None:
    ours = re.compile(r"pip install (?:-\S+ )*['\"]?(vla-pruner|lerobot_policy_pruned)")
    pages = [(page, line) for page, line in installs() if not page.startswith("README")]
    assert len(pages) > 12
    assert [(page, line) for page, line in pages if ours.match(line)] == []


def test_extras_that_are_named_exist() -> None:
    found = {
        extra.strip()
        for _, line in installs()
        for extras in re.findall(r"(?:\.|vla-pruner)\[([\w, -]+)\]", line)
        for extra in extras.split(",")
    }
    assert {"sim", "tune", "doors", "parquet"} <= found
    assert found <= set(PROJECT["optional-dependencies"])


def test_pruning_needs_torch_and_transformers_alone(tmp_path: Path) -> None:
    """So `pip install --no-deps` beside lerobot, openpi or GR00T is enough."""
    command = [sys.executable, "-c", NEEDED]
    path = str(ROOT / "src")
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["vla_pruner"]
