"""The vision backbone reads the right block, in the right order, and nothing else."""

import pytest
import torch
from tiny_openvla import towers

from vla_pruner.models.openvla.config import OpenVLAConfig, TowerConfig
from vla_pruner.models.openvla.modeling import initialise
from vla_pruner.models.openvla.vision import Projector, VisionBackbone, VisionTower, unused_tensor


@pytest.fixture
def backbone() -> VisionBackbone:
    torch.manual_seed(0)
    model = VisionBackbone(towers())
    with torch.no_grad():
        initialise(model, std=0.02)
    return model.eval()


def test_a_tower_has_all_blocks_but_the_last_and_no_final_norm() -> None:
    names = VisionTower(TowerConfig(width=8, depth=5, heads=2, mlp=8, image_size=28)).state_dict()
    assert {name.split(".")[1] for name in names if name.startswith("blocks.")} == set("0123")
    assert not any(name.startswith("norm") for name in names)


@torch.no_grad()
def test_features_are_the_patches_row_by_row_without_class_and_register_tokens(
    backbone: VisionBackbone,
) -> None:
    tower = backbone.featurizer
    for block in tower.blocks:  # leave the patch embedding alone
        block.attn.proj.weight.zero_()
        block.mlp.fc2.weight.zero_()
    image = torch.randn(1, 3, 32, 32)
    patch = image[:, :, 8:16, 24:32]  # second row, last column of 4 x 4
    expected = tower.patch_embed.proj(patch)[0, :, 0, 0] + tower.pos_embed[0, 7]
    features = tower(image)
    assert features.shape == (1, 16, 32)
    torch.testing.assert_close(features[0, 7], expected)


@torch.no_grad()
def test_class_register_tokens_and_layer_scale_matter(backbone: VisionBackbone) -> None:
    image = torch.randn(1, 3, 32, 32)
    before = backbone.featurizer(image)
    for parameter in (
        backbone.featurizer.cls_token,
        backbone.featurizer.reg_token,
        backbone.featurizer.blocks[0].ls1.scale_factor,
    ):
        kept = parameter.clone()
        parameter.add_(torch.randn_like(parameter))
        assert (backbone.featurizer(image) - before).abs().max() > 1e-4
        parameter.copy_(kept)


@torch.no_grad()
def test_each_camera_is_seen_by_both_towers_and_they_follow_each_other(
    backbone: VisionBackbone,
) -> None:
    pixels = torch.randn(2, 12, 32, 32)
    features = backbone(pixels)
    assert features.shape == (2, 32, 80)
    for camera in range(2):
        own = pixels[:, 6 * camera : 6 * camera + 6]
        alone = torch.cat(
            [backbone.featurizer(own[:, :3]), backbone.fused_featurizer(own[:, 3:])], dim=2
        )
        torch.testing.assert_close(features[:, 16 * camera : 16 * camera + 16], alone)


def test_wrong_channels_are_refused(backbone: VisionBackbone) -> None:
    with pytest.raises(ValueError, match=r"6 \* cameras"):
        backbone(torch.zeros(1, 3, 32, 32))


def test_the_projector_widens_four_times_first() -> None:
    projector = Projector(10, 16)
    assert projector.fc1.weight.shape == (40, 10)
    assert projector.fc2.weight.shape == (16, 40)
    assert projector.fc3.weight.shape == (16, 16)


@pytest.mark.parametrize(
    ("name", "unused"),
    [
        ("vision_backbone.featurizer.norm.weight", True),
        ("vision_backbone.featurizer.blocks.23.attn.qkv.weight", True),
        ("vision_backbone.featurizer.blocks.22.attn.qkv.weight", False),
        ("vision_backbone.featurizer.blocks.2.norm1.weight", False),
        ("vision_backbone.featurizer.attn_pool.latent", False),
        ("vision_backbone.fused_featurizer.attn_pool.latent", True),
        ("vision_backbone.fused_featurizer.blocks.26.ls1.scale_factor", True),
        ("vision_backbone.fused_featurizer.blocks.23.norm1.weight", False),
        ("language_model.model.norm.weight", False),
    ],
)
def test_only_published_leftovers_count_as_unused(name: str, unused: bool) -> None:
    assert unused_tensor(name, {"featurizer": 24, "fused_featurizer": 27}) is unused


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"heads": 3}, "multiple of heads"),
        ({"image_size": 30}, "multiple of patch"),
        ({"depth": 1}, "at least 2"),
    ],
)
def test_impossible_tower_sizes_are_refused(change: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TowerConfig(
            **(
                {"width": 32, "depth": 3, "heads": 2, "mlp": 8, "patch": 8, "image_size": 32}
                | change
            )
        )


def test_towers_must_agree_on_the_image() -> None:
    first, second = towers()
    with pytest.raises(ValueError, match="same number of patches"):
        OpenVLAConfig(towers=(first, TowerConfig(width=8, depth=2, heads=1, mlp=8, image_size=28)))
    larger = TowerConfig(width=8, depth=2, heads=1, mlp=8, patch=16, image_size=64)
    with pytest.raises(ValueError, match="same image size"):
        OpenVLAConfig(towers=(first, larger))
    with pytest.raises(ValueError, match="at least one camera"):
        OpenVLAConfig(towers=(first, second), num_images=0)
