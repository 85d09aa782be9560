"""A checkpoint as lerobot saves it."""

from __future__ import annotations

import pytest


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """A SmolVLA with its processors and a tokenizer of a few words."""
    from lerobot.policies.factory import make_pre_post_processors
    from tiny_env import SIZE
    from tiny_lerobot import smolvla
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<unk>", "<pad>", "pick", "up", "the", "can"])}
    core = Tokenizer(models.WordLevel(words, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", pad_token="<pad>"
    ).save_pretrained(tmp_path / "words")
    size = (SIZE, SIZE)  # lerobot 0.4 cannot read back that there is none
    words = str(tmp_path / "words")
    policy = smolvla(monkeypatch, vlm_model_name=words, resize_imgs_with_padding=size)
    folder = tmp_path / "policy"
    policy.save_pretrained(folder)
    for processor in make_pre_post_processors(policy.config):
        processor.save_pretrained(folder)
    return folder
