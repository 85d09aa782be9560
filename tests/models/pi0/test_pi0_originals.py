"""The port against classes that others wrote, on the same random weights, where they install.

`python -m pytest tests/models/pi0/test_pi0_originals.py -rs` in an environment that has them.
"""

import math
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_pi0 import CHUNK, make, observation

from checks import near
from vla_pruner.models.pi0 import Inputs, StackConfig, VisionConfig, from_pretrained, modeling


def coarse_sinusoid(time, width, min_period, max_period):
    """Like `modeling.sinusoid`, rounded to fp32 on the way."""
    period = min_period * (max_period / min_period) ** torch.linspace(0, 1, width // 2)
    angles = time[:, None] * (1 / period * 2 * math.pi)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def test_equal_to_the_class_of_transformers(monkeypatch):
    """transformers 5 has a pi0 without padded cameras, whose prompt holds the image tokens.

    It tells the time in fp32, the originals and the port in fp64.
    """
    pytest.importorskip("transformers.models.pi0", reason="transformers has no pi0 before 5")
    from transformers import PI0Config, PI0ForConditionalGeneration

    monkeypatch.setattr(modeling, "sinusoid", coarse_sinusoid)
    model = make()
    config, vision, image = model.config, model.config.vision, 300
    text = {
        "model_type": "gemma",
        "hidden_size": config.prefix.width,
        "intermediate_size": config.prefix.mlp,
        "num_hidden_layers": config.prefix.depth,
        "num_attention_heads": config.prefix.heads,
        "num_key_value_heads": config.prefix.kv_heads,
        "head_dim": config.prefix.head_dim,
        "vocab_size": config.vocab_size,
    }
    theirs = PI0ForConditionalGeneration(
        PI0Config(
            vlm_config={
                "model_type": "paligemma",
                "text_config": text,
                "vision_config": {
                    "model_type": "siglip_vision_model",
                    "hidden_size": vision.width,
                    "intermediate_size": vision.mlp,
                    "num_hidden_layers": vision.depth,
                    "num_attention_heads": vision.heads,
                    "image_size": vision.image_size,
                    "patch_size": vision.patch,
                    "vision_use_head": False,
                    "projection_dim": config.prefix.width,
                },
                "projection_dim": config.prefix.width,
                "image_token_id": image,
            },
            dit_config={
                **text,
                "hidden_size": config.expert.width,
                "intermediate_size": config.expert.mlp,
            },
            chunk_size=config.chunk,
            max_state_dim=config.max_state_dim,
            max_action_dim=config.max_action_dim,
            num_inference_steps=config.flow_steps,
        )
    ).eval()
    places = {
        "vision_tower.": "model.vlm.vision_tower.",
        "projector.": "model.vlm.multi_modal_projector.linear.",
        "language_model.": "model.vlm.language_model.",
        "expert.": "model.dit.",
        "action_out_proj.": "action_out_proj.",
        "": "embed_action_time.",
    }
    if any(".vision_model." in name for name in theirs.state_dict()):  # older transformers
        places["vision_tower."] += "vision_model."
    state = {}
    for name, value in model.state_dict().items():
        ours = next(place for place in places if name.startswith(place))
        state[places[ours] + name.removeprefix(ours)] = value
    result = theirs.load_state_dict(state, strict=False)
    assert result.unexpected_keys == []
    assert result.missing_keys == ["model.dit.embed_tokens.weight"]

    inputs = model.prepare([observation(0), observation(1)])
    noise = torch.randn(2, CHUNK, config.max_action_dim)
    images = torch.full((2, sum(config.views)), image)
    seen = torch.ones(2, sum(config.views), dtype=torch.int64)
    expected = theirs.sample_actions(
        state=inputs.state,
        input_ids=torch.cat([images, inputs.tokens], dim=1),
        attention_mask=torch.cat([seen, inputs.token_mask.long()], dim=1),
        pixel_values=inputs.images,
        pixel_attention_mask=inputs.image_mask,
        noise=noise,
    )
    near(model.sample(inputs, noise), expected)


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_equal_to_the_class_of_lerobot(kind, tmp_path, monkeypatch):
    """Its own tensors under its own names, a missing camera and a padded prompt."""
    pytest.importorskip("lerobot", reason="lerobot is not installed")
    pytest.importorskip("transformers", minversion="4.57", reason="too old for the port")
    from importlib import import_module

    from lerobot.configs.types import FeatureType, PolicyFeature
    from transformers.models.auto import CONFIG_MAPPING

    module = import_module(f"lerobot.policies.{kind}.modeling_{kind}")
    settings = import_module(f"lerobot.policies.{kind}.configuration_{kind}")
    stack = {"depth": 3, "mlp": 96, "heads": 8, "kv_heads": 1, "head_dim": 16}

    def gemma(variant):
        width = 64 if variant == "gemma_2b" else 32
        return module.GemmaConfig(
            width=width, depth=3, mlp_dim=96, num_heads=8, num_kv_heads=1, head_dim=16
        )

    class Small(dict):
        def __getitem__(self, name):
            def paligemma():
                found = CONFIG_MAPPING["paligemma"]()
                found.vision_config.hidden_size = 48
                found.vision_config.num_hidden_layers = 2
                found.vision_config.num_attention_heads = 4
                found.projection_dim = found.vision_config.projection_dim = 64
                return found

            return paligemma if name == "paligemma" else CONFIG_MAPPING[name]

    monkeypatch.setattr(module, "get_gemma_config", gemma)
    monkeypatch.setattr(module, "CONFIG_MAPPING", Small())
    image = PolicyFeature(type=FeatureType.VISUAL, shape=(3, 224, 224))
    config = getattr(settings, f"{kind.upper()}Config")(
        dtype="float32",
        device="cpu",
        chunk_size=CHUNK,
        n_action_steps=CHUNK,
        input_features={
            "observation.images.a": image,
            "observation.images.b": image,
            "observation.state": PolicyFeature(type=FeatureType.STATE, shape=(8,)),
        },
        output_features={"action": PolicyFeature(type=FeatureType.ACTION, shape=(7,))},
    )
    try:
        policy = getattr(module, f"{kind.upper()}Policy")(config).eval()
    except ValueError as error:
        if "incorrect transformer version" not in str(error):
            raise
        pytest.skip("lerobot 0.4's pi0 wants files of transformers replaced")
    core = policy.model
    core.paligemma_with_expert.paligemma.model.multi_modal_projector.linear = torch.nn.Linear(
        48, 64
    )
    for parameter in core.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.12)
    policy.config._save_pretrained(tmp_path)
    state = {name: value.contiguous() for name, value in policy.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    model = from_pretrained(
        tmp_path,
        vision=VisionConfig(width=48, depth=2, heads=4, mlp=4304),
        prefix=StackConfig(width=64, **stack),
        expert=StackConfig(width=32, **stack),
    )
    images = torch.rand(2, 2, 3, 224, 224) * 2 - 1
    inputs = Inputs(
        images=images,
        image_mask=torch.tensor([[True, True], [True, False]]),
        tokens=torch.randint(1, 100, (2, 12)),
        token_mask=torch.arange(12) < torch.tensor([[8], [12]]),
        state=torch.randn(2, 32),
    )
    noise = torch.randn(2, CHUNK, 32)
    arguments = [
        list(images.unbind(1)),
        list(inputs.image_mask.unbind(1)),
        inputs.tokens,
        inputs.token_mask,
    ]
    if kind == "pi0":
        arguments.append(inputs.state)
    expected = core.sample_actions(*arguments, noise=noise)
    near(model.sample(inputs, noise), expected, rel=0.0001)


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_equal_to_the_class_of_openpi(kind):
    """A folder as openpi publishes it, and what its class made there of an observation.

    Two Pythons take part: openpi wants a transformers that this package does not run on.
    """
    folder = os.environ.get("OPENPI_REFERENCE")
    if folder is None:
        pytest.skip("needs what openpi's class did; run `make test-openpi`")
    file = Path(folder) / f"{kind}.safetensors"
    with safe_open(file, framework="pt") as opened:
        steps = int(opened.metadata()["steps"])
    shown = load_file(file)
    expected, noise = shown.pop("actions"), shown.pop("noise")
    model = from_pretrained(Path(folder) / kind, flow_steps=steps)
    assert model.config.kind == kind
    near(model.sample(Inputs(**shown), noise), expected)
