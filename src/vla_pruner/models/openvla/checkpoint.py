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
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from ..port import CheckpointError, fill, listed, local_folder, read_json, shards, write_json
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
    folder = local_folder(path_or_hub_id, revision)
    config, stored_dtype = read_config(folder, overrides)
    kind = OpenVLAOFT if isinstance(config, OpenVLAOFTConfig) else OpenVLA
    model = kind.build(
        config,
        device=device,
        dtype=dtype or stored_dtype,
        attn_implementation=attn_implementation,
        random=False,
    )
    load_tensors(model, folder)
    model.tokenizer = read_tokenizer(folder)
    return model


def read_config(
    folder: Path, overrides: Mapping[str, Any] | None = None
) -> tuple[OpenVLAConfig, torch.dtype]:
    """Configuration of a policy folder and the dtype of its tensors. Errors: CheckpointError."""
    raw = read_json(folder / "config.json")
    own = raw.get(OWN, {})
    oft = own.get("kind") == "openvla-oft" or _head_file(folder, "action_head") is not None
    kind = OpenVLAOFTConfig if oft else OpenVLAConfig
    for name, why in FOREIGN_HEADS.items():
        if list(folder.glob(f"{name}--*.pt")):
            raise CheckpointError(f"{folder} holds {name}--*.pt: {why}")

    statistics = folder / "dataset_statistics.json"
    values: dict[str, Any] = {
        "towers": _read_towers(raw, folder),
        "text": {k: v for k, v in raw.get("text_config", {}).items() if k not in _TEXT_IGNORED},
        "norm_stats": read_json(statistics) if statistics.exists() else raw.get("norm_stats", {}),
        # Fine-tuned policies, which carry statistics of their own, were trained on random crops.
        "center_crop": oft or statistics.exists(),
    }
    for name in ("n_action_bins", "pad_to_multiple_of", "pad_token_id"):
        if name in raw:
            values[name] = raw[name]
    if oft and not own:
        values |= _published_oft_sizes(folder, hidden=_hidden_size(values["text"]))
    known = {field.name for field in fields(kind)}
    values |= {k: v for k, v in own.items() if k in known and k != "towers"}
    unknown = sorted(set(overrides or {}) - known)
    if unknown:
        raise TypeError(f"unknown options {unknown}; this policy has {', '.join(sorted(known))}")
    values |= overrides or {}
    stored = str(raw.get("torch_dtype", raw.get("dtype", "bfloat16"))).removeprefix("torch.")
    return kind(**values), _DTYPES.get(stored, torch.bfloat16)


# Bookkeeping of transformers inside text_config that is not a size of the model.
_TEXT_IGNORED = ("torch_dtype", "dtype", "_attn_implementation_autoset", "transformers_version")


def _hidden_size(text: Mapping[str, Any]) -> int:
    from transformers import LlamaConfig

    return int(LlamaConfig(**text).hidden_size)


def _read_towers(raw: Mapping[str, Any], folder: Path) -> tuple[TowerConfig, TowerConfig]:
    """Tower sizes: our own entry, else the published models by name; colours as preprocessed."""
    own = raw.get(OWN, {}).get("towers")
    if own is not None:
        towers = [TowerConfig(**tower) for tower in own]
    else:
        names = raw.get("timm_model_ids", [])
        unknown = [name for name in names if name not in PUBLISHED_TOWERS]
        if unknown or len(names) != 2:
            raise CheckpointError(
                f"{folder} uses the vision towers {names}; supported are the two of OpenVLA, "
                f"{', '.join(PUBLISHED_TOWERS)}"
            )
        sizes = raw.get("image_sizes", [224, 224])
        towers = [
            replace(PUBLISHED_TOWERS[name], image_size=size)
            for name, size in zip(names, sizes, strict=True)
        ]
    preprocessor = folder / "preprocessor_config.json"
    if preprocessor.exists():
        colours = read_json(preprocessor)
        strategy = colours.get("image_resize_strategy", "resize-naive")
        if strategy != "resize-naive":
            raise CheckpointError(
                f"{preprocessor} asks for image_resize_strategy={strategy!r}; only 'resize-naive', "
                "which OpenVLA uses, is supported"
            )
        if "means" in colours and "stds" in colours:
            towers = [
                replace(tower, mean=tuple(mean), std=tuple(std))
                for tower, mean, std in zip(towers, colours["means"], colours["stds"], strict=True)
            ]
    return towers[0], towers[1]


def _published_oft_sizes(folder: Path, hidden: int) -> dict[str, Any]:
    """What the shapes of the heads tell about a published OpenVLA-OFT policy."""
    head = dict(_head_tensors(folder, "action_head"))
    blocks = {name.split(".")[2] for name in head if name.startswith("model.mlp_resnet_blocks.")}
    outputs, width = head["model.fc2.weight"].shape
    sizes: dict[str, Any] = {
        "action_dim": outputs,
        "head_width": None if width == hidden else width,
        "head_blocks": len(blocks),
        "proprio_dim": None,
    }
    if _head_file(folder, "proprio_projector") is not None:
        proprio = dict(_head_tensors(folder, "proprio_projector"))
        sizes["proprio_dim"] = proprio["fc1.weight"].shape[1]
    return sizes


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
        (name, tensor)
        for name, tensor in _all_tensors(folder, model)
        if not unused_tensor(name, depths) and not name.endswith("rotary_emb.inv_freq")
    )
    fill(target, tensors, f"{folder} does not fit a {type(model).__name__} of its config.json")


def _all_tensors(folder: Path, model: OpenVLA) -> Iterator[tuple[str, Tensor]]:
    lora: dict[str, Tensor] = {}
    for name, tensor in _read(shards(folder)):
        if model.config.base is not None and name.startswith(_LANGUAGE_MODEL):
            lora[name.removeprefix(_LANGUAGE_MODEL)] = tensor
            continue
        yield name, tensor
        if name == _EMBEDDINGS and model.config.tied:
            yield _LM_HEAD, tensor
    if model.config.base is not None:
        layers = int(model.config.text["num_hidden_layers"])
        for name, tensor in _read([merged_file(model.config.base, layers, lora)]):
            yield _LANGUAGE_MODEL + name, tensor
            if _LANGUAGE_MODEL + name == _EMBEDDINGS and model.config.tied:
                yield _LM_HEAD, tensor
    if isinstance(model, OpenVLAOFT):
        for head in HEADS:
            for name, tensor in _head_tensors(folder, head):
                yield f"{head}.{name}", tensor


def _read(files: Iterable[Path]) -> Iterator[tuple[str, Tensor]]:
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                yield name, tensors.get_tensor(name)


def _head_file(folder: Path, head: str) -> Path | None:
    """File of a head, ours or the published one. Errors: CheckpointError when there are several."""
    found = sorted([*folder.glob(f"{head}.safetensors"), *folder.glob(f"{head}--*.pt")])
    if len(found) > 1:
        raise CheckpointError(
            f"{folder} holds several {head} files ({listed([f.name for f in found])}); keep one"
        )
    return found[0] if found else None


def _head_tensors(folder: Path, head: str) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a head without the `module.` that distributed training puts before names."""
    file = _head_file(folder, head)
    if file is None:
        return
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as tensors:
            state = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    else:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:
            raise CheckpointError(
                f"{file} is not a plain file of tensors and was not loaded: {error}"
            ) from error
    for name, tensor in state.items():
        yield name.removeprefix("module."), tensor


def read_tokenizer(folder: Path) -> PreTrainedTokenizerFast | None:
    """The tokenizer of a policy folder (`tokenizer.json`), None when it has none."""
    file = folder / "tokenizer.json"
    if not file.exists():
        return None
    return PreTrainedTokenizerFast(tokenizer_file=str(file), padding_side="left")


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
