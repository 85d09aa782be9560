"""pi0 and pi0.5 folders as lerobot and openpi publish them: strict loading by name, and saving.

lerobot: `config.json` with `type` "pi0" or "pi05", `model.safetensors`, and statistics in the state
file of the normalizer that `policy_preprocessor.json` names. openpi's PyTorch conversion:
`config.json` with `action_horizon` and the names of the two stacks, `model.safetensors`, and
`assets/<robot>/norm_stats.json`. Neither brings a tokenizer; one in the folder is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ..given.checks import shown, whole
from ..given.folder import (
    CheckpointError,
    Stored,
    check_control,
    entry,
    fill,
    local_folder,
    member,
    plain_name,
    read_fast_tokenizer,
    read_json,
    reading,
    shards,
    stored_tensors,
    write_json,
)
from ..port import check_attention
from .config import VARIANTS, Pi0Config, StackConfig, VisionConfig
from .modeling import Pi0
from .processing import scale

OWN = "vla_pruner"
"""Entry of config.json that holds what the published layouts have no place for."""
_ROOT = "paligemma_with_expert."
_PLACES = {
    "vision_tower.": f"{_ROOT}paligemma.model.vision_tower.vision_model.",
    "projector.": f"{_ROOT}paligemma.model.multi_modal_projector.linear.",
    "language_model.": f"{_ROOT}paligemma.model.language_model.",
    "expert.": f"{_ROOT}gemma_expert.model.",
}
_TIED = f"{_ROOT}paligemma.lm_head.weight"
_TABLE = f"{_ROOT}paligemma.model.language_model.embed_tokens.weight"
_UNUSED = f"{_ROOT}gemma_expert.lm_head.weight"
_SCALINGS = {
    "QUANTILES": "quantiles",
    "MEAN_STD": "mean-std",
    "MIN_MAX": "min-max",
    "IDENTITY": "identity",
}
_STATISTICS = ("mean", "std", "min", "max", "q01", "q99")
_STATE_FILE = "policy_preprocessor_step_0_normalizer_processor.safetensors"


def published_name(name: str) -> str:
    """Published name of one of our tensors, without the `model.` that lerobot puts before it."""
    for ours, theirs in _PLACES.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def is_pi0_config(raw: Mapping[str, Any]) -> bool:
    """Whether the content of a config.json is that of a pi0 or pi0.5 policy."""
    return raw.get("type") in ("pi0", "pi05") or {"action_horizon", "paligemma_variant"} <= set(raw)


# ---------------------------------------------------------------------- loading
def from_pretrained(
    path_or_hub_id: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    attn_implementation: str = "sdpa",
    revision: str | None = None,
    tokenizer: Any = None,
    **overrides: Any,
) -> Pi0:
    """Load pi0 or pi0.5.

    Args:
        path_or_hub_id: folder, or an id such as "lerobot/pi0_base".
        device, dtype: where to put the weights, and in which dtype all of them; `dtype=None` takes
            that of the checkpoint's action head.
        attn_implementation: "sdpa" or "eager".
        revision: branch, tag or commit on the hub.
        tokenizer: a tokenizer, or the folder or hub id of one; None: the one in the folder.
        overrides: fields of `Pi0Config`, such as `action_dim=7`, `norm_stats={...}`.

    Errors: CheckpointError for a folder that is missing, incomplete or does not fit, with the names
    of the tensors; TypeError for an unknown override.
    """
    check_attention(attn_implementation)
    folder = local_folder(path_or_hub_id, revision)
    config = read_config(folder, overrides)
    options: dict[str, Any] = {
        "dtype": dtype or _stored_dtype(folder),
        "attn_implementation": attn_implementation,
        "random": False,
    }
    with reading(folder / "config.json", "no model can be built: "):
        outline = Pi0.build(config, device="meta", **options)
    load_tensors(outline, folder)  # Names and sizes, before memory is taken.
    model = Pi0.build(config, device=device, **options)
    load_tensors(model, folder)
    model.tokenizer = read_tokenizer(folder) if tokenizer is None else tokenizer
    if isinstance(tokenizer, str | Path):
        with reading(Path(tokenizer), "no tokenizer can be read: "):
            model.tokenizer = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
    return model


def _stored_dtype(folder: Path) -> torch.dtype:
    """Dtype of the action head, fp32 if there is none."""
    for tensor in _all_tensors(folder):
        if tensor.name == "action_out_proj.weight" and tensor.tensor.is_floating_point():
            return tensor.tensor.dtype
    return torch.float32


def read_config(folder: Path, overrides: Mapping[str, Any] | None = None) -> Pi0Config:
    """Configuration of a policy folder. Errors: CheckpointError, TypeError (unknown override)."""
    file = folder / "config.json"
    raw = read_json(file)
    with reading(file):
        if not is_pi0_config(raw):
            raise CheckpointError(
                f"{folder} is no pi0 policy: its config.json has neither `type` pi0 or pi05 "
                "(lerobot) nor `action_horizon` and `paligemma_variant` (openpi)"
            )
        values = _lerobot(raw, folder) if "type" in raw else _openpi(raw, folder)
        for ours, theirs in (("prefix", "paligemma_variant"), ("expert", "action_expert_variant")):
            if theirs in raw:
                values[ours] = _variant(raw[theirs], folder)
        own = dict(entry(raw, OWN, dict, file))
        if "vision" in own:
            own["vision"] = VisionConfig(**entry(own, "vision", dict, file))
        own |= {
            name: StackConfig(**entry(own, name, dict, file))
            for name in ("prefix", "expert")
            if name in own
        }
    known = {field.name for field in fields(Pi0Config)}
    unknown = sorted(set(overrides or {}) - known)
    if unknown:
        raise TypeError(f"unknown options {unknown}; this policy has {', '.join(sorted(known))}")
    with reading(file):
        config = Pi0Config(**{**values, **own, **(overrides or {})})
    check_control(raw, file, cameras=config.num_images, chunk=config.chunk)
    for what in ("action", "state"):
        if config.norm_stats.get(what):
            with reading(folder, "statistics: "):
                scale(config, what)
    return config


def _variant(name: Any, folder: Path) -> StackConfig:
    if not isinstance(name, str) or name not in VARIANTS:
        raise CheckpointError(
            f"{folder} uses the stack {shown(name)}; supported are {', '.join(VARIANTS)}"
        )
    return VARIANTS[name]


def _lerobot(raw: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Fields that lerobot's config.json and normalizer say."""
    file = folder / "config.json"
    inputs, outputs = (entry(raw, f"{side}_features", dict, file) for side in ("input", "output"))
    size, other = raw.get("image_resolution", (224, 224))
    if size != other:
        raise CheckpointError(f"{folder} reads images of {size} x {other}; they must be square")
    cameras = [
        name.removeprefix("observation.images.")
        for name in inputs
        if entry(inputs, name, dict, file).get("type") == "VISUAL"
    ]
    empty = raw.get("empty_cameras") or 0
    whole("empty_cameras", empty, 0, 64)
    cameras += [f"empty_camera_{i}" for i in range(empty)]
    values: dict[str, Any] = {
        "kind": raw["type"],
        "vision": VisionConfig(image_size=size),
        "max_tokens": raw.get("tokenizer_max_length", 48 if raw["type"] == "pi0" else 200),
        "norm_stats": _lerobot_statistics(folder),
    }
    if cameras:
        values["cameras"] = tuple(dict.fromkeys(cameras))
    names = {
        "chunk": "chunk_size",
        "flow_steps": "num_inference_steps",
        "max_action_dim": "max_action_dim",
        "max_state_dim": "max_state_dim",
        "min_period": "min_period",
        "max_period": "max_period",
    }
    values |= {ours: raw[theirs] for ours, theirs in names.items() if theirs in raw}
    for ours, feature in (
        ("action_dim", outputs.get("action")),
        ("proprio_dim", inputs.get("observation.state")),
    ):
        if feature is not None:
            values[ours] = feature["shape"][0]
    mapping = entry(raw, "normalization_mapping", dict, file)
    usual = "MEAN_STD" if raw["type"] == "pi0" else "QUANTILES"
    for ours, theirs in (("action_scaling", "ACTION"), ("state_scaling", "STATE")):
        named = mapping.get(theirs, usual)
        if not isinstance(named, str) or named not in _SCALINGS:
            raise CheckpointError(
                f"{folder} scales {theirs} by {shown(named)}; supported are {', '.join(_SCALINGS)}"
            )
        values[ours] = _SCALINGS[named]
    return values


def _lerobot_statistics(folder: Path) -> dict[str, Any]:
    """Statistics in the state file of the normalizer, {} if the folder has none."""
    file = folder / "policy_preprocessor.json"
    if not file.exists():
        return {}
    found: dict[str, Any] = {}
    for step in entry(read_json(file), "steps", list, file):
        if not isinstance(step, Mapping):
            raise CheckpointError(f"{file}: a step must be an object, got {shown(step)}")
        if step.get("registry_name") != "normalizer_processor" or "state_file" not in step:
            continue
        path = member(folder, step["state_file"], file)
        tensors = {stored.name: stored.tensor for stored in stored_tensors(path)}
        for ours, theirs in (("state", "observation.state"), ("action", "action")):
            found[ours] = {
                name: tensors[f"{theirs}.{name}"].double().tolist()
                for name in _STATISTICS
                if f"{theirs}.{name}" in tensors
            }
    return found


def _openpi(raw: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Fields that a conversion of openpi says; whether it is pi0.5 only its tensors tell."""
    names = [tensor.name for tensor in _all_tensors(folder)]
    pi05 = "time_mlp_in.weight" in names and "action_time_mlp_in.weight" not in names
    scaling = "quantiles" if pi05 else "mean-std"
    values: dict[str, Any] = {
        "kind": "pi05" if pi05 else "pi0",
        "chunk": raw["action_horizon"],
        "max_tokens": 200 if pi05 else 48,
        "pad_state": False,
        "action_scaling": scaling,
        "state_scaling": scaling,
        "epsilon": 1e-6,
    }
    for name in ("action_dim", "max_action_dim", "proprio_dim", "max_state_dim"):
        values[name] = raw.get("action_dim", 32)
    files = sorted(folder.glob("assets/**/norm_stats.json"))
    if len(files) > 1:
        raise CheckpointError(
            f"{folder} holds statistics of several robots "
            f"({', '.join(str(f.parent.relative_to(folder)) for f in files)}); keep one"
        )
    if files:
        found = entry(read_json(files[0], folder), "norm_stats", dict, files[0])
        for ours, theirs, size in (
            ("state", "state", "proprio_dim"),
            ("action", "actions", "action_dim"),
        ):
            if theirs not in found:
                raise CheckpointError(f"{files[0]} has no statistics of the {theirs}")
            measured = entry(found, theirs, dict, files[0])
            values.setdefault("norm_stats", {})[ours] = measured
            values[size] = len(entry(measured, "mean", list, files[0]))
    return values


def load_tensors(model: Pi0, folder: Path) -> None:
    """Fill a model from a policy folder, tensor by tensor.

    The token table may be stored under the name of the head that shares it alone; the expert's own
    head, which nothing reads, is dropped.

    Errors: CheckpointError with the tensors that are missing, unexpected or of another shape.
    """
    target = {published_name(n): p for n, p in model.state_dict(keep_vars=True).items()}
    seen: set[str] = set()

    def wanted() -> Iterator[Stored]:
        tied = []
        for tensor in _all_tensors(folder):
            if tensor.name == _TIED:
                tied.append(tensor._replace(name=_TABLE))
            elif tensor.name != _UNUSED:
                seen.add(tensor.name)
                yield tensor
        yield from tied if _TABLE not in seen else ()

    fill(target, wanted(), f"{folder} does not fit a {model.config.kind} of its config.json")


def _all_tensors(folder: Path) -> Iterator[Stored]:
    """Tensors by the names that openpi gives them."""
    for file in shards(folder):
        for tensor in stored_tensors(file):
            plain = plain_name(tensor.name).removeprefix("model.")
            # Newer versions of transformers have one module less here.
            if ".vision_tower." in plain and ".vision_model." not in plain:
                plain = plain.replace(".vision_tower.", ".vision_tower.vision_model.")
            yield tensor._replace(name=plain)


def read_tokenizer(folder: Path) -> PreTrainedTokenizerFast | None:
    """The tokenizer of a policy folder (`tokenizer.json`), None when it has none."""
    tokenizer: PreTrainedTokenizerFast | None = read_fast_tokenizer(folder)
    return tokenizer


# ---------------------------------------------------------------------- saving
def save_pretrained(model: Pi0, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """Write a model in lerobot's layout; sizes that it has no place for go under `vla_pruner`.

    `dtype` casts the tensors; None: as they are.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    dtype = dtype or model.dtype
    tensors = {
        f"model.{published_name(name)}": tensor.detach().to("cpu", dtype).contiguous()
        for name, tensor in model.state_dict().items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", _lerobot_config(model.config))
    statistics = {
        f"{theirs}.{name}": torch.tensor(values, dtype=torch.float32)
        for ours, theirs in (("state", "observation.state"), ("action", "action"))
        for name, values in model.config.norm_stats.get(ours, {}).items()
        if name in _STATISTICS
    }
    steps = [{"registry_name": "normalizer_processor", "config": {}, "state_file": _STATE_FILE}]
    save_file(statistics, folder / _STATE_FILE)
    write_json(folder / "policy_preprocessor.json", {"name": "policy_preprocessor", "steps": steps})
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(str(folder))


def _lerobot_config(config: Pi0Config) -> dict[str, Any]:
    size = config.image_size
    named = {scaling: name for name, scaling in _SCALINGS.items()}
    inputs: dict[str, Any] = {
        f"observation.images.{camera}": {"type": "VISUAL", "shape": [3, size, size]}
        for camera in config.cameras
    }
    inputs["observation.state"] = {"type": "STATE", "shape": [config.proprio_dim]}
    own = asdict(replace(config, norm_stats={}))
    kept = ["vision", "prefix", "expert", "vocab_size", "activation", "max_tokens", "pad_state"]
    kept += ["epsilon", "crop_area", "resample", "noise_seed"]
    return {
        "type": config.kind,
        "input_features": inputs,
        "output_features": {"action": {"type": "ACTION", "shape": [config.action_dim]}},
        "chunk_size": config.chunk,
        "max_state_dim": config.max_state_dim,
        "max_action_dim": config.max_action_dim,
        "num_inference_steps": config.flow_steps,
        "min_period": config.min_period,
        "max_period": config.max_period,
        "image_resolution": [size, size],
        "normalization_mapping": {
            "VISUAL": "IDENTITY",
            "STATE": named[config.state_scaling],
            "ACTION": named[config.action_scaling],
        },
        OWN: {name: own[name] for name in kept},
    }
