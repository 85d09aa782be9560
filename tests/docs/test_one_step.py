"""`docs/one_step.py`, the slow and obvious step, and the package do the same."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vla_pruner as vp
from hidden_columns import same

PAGE = Path(__file__).parents[2] / "docs" / "one_step.py"


@pytest.fixture(scope="module")
def page():
    spec = importlib.util.spec_from_file_location("one_step", PAGE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("k", "layer"), [(6, 3), (1, 2), (12, 5), (24, 3)])
def test_it_is_what_the_package_does(page, k, layer):
    model, scores, visual = page.tiny(), [], slice(1, 25)
    adapter = vp.models.Decoder("model.layers", visual=visual)
    frames = [torch.randn(36, 32, generator=torch.Generator().manual_seed(s)) for s in range(6)]
    with vp.prune(model, "vla-pruner", tokens=k, layer=layer, adapter=adapter) as session:
        packaged = []
        for frame in frames:
            logits = model(inputs_embeds=frame[None]).logits[0, -1]
            packaged.append((logits, session.last))
    for step, (frame, (expected, report)) in enumerate(zip(frames, packaged, strict=True)):
        logits, kept, action = page.one_step(model, frame, visual, scores, k=k, layer=layer)
        assert kept.tolist() == report.kept_indices[0].tolist()
        assert len(kept) == (24 if step < 3 else k)
        same(logits, expected)
        same(action, report.action[0])
        scores.insert(0, action)


def test_the_page_runs():
    done = subprocess.run([sys.executable, PAGE], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 5 and lines[0].startswith("step 0: 24 of 24") and "6 of 24" in lines[4]
