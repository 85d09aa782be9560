"""The published layout: what is written loads back bit for bit, what does not fit is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_openvla import make_oft, make_openvla, observation, statistics, tokenizer, towers

from vla_pruner.models.openvla import (
    CheckpointError,
    OpenVLA,
    OpenVLAOFT,
    from_pretrained,
    save_pretrained,
)
from vla_pruner.models.openvla import checkpoint as C
from vla_pruner.models.openvla.config import DINOV2_LARGE, SIGLIP_SO400M, OpenVLAOFTConfig

ROUNDED_MEAN = [0.484375, 0.455078125, 0.40625]  # as in the published preprocessor_config.json


def same_weights(a: OpenVLA, b: OpenVLA) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return list(first) == list(second) and all(torch.equal(first[n], second[n]) for n in first)


def leftovers() -> dict[str, torch.Tensor]:
    """The tensors of a published checkpoint that no forward pass reads, for the tiny towers."""
    return {
        f"vision_backbone.{name}": torch.randn(4)
        for name in (
            "featurizer.norm.weight",
            "featurizer.norm.bias",
            "featurizer.blocks.2.attn.qkv.weight",
            "featurizer.blocks.2.ls1.scale_factor",
            "fused_featurizer.norm.weight",
            "fused_featurizer.blocks.3.mlp.fc1.bias",
            "fused_featurizer.attn_pool.latent",
            "fused_featurizer.attn_pool.mlp.fc2.weight",
        )
    }


def edit_json(path: Path, **changes: object) -> None:
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def edit_tensors(folder: Path, remove: tuple[str, ...] = (), **add: torch.Tensor) -> None:
    path = folder / "model.safetensors"
    state = load_file(path) | add
    save_file({n: t for n, t in state.items() if n not in remove}, path)


@pytest.fixture
def published_oft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[OpenVLAOFT, Path]:
    """A tiny OpenVLA-OFT policy as a fine-tuning run of the original code leaves it."""
    model = make_oft()
    save_pretrained(model, tmp_path, max_shard_bytes=150_000)
    first_shard = next(tmp_path.glob("model-00001-of-*.safetensors"))
    save_file(load_file(first_shard) | leftovers(), first_shard)
    prefixed = {"action_head": "module.", "proprio_projector": ""}
    for head, prefix in prefixed.items():
        state = load_file(tmp_path / f"{head}.safetensors")
        (tmp_path / f"{head}.safetensors").unlink()
        state = {prefix + name: tensor for name, tensor in state.items()}
        torch.save(state, tmp_path / f"{head}--150000_checkpoint.pt")
    names = ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"]
    edit_json(
        tmp_path / "config.json",
        vla_pruner=None,
        norm_stats={"bridge_orig": statistics(9)},
        timm_model_ids=names,
        image_sizes=[32, 32],
        timm_override_act_layers=[None, None],
        auto_map={"AutoConfig": "configuration_prismatic.OpenVLAConfig"},
    )
    edit_json(
        tmp_path / "preprocessor_config.json", means=[ROUNDED_MEAN, [0.5] * 3], interpolations=[]
    )
    tiny = dict(zip(names, towers(image_size=64), strict=True))
    monkeypatch.setattr(C, "PUBLISHED_TOWERS", tiny)
    return model, tmp_path


@pytest.mark.parametrize("shard_bytes", [10**9, 100_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_openvla_survives_the_disk_bit_for_bit(
    tmp_path: Path, shard_bytes: int, dtype: torch.dtype
) -> None:
    model = make_openvla().to(dtype)
    save_pretrained(model, tmp_path, max_shard_bytes=shard_bytes)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert (len(shards) > 2) == (shard_bytes < 10**9)
    if shard_bytes < 10**9:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(model.state_dict())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in model.state_dict().values())
        largest = max(t.nbytes for t in model.state_dict().values())
        assert max(s.stat().st_size for s in shards) < max(shard_bytes, largest) + 20_000
    loaded = from_pretrained(tmp_path)
    assert type(loaded) is OpenVLA and loaded.config == model.config
    assert loaded.dtype == dtype and same_weights(loaded, model)
    assert (
        loaded.predict_actions([observation(0)]) == model.predict_actions([observation(0)])
    ).all()


def test_saving_again_with_fewer_files_leaves_none_behind(tmp_path: Path) -> None:
    save_pretrained(make_openvla(0), tmp_path, max_shard_bytes=100_000)
    model = make_openvla(1)
    save_pretrained(model, tmp_path)
    assert [f.name for f in tmp_path.glob("model*")] == ["model.safetensors"]
    assert same_weights(from_pretrained(tmp_path), model)


def test_oft_survives_the_disk_with_heads_as_safetensors(tmp_path: Path) -> None:
    measured = statistics(0)
    measured["proprio"] = {name: values[:5] for name, values in measured["proprio"].items()}
    model = make_oft(
        read="slot",
        head_blocks=1,
        head_width=24,
        proprio_dim=5,
        chunk=3,
        norm_stats={"desk": measured},
    )
    save_pretrained(model, tmp_path)
    assert {"action_head.safetensors", "proprio_projector.safetensors"} <= {
        f.name for f in tmp_path.iterdir()
    }
    assert not list(tmp_path.glob("*.pt"))
    loaded = from_pretrained(tmp_path)
    assert type(loaded) is OpenVLAOFT and loaded.config == model.config
    assert same_weights(loaded, model)


def test_export_casts_and_records_statistics(tmp_path: Path) -> None:
    model = make_oft()
    model.tokenizer = None
    model.export(tmp_path, tokenizer(), {"desk": statistics(5)})
    edit_json(tmp_path / "config.json", control={"cameras": ["agentview", "wrist"]})
    loaded = from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16
    assert loaded.config.norm_stats == {"desk": statistics(5)}
    one = observation(0, cameras=2) | {"unnorm_key": None}
    assert loaded.predict_actions([one]).shape == (1, 4, 7)
    full = from_pretrained(tmp_path, dtype=torch.float32)
    assert full.dtype == torch.float32 and same_weights(full.to(torch.bfloat16), loaded)


def test_a_published_oft_folder_loads_bit_for_bit(
    published_oft: tuple[OpenVLAOFT, Path],
) -> None:
    model, folder = published_oft
    loaded = from_pretrained(folder, chunk=4, empty_token_id=4)
    assert type(loaded) is OpenVLAOFT and same_weights(loaded, model)
    config = loaded.config
    assert (config.num_images, config.proprio_dim, config.head_blocks) == (2, 8, 2)
    assert config.head_width is None and config.center_crop
    assert config.towers[0].mean == tuple(ROUNDED_MEAN)
    assert config.towers[0].image_size == 32
    # dataset_statistics.json stands above the statistics of pre-training in config.json.
    assert sorted(config.norm_stats) == ["libero_spatial_no_noops", "pick_place"]
    assert np.isfinite(loaded.predict_actions([observation(0, cameras=2)])).all()
    assert loaded.tokenizer("pick up")["input_ids"] == tokenizer()("pick up")["input_ids"]


def test_a_published_folder_needs_no_robot_state(published_oft: tuple[OpenVLAOFT, Path]) -> None:
    _, folder = published_oft
    (folder / "proprio_projector--150000_checkpoint.pt").unlink()
    loaded = from_pretrained(folder, chunk=25, num_images=3, bounds="min-max", read="slot")
    config = loaded.config
    assert isinstance(config, OpenVLAOFTConfig)
    assert (config.proprio_dim, config.chunk, config.num_images) == (None, 25, 3)
    assert (config.bounds, config.read) == ("min-max", "slot")


def test_the_base_model_is_not_cropped(published_oft: tuple[OpenVLAOFT, Path]) -> None:
    model, folder = published_oft
    for file in [*folder.glob("*.pt"), folder / "dataset_statistics.json"]:
        file.unlink()
    loaded = from_pretrained(folder)
    assert type(loaded) is OpenVLA and not loaded.config.center_crop
    assert list(loaded.config.norm_stats) == ["bridge_orig"]
    assert torch.equal(loaded.projector.fc1.weight, model.projector.fc1.weight)


def test_published_config_of_the_real_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["OpenVLAForActionPrediction"],
                "image_sizes": [224, 224],
                "llm_backbone_id": "llama2-7b-pure",
                "model_type": "openvla",
                "n_action_bins": 256,
                "norm_stats": {"bridge_orig": statistics(0)},
                "pad_to_multiple_of": 64,
                "pad_token_id": 32000,
                "text_config": {
                    "model_type": "llama",
                    "pad_token_id": 32000,
                    "torch_dtype": "bfloat16",
                    "vocab_size": 32064,
                },
                "timm_model_ids": [
                    "vit_large_patch14_reg4_dinov2.lvd142m",
                    "vit_so400m_patch14_siglip_224",
                ],
                "torch_dtype": "bfloat16",
            }
        )
    )
    config, dtype = C.read_config(tmp_path)
    assert config.towers == (DINOV2_LARGE, SIGLIP_SO400M) and dtype == torch.bfloat16
    assert config.action_vocab_end == 32000 and config.empty_token_id == 29871
    assert OpenVLA.build(config, device="meta").language_model.config.hidden_size == 4096


# ---------------------------------------------------------------------- refusals
def test_missing_unexpected_and_misshapen_tensors_are_listed(tmp_path: Path) -> None:
    save_pretrained(make_openvla(), tmp_path)
    edit_tensors(
        tmp_path,
        remove=("projector.fc1.bias", "language_model.model.norm.weight"),
        **{
            "projector.fc4.weight": torch.zeros(2),
            "vision_backbone.featurizer.blocks.9.norm1.weight": torch.zeros(2),
            "projector.fc2.bias": torch.zeros(3),
        },
    )
    with pytest.raises(CheckpointError) as error:
        from_pretrained(tmp_path)
    said = str(error.value)
    assert "missing tensors (2): language_model.model.norm.weight, projector.fc1.bias" in said
    assert "unexpected tensors (2): " in said and "projector.fc4.weight" in said
    assert "vision_backbone.featurizer.blocks.9.norm1.weight" in said
    assert "projector.fc2.bias [3] instead of [64]" in said


def test_an_incomplete_head_is_refused(published_oft: tuple[OpenVLAOFT, Path]) -> None:
    _, folder = published_oft
    file = folder / "action_head--150000_checkpoint.pt"
    state = torch.load(file, weights_only=True)
    del state["module.model.fc1.bias"]
    torch.save(state, file)
    with pytest.raises(CheckpointError, match=r"missing tensors \(1\): action_head.model.fc1.bias"):
        from_pretrained(folder, chunk=4)


def test_pickled_code_is_never_run(published_oft: tuple[OpenVLAOFT, Path], tmp_path: Path) -> None:
    _, folder = published_oft

    class Trap:
        def __reduce__(self) -> tuple:
            return (Path(tmp_path / "sprung").touch, ())

    torch.save({"model.fc1.weight": Trap()}, folder / "action_head--150000_checkpoint.pt")
    with pytest.raises(CheckpointError, match="not a plain file of tensors"):
        from_pretrained(folder)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("name", ["noisy_action_projector", "vision_backbone"])
def test_unsupported_heads_are_refused(published_oft: tuple, name: str) -> None:
    _, folder = published_oft
    torch.save({}, folder / f"{name}--150000_checkpoint.pt")
    with pytest.raises(CheckpointError, match="supported"):
        from_pretrained(folder)


def test_two_heads_are_one_too_many(published_oft: tuple[OpenVLAOFT, Path]) -> None:
    _, folder = published_oft
    torch.save({}, folder / "action_head--50000_checkpoint.pt")
    with pytest.raises(CheckpointError, match="several action_head files"):
        from_pretrained(folder)


def test_incomplete_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no policy folder: it has no config\.json"):
        from_pretrained(tmp_path)
    save_pretrained(make_openvla(), tmp_path, max_shard_bytes=150_000)
    next(tmp_path.glob("model-00002-of-*.safetensors")).rename(tmp_path / "gone")
    with pytest.raises(CheckpointError, match=r"lacks model-00002-of-.*index\.json"):
        from_pretrained(tmp_path)
    for file in tmp_path.glob("model*"):
        file.unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        from_pretrained(tmp_path)


def test_other_towers_and_resizes_are_refused(published_oft: tuple[OpenVLAOFT, Path]) -> None:
    _, folder = published_oft
    edit_json(folder / "preprocessor_config.json", image_resize_strategy="letterbox")
    with pytest.raises(CheckpointError, match="only 'resize-naive'"):
        from_pretrained(folder)
    edit_json(folder / "config.json", timm_model_ids=["vit_large_patch14_clip_224.openai"])
    with pytest.raises(CheckpointError, match=r"vision towers \['vit_large_patch14_clip"):
        from_pretrained(folder)


def test_unknown_overrides_are_refused(tmp_path: Path) -> None:
    save_pretrained(make_openvla(), tmp_path)
    with pytest.raises(TypeError, match=r"unknown options \['chunk'\].*num_images"):
        from_pretrained(tmp_path, chunk=8)


@pytest.mark.parametrize("name", ["no/such/folder", "./missing", "missing", Path("owner/name")])
def test_a_path_that_is_no_folder_is_no_hub_id(name: str | Path) -> None:
    with pytest.raises(CheckpointError, match="neither a folder nor a hub id"):
        from_pretrained(name)


def test_the_hub_without_a_network_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(name: str, **options: object) -> str:
        assert name == "openvla/openvla-7b" and options["revision"] == "abc"
        raise LocalEntryNotFoundError("outgoing traffic has been disabled")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(CheckpointError, match=r"hub failed.*outgoing traffic.*give the folder"):
        from_pretrained("openvla/openvla-7b", revision="abc")


def test_a_hub_snapshot_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    model = make_openvla()
    save_pretrained(model, tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: str(tmp_path))
    assert same_weights(from_pretrained("someone/tiny"), model)
