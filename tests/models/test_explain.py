"""`vp.explain` says what a session does, and what its last call did."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

import vla_pruner as vp


def test_a_session_in_words() -> None:
    policy: Any = vp.models.load("mini-oft")
    images = list(np.zeros((2, 160, 160, 3), np.uint8))
    with vp.prune(policy, "vla-pruner@0.25:window=1") as session:
        before = vp.explain(session).what
        assert before["last call"] == "none with an image yet"
        assert before["cuts"] == "tokens leave before layer 3 of 8"
        assert "window=1" in before["method"] and "layer 2" in before["scores"]
        assert "layers 4 to 7" in before["history"] and "sdpa" in before["attention"]
        for _ in range(2):
            policy.predict_action(images, "pick up the milk", np.zeros(8))
        after = vp.explain(session)
        assert after.what["tokens"] == "layers 0 to 2: 273; layers 3 to 7: 123"
        assert "50 of 200" in after.what["last call"]
        whole, *parts = map(float, re.findall(r"(\d+(?:\.\d+)?) %", after.what["cost"]))
        assert 50 < whole < 75 and len(parts) == 3 and abs(sum(parts) - whole) < 1
        assert "LlamaModel, 8 LlamaDecoderLayer, 5 LlamaAttention" in after.what["hooked"]
        assert after.what["refused"] == "no call"
        session.episodes(["a", "b"])
        with pytest.raises(ValueError, match="named 2 rows"):
            policy.predict_action(images, "pick up the milk", np.zeros(8))
        assert "ValueError: `session.episodes` named 2" in vp.explain(session).what["refused"]
        assert str(after).count("\n") == len(after.what) - 1
    removed = vp.explain(session).what
    assert "removed" in removed["model"] and removed["hooked"] == "nothing"
    with pytest.raises(TypeError, match=r"what `vp\.prune` returned"):
        vp.explain(policy)


def test_a_method_without_scores_or_history() -> None:
    policy: Any = vp.models.load("mini-oft")
    with vp.prune(policy, "divprune@0.5", mode="mask") as session:
        said = vp.explain(session).what
    assert said["scores"] == "none" and said["history"].startswith("none")
    assert "hidden, not removed" in said["cuts"]
