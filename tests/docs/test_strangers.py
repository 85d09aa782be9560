"""The first code of a policy's page, line by line, where it names weights that are not here.

Loading from a hub is exchanged for a small policy of the same class; all else is as it is printed.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import vla_pruner as vp

ROOT = Path(__file__).parents[2]
SMALL = {
    "openvla/openvla-7b": "mini-openvla",
    "moojink/openvla-7b-oft-finetuned-libero-spatial": "mini-oft",
}
KEYS = re.compile(r'unnorm_key="\w+"')


def printed(page: str) -> str:
    """The first Python of a page that no other test runs."""
    text = (ROOT / "docs" / "policies" / page).read_text("utf-8")
    return re.findall(r"^```py\n(.*?)^```$", text, flags=re.M | re.S)[0]


@pytest.mark.parametrize(("page", "shape"), [("openvla.md", (7,)), ("openvla-oft.md", (8, 7))])
def test_a_published_checkpoint(page: str, shape: tuple[int, ...], monkeypatch: Any) -> None:
    load = vp.models.load

    def small(name: str, *, device: str) -> Any:
        assert device == "cuda"
        return load(SMALL[name])

    monkeypatch.setattr(vp.models, "load", small)
    scene, wrist = np.zeros((2, 160, 160, 3), np.uint8)
    names: dict[str, Any] = {"image": scene, "scene": scene, "wrist": wrist, "state": np.zeros(8)}
    exec(KEYS.sub('unnorm_key="pick_place"', printed(page)), names)
    actions = names.get("chunk", names.get("action"))
    assert actions.shape == shape and actions.dtype == np.float32
    assert not names["policy"]._forward_hooks


def test_a_vision_language_model(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "models"))
    monkeypatch.delitem(sys.modules, "test_hf_vlm", raising=False)
    from test_hf_vlm import paligemma

    model, ids, shape = paligemma()
    inputs = {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.int64),
        "pixel_values": torch.zeros(1, *shape),
    }
    loaded = {
        "AutoModelForImageTextToText": model.eval(),
        "AutoProcessor": lambda **given: transformers.BatchFeature(inputs),
    }
    for name, value in loaded.items():
        one = type(name, (), {"from_pretrained": staticmethod(lambda *_, v=value, **__: v)})
        monkeypatch.setattr(transformers, name, one)
    names: dict[str, Any] = {"image": None, "prompt": "what is this"}
    exec(printed("transformers-vlm.md"), names)
    assert names["answer"].shape[1] > len(ids)
    assert "8 of 16 visual tokens kept" in capsys.readouterr().out
