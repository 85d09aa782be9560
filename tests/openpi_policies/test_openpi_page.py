"""docs/policies/openpi.md, line by line, with openpi's own `Policy`. `make test-openpi` runs it.

Two things are not here and are made: a checkpoint, of openpi's smallest stacks, in the folder that
its conversion writes, and PaliGemma's vocabulary, which it would fetch from a bucket.
"""

from __future__ import annotations

import dataclasses
import io
import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

if find_spec("openpi") is None or find_spec("openpi.training") is None:
    pytest.skip("openpi is not installed; run `make test-openpi`", allow_module_level=True)

import sentencepiece
from openpi.models import tokenizer
from openpi.shared import normalize
from openpi.training import config
from safetensors.torch import save_model
from tiny_openpi import M, small_stacks, small_weights

PAGE = Path(__file__).parents[2] / "docs" / "policies" / "openpi.md"


def vocabulary(folder: Path) -> Path:
    """A small SentencePiece model: every byte, and little else."""
    written = io.BytesIO()
    words = ["do", "something", "pick", "up", "the", "black", "bowl", "on", "plate", "basket"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words * 20),
        model_writer=written,
        vocab_size=300,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(written.getvalue())
    return folder / "tokenizer.model"


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of the configuration that the page names, with weights of a few kilobytes."""
    named = config.get_config("pi05_libero")
    model = dataclasses.replace(
        named.model, paligemma_variant="dummy", action_expert_variant="dummy"
    )
    small = dataclasses.replace(named, model=model)
    monkeypatch.setattr(config, "get_config", {"pi05_libero": small}.__getitem__)
    words = vocabulary(tmp_path)

    def local(url: str, **_: object) -> Path:
        return words if url == "gs://big_vision/paligemma_tokenizer.model" else Path(url)

    monkeypatch.setattr(tokenizer.download, "maybe_download", local)
    small_stacks(monkeypatch)
    with torch.no_grad():
        made = small_weights(small.model)
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    save_model(made, str(folder / "model.safetensors"))
    ones = {name: np.ones(32) for name in ("std", "q99")}
    low = {name: np.zeros(32) - 1 for name in ("mean", "q01")}
    stats = {name: normalize.NormStats(**ones, **low) for name in ("state", "actions")}
    normalize.save(folder / "assets" / "physical-intelligence" / "libero", stats)
    return folder


def test_the_page_runs_as_it_is_printed(published: Path, capsys: pytest.CaptureFixture) -> None:
    code = re.findall(r"^```py\n(.*?)^```$", PAGE.read_text("utf-8"), flags=re.M | re.S)[0]
    assert code.count("CHECKPOINT") == 1
    names: dict[str, object] = {"CHECKPOINT": published}
    torch.manual_seed(0)
    exec(compile(code, PAGE.name, "exec"), names)
    assert names["chunk"].shape == (10, 7) and np.isfinite(names["chunk"]).all()
    last = names["session"].last
    assert not last.warm_up.any() and last.visual_kept == round(0.25 * 3 * M)
    assert f"{last.visual_kept} of {3 * M} visual tokens kept" in capsys.readouterr().out
