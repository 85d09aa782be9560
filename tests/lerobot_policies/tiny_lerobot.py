"""Policies of lerobot with tiny random weights, made offline: the real classes, small settings.

Nothing is downloaded: configurations that lerobot reads from the hub are replaced while a policy is
made, and tokenizers by stand-ins, as the tests give token ids.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from torch import Tensor, nn

from checks import randomise

CHUNK, WORDS = 6, 10


def features(cameras: int, size: int) -> dict[str, dict[str, PolicyFeature]]:
    inputs = {
        f"observation.images.{name}": PolicyFeature(FeatureType.VISUAL, (3, size, size))
        for name in "abc"[:cameras]
    }
    inputs["observation.state"] = PolicyFeature(FeatureType.STATE, (8,))
    return {
        "input_features": inputs,
        "output_features": {"action": PolicyFeature(FeatureType.ACTION, (7,))},
    }


def batch_of(seed: int, size: int, batch: int = 2, cameras: str = "ab") -> dict[str, Tensor]:
    """Observations; the second row has a shorter instruction."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(1, 90, (batch, WORDS), generator=torch.Generator().manual_seed(7))
    mask = torch.ones(batch, WORDS, dtype=torch.bool)
    mask[1:, 6:] = False
    found = {
        f"observation.images.{name}": torch.rand(batch, 3, size, size, generator=generator)
        for name in cameras
    }
    return {
        **found,
        "observation.state": torch.randn(batch, 8, generator=generator),
        "observation.language.tokens": words,
        "observation.language.attention_mask": mask,
    }


def pi(patch: pytest.MonkeyPatch, version: str) -> nn.Module:
    """PI0Policy, PI05Policy, or the inner model of PI0FastPolicy."""
    from importlib import import_module

    code = import_module(f"lerobot.policies.{version}.modeling_{version}")
    settings = import_module(f"lerobot.policies.{version}.configuration_{version}")
    mapping = code.CONFIG_MAPPING

    def paligemma() -> object:
        config = mapping["paligemma"]()
        config.projection_dim = 32
        vision = config.vision_config
        vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads = 16, 1, 2
        vision.image_size, vision.patch_size = 56, 14
        return config

    class Small(dict):
        def __getitem__(self, name: str) -> object:
            return paligemma if name == "paligemma" else mapping[name]

    def gemma(variant: str) -> object:
        return code.GemmaConfig(
            width=32, depth=6, mlp_dim=48, num_heads=4, num_kv_heads=1, head_dim=8
        )

    patch.setattr(code, "CONFIG_MAPPING", Small())
    patch.setattr(code, "get_gemma_config", gemma)
    kind = {"pi0": "PI0", "pi05": "PI05", "pi0_fast": "PI0Fast"}[version]
    options = dict(device="cpu", dtype="float32", chunk_size=CHUNK, n_action_steps=3)
    if version != "pi0_fast":
        options |= dict(num_inference_steps=4, image_resolution=(56, 56))
    config = getattr(settings, f"{kind}Config")(**features(2, 56), **options)
    if version == "pi0_fast":
        words = SimpleNamespace(bos_token_id=2, convert_tokens_to_ids=lambda token: 3)
        model = code.PI0FastPytorch(config, paligemma_tokenizer=words)
        stacks = model.paligemma_with_expert
    else:
        model = getattr(code, f"{kind}Policy")(config)
        stacks = model.model.paligemma_with_expert
    projector = stacks.paligemma.model.multi_modal_projector
    projector.linear = nn.Linear(16, 32)
    randomise(model)
    if version != "pi0_fast":
        # With large flows, rounding in one step grows a hundredfold over four.
        model.model.action_out_proj.weight.mul_(0.2)
    return model


def smolvla(patch: pytest.MonkeyPatch, special: bool = False, **options: object) -> nn.Module:
    """SmolVLAPolicy with alternating self- and cross-attention in its expert."""
    import lerobot.policies.smolvla.smolvlm_with_expert as code
    from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
    from transformers import SmolVLMConfig

    text = dict(
        model_type="llama",
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=97,
    )
    vision = dict(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=56,
        patch_size=14,
    )
    tiny = SmolVLMConfig(vision_config=vision, text_config=text, image_token_id=90, scale_factor=1)
    words = SimpleNamespace(fake_image_token_id=5, global_image_token_id=6)
    processor = SimpleNamespace(tokenizer=words)
    patch.setattr(code, "AutoConfig", SimpleNamespace(from_pretrained=lambda *a, **k: tiny))
    patch.setattr(code, "AutoProcessor", SimpleNamespace(from_pretrained=lambda *a, **k: processor))
    config = SmolVLAConfig(
        **features(2, 56),
        device="cpu",
        load_vlm_weights=False,
        num_vlm_layers=6,
        chunk_size=CHUNK,
        n_action_steps=3,
        num_steps=4,
        add_image_special_tokens=special,
        **{"resize_imgs_with_padding": None, **options},
    )
    return randomise(SmolVLAPolicy(config).float())
