"""Three tiny policies with random weights, as folders on disk."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from vla_pruner.models.openvla import (
    OpenVLA,
    OpenVLAConfig,
    OpenVLAOFT,
    OpenVLAOFTConfig,
    TowerConfig,
    save_pretrained,
)
from vla_pruner.models.pi0 import Pi0, Pi0Config, StackConfig, VisionConfig
from vla_pruner.models.pi0 import save_pretrained as save_pi0

TEXT = {
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "pad_token_id": 3,
}
TOWER = TowerConfig(width=16, depth=2, heads=2, mlp=32, image_size=56)
BOUNDS = {"q01": [-1.0] * 7, "q99": [1.0] * 7, "mask": [True] * 7}
SMALL = {
    "towers": (TOWER, TOWER),
    "text": TEXT,
    "empty_token_id": 4,
    "stop_token_id": 2,
    "pad_token_id": 3,
    "norm_stats": {"toy": {"action": BOUNDS, "proprio": BOUNDS}},
}


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<unk>", "<s>", "</s>", "<pad>", "▁", "In", ":", "pick", "up", "the", "can", "Out"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Callable[[], PreTrainedTokenizerFast]:
    """Makes a tokenizer of ten words."""
    return tokenizer


def _save(policy: OpenVLA, folder: Path) -> Path:
    policy.tokenizer = tokenizer()
    save_pretrained(policy, folder)
    return folder


@pytest.fixture(scope="session")
def openvla_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    policy = OpenVLA.build(OpenVLAConfig(**SMALL))
    return _save(policy, tmp_path_factory.mktemp("tiny-openvla"))


@pytest.fixture(scope="session")
def oft_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = OpenVLAOFTConfig(**SMALL, proprio_dim=7, chunk=2, head_blocks=1)
    return _save(OpenVLAOFT.build(config), tmp_path_factory.mktemp("tiny-oft"))


@pytest.fixture(scope="session")
def pi0_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    stack = {"depth": 6, "heads": 2, "kv_heads": 1, "head_dim": 16}
    config = Pi0Config(
        vision=VisionConfig(width=16, depth=2, heads=2, mlp=32, image_size=56),
        prefix=StackConfig(width=32, mlp=64, **stack),
        expert=StackConfig(width=16, mlp=32, **stack),
        vocab_size=384,
        cameras=("front", "wrist"),
        chunk=4,
        flow_steps=3,
        max_tokens=9,
    )
    folder = tmp_path_factory.mktemp("tiny-pi0")
    save_pi0(Pi0.build(config), folder)
    return folder
