"""The fused DINOv2 + SigLIP vision backbone of OpenVLA, with the published parameter names."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import TowerConfig

# Published tensors that no forward pass reads, by tower: the block after the one whose features
# are used, the final norm behind it and SigLIP's pooling head.
UNUSED_TENSORS = {
    "featurizer": ("norm.", "blocks.{last}."),
    "fused_featurizer": ("norm.", "blocks.{last}.", "attn_pool."),
}


class Attention(nn.Module):
    """Multi-head self-attention, [B, N, D] to [B, N, D]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, N, D / H]
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, width))


class Mlp(nn.Module):
    """Two layers with the exact (erf) GELU, which both published towers use."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    """Per-channel gain; the published name of the parameter is `scale_factor`."""

    def __init__(self, width: int, value: float) -> None:
        super().__init__()
        self.value = value
        self.scale_factor = nn.Parameter(torch.full((width,), value))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale_factor


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()

        def scale() -> nn.Module:
            if config.layer_scale is None:
                return nn.Identity()
            return LayerScale(config.width, config.layer_scale)

        self.norm1 = nn.LayerNorm(config.width, eps=1e-6)
        self.attn = Attention(config.width, config.heads)
        self.ls1 = scale()
        self.norm2 = nn.LayerNorm(config.width, eps=1e-6)
        self.mlp = Mlp(config.width, config.mlp)
        self.ls2 = scale()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """Image [B, 3, H, W] to patch embeddings [B, N, D], row by row."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.width, config.patch, config.patch)

    def forward(self, image: Tensor) -> Tensor:
        return self.proj(image).flatten(2).transpose(1, 2)


class VisionTower(nn.Module):
    """A ViT read at its second-to-last block: [B, 3, H, W] to patch features [B, N, D], no norm."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.config = config
        self.prefix = int(config.class_token) + config.register_tokens
        if config.class_token:
            self.cls_token = nn.Parameter(torch.empty(1, 1, config.width))
        if config.register_tokens:
            self.reg_token = nn.Parameter(torch.empty(1, config.register_tokens, config.width))
        # Class and register tokens carry no position.
        self.pos_embed = nn.Parameter(torch.empty(1, config.patches, config.width))
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth - 1))

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch_embed(image) + self.pos_embed
        batch = x.shape[0]
        prefix = [
            token.expand(batch, -1, -1)
            for token in (getattr(self, "cls_token", None), getattr(self, "reg_token", None))
            if token is not None
        ]
        x = torch.cat([*prefix, x], dim=1)
        for block in self.blocks:
            x = block(x)
        return x[:, self.prefix :]


class VisionBackbone(nn.Module):
    """Both towers side by side: pixels [B, 6 * n, H, W] to features [B, n * N, D1 + D2].

    Channels are, per camera, three for the first tower and three for the second (the towers
    normalise colours differently). All cameras go through a tower as one batch.
    """

    def __init__(self, towers: tuple[TowerConfig, TowerConfig]) -> None:
        super().__init__()
        self.featurizer = VisionTower(towers[0])
        self.fused_featurizer = VisionTower(towers[1])
        self.embed_dim = towers[0].width + towers[1].width
        self.patches = towers[0].patches

    def forward(self, pixel_values: Tensor) -> Tensor:
        batch, channels = pixel_values.shape[:2]
        if pixel_values.ndim != 4 or channels % 6:
            raise ValueError(
                "pixel_values must be [B, 6 * cameras, H, W] (three channels per tower), got "
                f"{tuple(pixel_values.shape)}"
            )
        cameras = channels // 6
        images = pixel_values.reshape(batch * cameras, 6, *pixel_values.shape[2:])
        first, second = images.split(3, dim=1)
        features = torch.cat([self.featurizer(first), self.fused_featurizer(second)], dim=2)
        return features.view(batch, cameras * self.patches, self.embed_dim)


class Projector(nn.Module):
    """Visual features to language-model embeddings: v -> 4 v -> d -> d with GELU between."""

    def __init__(self, vision_width: int, hidden_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(vision_width, 4 * vision_width)
        self.fc2 = nn.Linear(4 * vision_width, hidden_size)
        self.fc3 = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(F.gelu(self.fc2(F.gelu(self.fc1(x)))))


def unused_tensor(name: str, depths: dict[str, int]) -> bool:
    """Whether a published tensor is known to be read by nothing.

    `name` is the full published name, `depths` the published block count of each tower.
    """
    parts = name.split(".", 2)
    if len(parts) < 3 or parts[0] != "vision_backbone" or parts[1] not in UNUSED_TENSORS:
        return False
    prefixes = [p.format(last=depths[parts[1]] - 1) for p in UNUSED_TENSORS[parts[1]]]
    return any(parts[2].startswith(prefix) for prefix in prefixes)
