"""openpi's PI0Pytorch with tiny random weights; as a script, what it does, for the port's test.

    python tests/openpi_policies/tiny_openpi.py FOLDER

writes each kind as openpi publishes a policy, and beside it an observation with its actions.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from openpi.models_pytorch import gemma_pytorch, pi0_pytorch
from safetensors.torch import save_file, save_model
from torch import Tensor, nn

CHUNK, DIM, WORDS, STEPS, M = 6, 32, 12, 4, 16
CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
STACK = {"width": 64, "mlp": 128, "depth": 4, "heads": 8, "kv_heads": 1, "head_dim": 16}
VISION = {"width": 48, "depth": 2, "heads": 4, "mlp": 4304, "patch": 56}


def small_stacks(patch: pytest.MonkeyPatch) -> None:
    """A vision tower that is smaller than openpi has a setting for."""
    mapping = gemma_pytorch.CONFIG_MAPPING

    def paligemma() -> object:
        config = mapping["paligemma"]()
        vision = config.vision_config
        vision.hidden_size, vision.num_hidden_layers = VISION["width"], VISION["depth"]
        vision.num_attention_heads, vision.patch_size = VISION["heads"], VISION["patch"]
        return config

    class Small(dict):
        def __getitem__(self, name: str) -> object:
            return paligemma if name == "paligemma" else mapping[name]

    patch.setattr(gemma_pytorch, "CONFIG_MAPPING", Small())
    # The projector's width is not asked of the configuration.
    made = gemma_pytorch.PaliGemmaWithExpertModel.__init__

    def projecting(self: nn.Module, *args: object, **kwargs: object) -> None:
        made(self, *args, **kwargs)
        projector = self.paligemma.model.multi_modal_projector
        projector.linear = nn.Linear(VISION["width"], STACK["width"])

    patch.setattr(gemma_pytorch.PaliGemmaWithExpertModel, "__init__", projecting)


def small_weights(config: object) -> nn.Module:
    """A model of that configuration with random weights, small enough for a test."""
    model = pi0_pytorch.PI0Pytorch(config)
    torch.set_float32_matmul_precision("highest")  # making it lowers that
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.15, generator=generator)
    # With large flows, rounding in one step grows a hundredfold over four.
    model.action_out_proj.weight.mul_(0.2)
    return model.eval()


def openpi(patch: pytest.MonkeyPatch, kind: str) -> nn.Module:
    """openpi's smallest stacks around a smaller vision tower."""
    small_stacks(patch)
    config = SimpleNamespace(
        pi05=kind == "pi05",
        paligemma_variant="dummy",
        action_expert_variant="dummy",
        action_horizon=CHUNK,
        action_dim=DIM,
        dtype="float32",
        pytorch_compile_mode=None,
    )
    model = small_weights(config)
    if os.environ.get("TORCHDYNAMO_DISABLE") != "1":
        vars(model).pop("sample_actions", None)  # compiled, where the version does that to itself
    return model


def observation(seed: int) -> SimpleNamespace:
    """Three cameras; the second row has one less, and a shorter instruction."""
    generator = torch.Generator().manual_seed(seed)
    images = [torch.rand(2, 3, 224, 224, generator=generator) * 2 - 1 for _ in CAMERAS]
    masks = [torch.ones(2, dtype=torch.bool) for _ in CAMERAS]
    masks[-1][1] = False
    return SimpleNamespace(
        images=dict(zip(CAMERAS, images, strict=True)),
        image_masks=dict(zip(CAMERAS, masks, strict=True)),
        tokenized_prompt=torch.randint(1, 90, (2, WORDS), generator=generator),
        tokenized_prompt_mask=torch.arange(WORDS) < torch.tensor([[WORDS], [8]]),
        state=torch.randn(2, DIM, generator=generator),
        token_ar_mask=None,
        token_loss_mask=None,
    )


def noise() -> Tensor:
    return torch.randn(2, CHUNK, DIM, generator=torch.Generator().manual_seed(5))


def act(policy: nn.Module, seed: int) -> Tensor:
    """A chunk [2, CHUNK, DIM], always from the same noise."""
    return policy.sample_actions("cpu", observation(seed), noise=noise(), num_steps=STEPS)


def revision() -> str:
    """The commit of the checkout of openpi that is imported, or the package of the registry."""
    import subprocess

    for name in ("rlinf-openpi", "rpent-openpi"):
        with contextlib.suppress(PackageNotFoundError):
            return f"{name} {version(name)}"
    folder = Path(pi0_pytorch.__file__).parents[3]
    command = ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "without git"


@torch.no_grad()
def write(folder: Path) -> None:
    """See above."""
    for kind in ("pi0", "pi05"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        with pytest.MonkeyPatch.context() as patch:
            policy = openpi(patch, kind)
        save_model(policy, str(folder / kind / "model.safetensors"))
        settings = {
            "action_horizon": CHUNK,
            "action_dim": DIM,
            "paligemma_variant": "gemma_2b",
            "action_expert_variant": "gemma_300m",
            "vla_pruner": {"vision": VISION, "prefix": STACK, "expert": STACK},
        }
        (folder / kind / "config.json").write_text(json.dumps(settings))
        shown = observation(1)
        reference = {
            "images": torch.stack(list(shown.images.values()), dim=1),
            "image_mask": torch.stack(list(shown.image_masks.values()), dim=1),
            "tokens": shown.tokenized_prompt,
            "token_mask": shown.tokenized_prompt_mask,
            "state": shown.state,
            "noise": noise(),
            "actions": act(policy, 1),
        }
        save_file(reference, folder / f"{kind}.safetensors", metadata={"steps": str(STEPS)})


if __name__ == "__main__":
    write(Path(sys.argv[1]))
