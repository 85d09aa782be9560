"""The first code of docs/lerobot.md and docs/policies/gr00t.md, with tiny policies."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lerobot.policies", reason="needs lerobot; run `make test-lerobot`")

from tiny_lerobot import batch_of, smolvla

DOCS = Path(__file__).parents[2] / "docs"


def printed(page: str) -> str:
    return re.findall(r"^```py\n(.*?)^```$", (DOCS / page).read_text("utf-8"), flags=re.M | re.S)[0]


def run(page: str, policy: Any, names: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the page's code; what it loads from the hub is this policy."""
    monkeypatch.setattr(type(policy), "from_pretrained", classmethod(lambda cls, name: policy))
    with torch.no_grad():
        exec(printed(page), names)
    assert names["policy"] is policy
    return names["session"]


def test_the_page_of_lerobot(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        policy = smolvla(patch)
    session = run("lerobot.md", policy, {}, monkeypatch)
    policy.reset()
    with torch.no_grad():
        for seed in range(4):
            policy.predict_action_chunk(batch_of(seed, 56))
    assert 0 < session.last.visual_kept < session.last.visual_full
    session.remove()
    assert not session.attached


@pytest.mark.skipif(
    find_spec("lerobot.policies.groot") is None
    or find_spec("lerobot.policies.groot.groot_n1") is not None
    or find_spec("diffusers") is None
    or find_spec("tree") is None,
    reason="needs GR00T N1.7 of lerobot 0.6: lerobot[groot]",
)
def test_the_page_of_gr00t(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tiny_groot import groot_batch, n17

    with torch.no_grad():
        policy = n17(tmp_path)
    session = run("policies/gr00t.md", policy, {"batch": groot_batch(0, "n17")}, monkeypatch)
    with torch.no_grad():
        for seed in range(1, 4):
            policy.predict_action_chunk(groot_batch(seed, "n17"))
    assert 0 < session.last.visual_kept < session.last.visual_full
    session.remove()
