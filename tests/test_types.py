"""What the documentation shows is typed: a user's own mypy --strict has nothing to say of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import vla_pruner as vp

SOURCE = Path(__file__).parents[1] / "src"

DOCUMENTED = """
import numpy as np
import vla_pruner as vp

for name, method in vp.list_methods().items():
    print(name, method.summary, sorted(vp.list_models()))
policy = vp.models.load("mini-oft")
images = [np.zeros((140, 140, 3), dtype=np.uint8)] * 2
with vp.prune(policy, "vla-pruner", keep=0.25) as session:
    session.reset()
    action = policy.predict_action(images, "pick up the can", proprio=np.zeros(8))
    print(action.shape, session.last, dir(vp))
    if session.last is not None:
        print(session.last.visual_kept + 1)
vp.remove(policy)
fields = vp.methods.VLAPruner(keep=0.25).window + vp.methods.FastV(layer=2).layer
"""
WRONG = """
import vla_pruner as vp

vp.prune(vp.models.load("mini-oft"), "fastv", keep="half")
vp.models.load("mini-oft").predict_acton()
"""
SETTINGS = """
[mypy]
strict = True
[mypy-transformers.*,tokenizers.*]
follow_imports = skip
"""


def mypy(folder: Path, source: str) -> str:
    (folder / "use.py").write_text(source)
    (folder / "mypy.ini").write_text(SETTINGS)
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(folder / "cache"), "use.py"]
    environment = {**os.environ, "MYPYPATH": str(SOURCE)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return done.stdout + done.stderr


@pytest.mark.slow
def test_documented_use_passes_mypy_strict(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    said = [line for line in mypy(tmp_path, DOCUMENTED).splitlines() if line.startswith("use.py")]
    assert said == []
    found = mypy(tmp_path, WRONG)
    assert 'use.py:4: error: Argument "keep" to "prune"' in found
    assert "use.py:5: error" in found


def test_dir_shows_the_public_names() -> None:
    names = set(dir(vp))
    assert {"prune", "remove", "models", "methods", "list_methods", "list_models"} <= names
    assert {"Session", "StepReport"} <= names and names == set(vp.__all__)


def test_ports_are_policies() -> None:
    from vla_pruner.models.openvla.modeling import OpenVLA
    from vla_pruner.models.pi0.modeling import Pi0

    for port in (OpenVLA, Pi0):
        assert issubclass(port, vp.models.Policy)
        assert port.predict_action is not vp.models.Policy.predict_action
