"""Policy folders in the published layout: strict loading of tensors by name, and saving.

A folder holds `config.json`, the tensors (`model.safetensors`, or shards and their index),
tokenizer files, `preprocessor_config.json`, `dataset_statistics.json` for fine-tuned policies and,
for OpenVLA-OFT, the two heads: `action_head--<step>_checkpoint.pt` and
`proprio_projector--<step>_checkpoint.pt` as published, or `action_head.safetensors` and
`proprio_projector.safetensors` as written here. Of `.pt` files nothing but tensors is unpickled.

A folder whose config.json names a `base` holds, instead of the language model, low-rank changes of
it: `language_model.<matrix>.a` and `.b` (see `base`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from ..given.checks import listed, shown
from ..given.folder import (
    CheckpointError,
    Stored,
    check_control,
    entry,
    fill,
    local_folder,
    own_file,
    pickled_tensors,
    plain_name,
    read_fast_tokenizer,
    read_json,
    reading,
    shards,
    stored_tensors,
    write_json,
)
from ..port import check_attention
from .base import merged_file
from .config import (
    PUBLISHED_TOWERS,
    OpenVLAConfig,
    OpenVLAOFTConfig,
    TowerConfig,
    tower_to_dict,
)
from .modeling import OpenVLA
from .oft import OpenVLAOFT
from .processing import bounds
from .vision import unused_tensor

HEADS = ("action_head", "proprio_projector")
FOREIGN_HEADS = {
    "noisy_action_projector": "the diffusion head; only the L1 head is supported",
    "vision_backbone": "a FiLM-conditioned vision backbone, which is not supported",
}
OWN = "vla_pruner"
"""Entry of config.json that holds what the published layout has no place for."""
_LANGUAGE_MODEL = "language_model."
_EMBEDDINGS = "language_model.model.embed_tokens.weight"
_LM_HEAD = "language_model.lm_head.weight"
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


# ---------------------------------------------------------------------- loading
def from_pretrained(
    path_or_hub_id: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    attn_implementation: str = "sdpa",
    revision: str | None = None,
    **overrides: Any,
) -> OpenVLA:
    """Load OpenVLA, or OpenVLA-OFT when the folder holds an action head.

    Args:
        path_or_hub_id: folder, or an id such as "openvla/openvla-7b".
        device, dtype: where to put the weights; `dtype=None` keeps the checkpoint's.
        attn_implementation: "sdpa" or "eager".
        revision: branch, tag or commit on the hub.
        overrides: configuration fields that a published folder does not record, such as
            `num_images=3`, `chunk=25`, `bounds="min-max"`, `read="slot"`, `center_crop=False`.

    Errors: CheckpointError for a folder that is missing, incomplete or does not fit, with the names
    of the tensors; TypeError for an unknown override.
    """
    check_attention(attn_implementation)
    folder = local_folder(path_or_hub_id, revision)
    config, stored_dtype = read_config(folder, overrides)
    kind = OpenVLAOFT if isinstance(config, OpenVLAOFTConfig) else OpenVLA
    options: dict[str, Any] = {
        "dtype": dtype or stored_dtype,
        "attn_implementation": attn_implementation,
        "random": False,
    }
    with reading(folder / "config.json", "no model can be built: "):
        outline = kind.build(config, device="meta", **options)
    load_tensors(outline, folder)  # Names and sizes, before memory is taken.
    model = kind.build(config, device=device, **options)
    load_tensors(model, folder)
    model.tokenizer = read_tokenizer(folder)
    return model


def read_config(
    folder: Path, overrides: Mapping[str, Any] | None = None
) -> tuple[OpenVLAConfig, torch.dtype]:
    """Configuration of a policy folder and the dtype of its tensors. Errors: CheckpointError."""
    file = folder / "config.json"
    raw = read_json(file)
    own = entry(raw, OWN, dict, file)
    oft = own.get("kind") == "openvla-oft" or _head_file(folder, "action_head") is not None
    kind = OpenVLAOFTConfig if oft else OpenVLAConfig
    known = {field.name for field in fields(kind)}
    unknown = sorted(set(overrides or {}) - known)
    if unknown:
        raise TypeError(f"unknown options {unknown}; this policy has {', '.join(sorted(known))}")
    for name, why in FOREIGN_HEADS.items():
        if list(folder.glob(f"{name}--*.pt")):
            raise CheckpointError(f"{folder} holds {name}--*.pt: {why}")

    statistics = folder / "dataset_statistics.json"
    measured = (
        read_json(statistics) if statistics.exists() else entry(raw, "norm_stats", dict, file)
    )
    text = entry(raw, "text_config", dict, file)
    with reading(file):
        values: dict[str, Any] = {
            "towers": _read_towers(raw, own, folder),
            "text": {k: v for k, v in text.items() if k not in _TEXT_IGNORED},
            "norm_stats": measured,
            # Fine-tuned policies, which carry statistics of their own, saw random crops.
            "center_crop": oft or statistics.exists(),
        }
        for name in ("n_action_bins", "pad_to_multiple_of", "pad_token_id"):
            if name in raw:
                values[name] = raw[name]
        if oft and not own:
            values |= _published_oft_sizes(folder, hidden=_hidden_size(values["text"]))
        values |= {k: v for k, v in own.items() if k in known and k != "towers"}
        config = kind(**(values | dict(overrides or {})))
        stored = raw.get("torch_dtype", raw.get("dtype")) or "bfloat16"
        dtype = _DTYPES.get(str(stored).removeprefix("torch."))
        if dtype is None:
            raise ValueError(f"torch_dtype={shown(stored)} must be one of {', '.join(_DTYPES)}")
    chunk = config.chunk if isinstance(config, OpenVLAOFTConfig) else 1
    check_control(raw, file, cameras=config.num_images, chunk=chunk)
    with reading(statistics if statistics.exists() else file):
        for key in config.norm_stats:
            bounds(config, key, "action")
            if getattr(config, "proprio_dim", None) is not None:
                bounds(config, key, "proprio")
    return config, dtype


# Bookkeeping of transformers inside text_config that is not a size of the model.
_TEXT_IGNORED = ("torch_dtype", "dtype", "_attn_implementation_autoset", "transformers_version")


def _hidden_size(text: Mapping[str, Any]) -> int:
    from transformers import LlamaConfig

    return int(LlamaConfig(**text).hidden_size)


def _read_towers(
    raw: Mapping[str, Any], own: Mapping[str, Any], folder: Path
) -> tuple[TowerConfig, TowerConfig]:
    """Tower sizes: our own entry, else the published models by name; colours as preprocessed."""
    file = folder / "config.json"
    if "towers" in own:
        towers = [TowerConfig(**tower) for tower in entry(own, "towers", list, file)]
    else:
        names = entry(raw, "timm_model_ids", list, file)
        unknown = [name for name in names if name not in list(PUBLISHED_TOWERS)]
        if unknown or len(names) != 2:
            raise CheckpointError(
                f"{folder} uses the vision towers {shown(names)}; supported are the two of "
                f"OpenVLA, {', '.join(PUBLISHED_TOWERS)}"
            )
        sizes = entry(raw, "image_sizes", list, file) or [224, 224]
        towers = [
            replace(PUBLISHED_TOWERS[name], image_size=size)
            for name, size in zip(names, sizes, strict=True)
        ]
    if len(towers) != 2:
        raise ValueError(f"OpenVLA fuses two vision towers, got {len(towers)}")
    preprocessor = folder / "preprocessor_config.json"
    if preprocessor.exists():
        colours = read_json(preprocessor)
        strategy = colours.get("image_resize_strategy", "resize-naive")
        if strategy != "resize-naive":
            raise CheckpointError(
                f"{preprocessor} asks for image_resize_strategy={strategy!r}; only 'resize-naive', "
                "which OpenVLA uses, is supported"
            )
        if ("means" in colours) != ("stds" in colours):
            raise CheckpointError(f"{preprocessor} has only one of means and stds")
        if "means" in colours:
            with reading(preprocessor):
                towers = [
                    replace(tower, mean=mean, std=std)
                    for tower, mean, std in zip(
                        towers, colours["means"], colours["stds"], strict=True
                    )
                ]
    return towers[0], towers[1]


def _published_oft_sizes(folder: Path, hidden: int) -> dict[str, Any]:
    """What the shapes of the heads tell about a published OpenVLA-OFT policy."""
    outputs, width = _sizes_of(folder, "action_head", "model.fc2.weight")
    head = [tensor.name for tensor in _head_tensors(folder, "action_head")]
    blocks = {name.split(".")[2] for name in head if name.startswith("model.mlp_resnet_blocks.")}
    sizes: dict[str, Any] = {
        "action_dim": outputs,
        "head_width": None if width == hidden else width,
        "head_blocks": len(blocks),
        "proprio_dim": None,
    }
    if _head_file(folder, "proprio_projector") is not None:
        sizes["proprio_dim"] = _sizes_of(folder, "proprio_projector", "fc1.weight")[1]
    return sizes


def _sizes_of(folder: Path, head: str, name: str) -> tuple[int, int]:
    """Outputs and inputs of a layer of a head. Errors: CheckpointError with the names found."""
    found = list(_head_tensors(folder, head))
    for tensor in found:
        if tensor.name == name and tensor.tensor.ndim == 2:
            return tensor.tensor.shape[0], tensor.tensor.shape[1]
    raise CheckpointError(
        f"{_head_file(folder, head)} lacks {name}, a matrix; it holds "
        f"{listed([tensor.name for tensor in found])}"
    )


def load_tensors(model: OpenVLA, folder: Path) -> None:
    """Fill a model from a policy folder, tensor by tensor.

    Errors: CheckpointError with the tensors that are missing, unexpected or of another shape.
    Published tensors that nothing reads are dropped by name.
    """
    target = model.state_dict(keep_vars=True)
    depths = {
        name: tower.depth
        for name, tower in zip(("featurizer", "fused_featurizer"), model.config.towers, strict=True)
    }
    tensors = (
        tensor
        for tensor in _all_tensors(folder, model)
        if not unused_tensor(tensor.name, depths)
        and not tensor.name.endswith("rotary_emb.inv_freq")
    )
    fill(target, tensors, f"{folder} does not fit a {type(model).__name__} of its config.json")


def _all_tensors(folder: Path, model: OpenVLA) -> Iterator[Stored]:
    base, lora = model.config.base, {}
    for stored in _plain(shards(folder)):
        if base is not None and stored.name.startswith(_LANGUAGE_MODEL):
            lora[stored.name.removeprefix(_LANGUAGE_MODEL)] = stored.tensor
            continue
        yield stored
        if stored.name == _EMBEDDINGS and model.config.tied:
            yield stored._replace(name=_LM_HEAD)
    if base is not None:
        layers = int(model.config.text["num_hidden_layers"])
        try:
            merged = merged_file(base, layers, lora)
        except CheckpointError as error:
            raise CheckpointError(f"{folder}: {error}") from error
        for stored in _plain([merged]):
            name = _LANGUAGE_MODEL + stored.name
            yield stored._replace(name=name)
            if name == _EMBEDDINGS and model.config.tied:
                yield stored._replace(name=_LM_HEAD)
    if isinstance(model, OpenVLAOFT):
        for head in HEADS:
            for tensor in _head_tensors(folder, head):
                yield tensor._replace(name=f"{head}.{tensor.name}")


def own_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors that a policy folder itself holds, heads included. Errors: CheckpointError."""
    heads = {f"{head}.{t.name}": t.tensor for head in HEADS for t in _head_tensors(folder, head)}
    return {stored.name: stored.tensor for stored in _plain(shards(folder))} | heads


def _plain(files: Iterable[Path]) -> Iterator[Stored]:
    for file in files:
        for stored in stored_tensors(file):
            yield stored._replace(name=plain_name(stored.name))


def _head_file(folder: Path, head: str) -> Path | None:
    """File of a head, ours or the published one. Errors: CheckpointError when there are several."""
    found = sorted([*folder.glob(f"{head}.safetensors"), *folder.glob(f"{head}--*.pt")])
    if len(found) > 1:
        raise CheckpointError(
            f"{folder} holds several {head} files ({listed([f.name for f in found])}); keep one"
        )
    return own_file(found[0], folder) if found else None


def _head_tensors(folder: Path, head: str) -> Iterator[Stored]:
    """Tensors of a head, by the names they have in it."""
    file = _head_file(folder, head)
    if file is None:
        return
    read = stored_tensors if file.suffix == ".safetensors" else pickled_tensors
    for tensor in read(file):
        yield tensor._replace(name=plain_name(tensor.name).removeprefix(f"{head}."))


def read_tokenizer(folder: Path) -> PreTrainedTokenizerFast | None:
    """The tokenizer of a policy folder (`tokenizer.json`), None when it has none."""
    tokenizer: PreTrainedTokenizerFast | None = read_fast_tokenizer(folder, padding_side="left")
    return tokenizer


# ---------------------------------------------------------------------- saving
def save_pretrained(
    model: OpenVLA,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write a model in the published layout, heads as safetensors.

    `dtype` casts the tensors (None: as they are), `max_shard_bytes` splits them over files. The
    published tensors that nothing reads are not written, nor is a tied matrix twice.
    """
    dtype = dtype or model.dtype
    state = {
        name: tensor.detach().to("cpu", dtype).contiguous()
        for name, tensor in model.state_dict().items()
        if not (model.config.tied and name == _LM_HEAD)
    }
    write(folder, state, replace(model.config, base=None), dtype, model.tokenizer, max_shard_bytes)


def write(
    folder: str | Path,
    state: dict[str, Tensor],
    config: OpenVLAConfig,
    dtype: torch.dtype,
    tokenizer: Any,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write tensors, in their final dtype, and configuration as a policy folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for head in HEADS:
        prefix = f"{head}."
        own = {n.removeprefix(prefix): state.pop(n) for n in list(state) if n.startswith(prefix)}
        if own:
            save_file(own, folder / f"{head}.safetensors", metadata={"format": "pt"})
    _save_shards(state, folder, max_shard_bytes)
    write_json(folder / "config.json", _published_config(config, dtype))
    write_json(folder / "preprocessor_config.json", _preprocessor_config(config))
    write_json(folder / "dataset_statistics.json", config.norm_stats)
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))


def _save_shards(state: dict[str, Tensor], folder: Path, max_bytes: int) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in state.items():
        if shards[-1] and size + tensor.nbytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    for old in folder.glob("model*.safetensors*"):
        old.unlink()
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / "model.safetensors.index.json", index)


def _published_config(config: OpenVLAConfig, dtype: torch.dtype) -> dict[str, Any]:
    """config.json: the published fields, and ours under one entry."""
    published = {
        "architectures": ["OpenVLAForActionPrediction"],
        "model_type": "openvla",
        "use_fused_vision_backbone": True,
        "image_resize_strategy": "resize-naive",
        "image_sizes": [tower.image_size for tower in config.towers],
        "text_config": config.text,
        "n_action_bins": config.n_action_bins,
        "pad_to_multiple_of": config.pad_to_multiple_of,
        "pad_token_id": config.pad_token_id,
        "norm_stats": config.norm_stats,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    shared = {"towers", "text", "norm_stats", *published}
    own = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in shared}
    own["kind"] = "openvla-oft" if isinstance(config, OpenVLAOFTConfig) else "openvla"
    own["towers"] = [tower_to_dict(tower) for tower in config.towers]
    return published | {OWN: own}


def _preprocessor_config(config: OpenVLAConfig) -> dict[str, Any]:
    return {
        "image_processor_type": "PrismaticImageProcessor",
        "image_resize_strategy": "resize-naive",
        "input_sizes": [[3, tower.image_size, tower.image_size] for tower in config.towers],
        "interpolations": ["bicubic" for _ in config.towers],
        "means": [list(tower.mean) for tower in config.towers],
        "stds": [list(tower.std) for tower in config.towers],
        "use_fused_vision_backbone": True,
    }
