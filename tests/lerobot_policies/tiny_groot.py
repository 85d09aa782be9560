"""GR00T policies of lerobot with tiny random weights, made offline: the real classes.

lerobot 0.6 has N1.7, on Qwen3-VL; lerobot 0.4 has N1.5, on Eagle 2.5.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
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


def n15(patch: pytest.MonkeyPatch) -> nn.Module:
    """GrootPolicy around GR00T N1.5; its vision tower, which asks for flash-attn, runs without."""
    from lerobot.policies.groot import groot_n1, modeling_groot

    eagle = import_module("lerobot.policies.groot.eagle2_hg_model.modeling_eagle2_5_vl")
    settings = eagle.Eagle25VLConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 4,
        },
        text_config={
            "architectures": ["Qwen3ForCausalLM"],
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "vocab_size": 97,
        },
        select_layer=-1,
        image_token_index=IMAGE,
        _attn_implementation="sdpa",
    )
    tower = eagle.SiglipVisionModel

    def without_flash(config: object) -> nn.Module:
        config._attn_implementation = "sdpa"  # type: ignore[attr-defined]
        return tower(config)

    patch.setattr(eagle, "SiglipVisionModel", without_flash)
    patch.setattr(groot_n1, "ensure_eagle_cache_ready", lambda *args: None)
    read = SimpleNamespace(from_pretrained=lambda *args, **kwargs: settings)
    build = SimpleNamespace(
        from_config=lambda config, **kwargs: eagle.Eagle25VLForConditionalGeneration(config)
    )
    patch.setattr(groot_n1, "AutoConfig", read)
    patch.setattr(groot_n1, "AutoModel", build)
    head = {key: value for key, value in HEAD.items() if key != "max_action_dim"}
    head |= {
        "action_dim": 7,
        "num_target_vision_tokens": 4,
        "diffusion_model_cfg": {**HEAD["diffusion_model_cfg"], "cross_attention_dim": 32},
    }
    config = groot_n1.GR00TN15Config(
        backbone_cfg={"select_layer": 6, "project_to_dim": None},
        action_head_cfg=head,
        action_horizon=CHUNK,
        action_dim=7,
        compute_dtype="float32",
    )
    patch.setattr(
        modeling_groot.GrootPolicy,
        "_create_groot_model",
        lambda policy: groot_n1.GR00TN15(config, local_model_path=""),
    )
    return randomise(_policy(base_model_path="").float())


def n17(folder: Path, *, alternate: bool = True) -> nn.Module:
    """GrootPolicy around GR00T N1.7, loaded from a folder; or with a head that mixes all tokens."""
    from lerobot.policies.groot.groot_n1_7 import GR00TN17, GR00TN17Config
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
    return randomise(_policy(base_model_path=str(folder / "model")).float())


def _policy(**options: str) -> nn.Module:
    from lerobot.policies.groot.configuration_groot import GrootConfig
    from lerobot.policies.groot.modeling_groot import GrootPolicy

    image = PolicyFeature(FeatureType.VISUAL, (3, 32, 32))
    config = GrootConfig(
        **options,
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
    return GrootPolicy(config)


def groot_batch(seed: int, version: str, cameras: int = 2) -> dict[str, Tensor]:
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
    if version == "n15":
        seen = {
            "eagle_input_ids": ids,
            "eagle_attention_mask": mask,
            "eagle_pixel_values": torch.randn(count, 3, 32, 32, generator=generator),
            "eagle_image_sizes": torch.tensor([[32, 32]] * count),
        }
    else:
        seen = {
            "input_ids": ids,
            "attention_mask": mask,
            "pixel_values": torch.rand(count * PATCHES * 4, 3 * 2 * 4 * 4, generator=generator),
            "image_grid_thw": torch.tensor([[1, 8, 8]] * count),
        }
    return {
        **seen,
        "state": torch.randn(2, 1, 8, generator=generator),
        "embodiment_id": torch.tensor([0, 1]),
    }
