"""GR00T policies of lerobot with tiny random weights, made offline: the real classes."""

from __future__ import annotations

from pathlib import Path

import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from torch import Tensor, nn

from checks import randomise

CHUNK, PATCHES, IMAGE, BEGIN, END, PAD = 6, 16, 90, 91, 92, 0
HEAD = {
    "backbone_embedding_dim": 32,
    "hidden_size": 24,
    "input_embedding_dim": 32,
    "action_horizon": CHUNK,
    "max_state_dim": 8,
    "max_action_dim": 7,
    "max_num_embodiments": 2,
    "max_seq_len": 32,
    "num_inference_timesteps": 4,
    "diffusion_model_cfg": {
        "positional_embeddings": None,
        "num_layers": 8,
        "num_attention_heads": 4,
        "attention_head_dim": 8,
        "norm_type": "ada_norm",
        "dropout": 0.0,
        "final_dropout": True,
        "output_dim": 24,
        "interleave_self_attention": True,
    },
    "vl_self_attention_cfg": {
        "positional_embeddings": None,
        "num_layers": 1,
        "num_attention_heads": 4,
        "attention_head_dim": 8,
        "dropout": 0.0,
        "final_dropout": True,
    },
}


def groot(folder: Path, *, alternate: bool = True) -> nn.Module:
    """GrootPolicy around GR00T N1.7, loaded from a folder; or with a head that mixes all tokens."""
    from lerobot.policies.groot.configuration_groot import GrootConfig
    from lerobot.policies.groot.groot_n1_7 import GR00TN17, GR00TN17Config
    from lerobot.policies.groot.modeling_groot import GrootPolicy
    from transformers import Qwen3VLConfig

    text = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 97,
        "rope_scaling": {
            "mrope_interleaved": True,
            "mrope_section": [2, 1, 1],
            "rope_type": "default",
        },
    }
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_heads": 2,
        "num_position_embeddings": 64,
        "out_hidden_size": 32,
        "patch_size": 4,
        "deepstack_visual_indexes": [0],
    }
    Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE,
        vision_start_token_id=BEGIN,
        vision_end_token_id=END,
    ).save_pretrained(folder / "backbone")
    settings = GR00TN17Config(
        **HEAD,
        model_name=str(folder / "backbone"),
        select_layer=6,
        use_alternate_vl_dit=alternate,
        model_dtype="float32",
        dtype="float32",
    )
    GR00TN17(settings, load_backbone_weights=False).float().save_pretrained(folder / "model")
    image = PolicyFeature(FeatureType.VISUAL, (3, 32, 32))
    config = GrootConfig(
        base_model_path=str(folder / "model"),
        device="cpu",
        use_bf16=False,
        chunk_size=CHUNK,
        n_action_steps=3,
        max_state_dim=8,
        max_action_dim=7,
        input_features={
            "observation.images.a": image,
            "observation.images.b": image,
            "observation.state": PolicyFeature(FeatureType.STATE, (8,)),
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (7,))},
    )
    return randomise(GrootPolicy(config).float())


def groot_batch(seed: int, cameras: int = 2) -> dict[str, Tensor]:
    """What the policy's preprocessor makes: two rows, the second with a shorter instruction."""
    generator = torch.Generator().manual_seed(seed)
    picture = [BEGIN, *[IMAGE] * PATCHES, END]
    longer = [5, 6, *picture * cameras, 7, 8, 9, 10, 11]
    shorter = [5, 6, *picture * cameras, 7, 8, 9]
    rows = [longer, [PAD] * (len(longer) - len(shorter)) + shorter]
    ids = torch.tensor(rows)
    mask = torch.ones_like(ids)
    mask[1, : len(longer) - len(shorter)] = 0
    count = 2 * cameras
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": torch.rand(count * PATCHES * 4, 3 * 2 * 4 * 4, generator=generator),
        "image_grid_thw": torch.tensor([[1, 8, 8]] * count),
        "state": torch.randn(2, 1, 8, generator=generator),
        "embodiment_id": torch.tensor([0, 1]),
    }
