"""What the ports of policies share: models of any size, strict loading by name, checked images."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn


class CheckpointError(ValueError):
    """A policy folder that cannot be loaded, and why."""


class Port(nn.Module):
    """A policy whose sizes are a configuration; `reset_parameters` makes its weights random."""

    def reset_parameters(self) -> None:
        """Random weights, in place."""
        raise NotImplementedError

    @classmethod
    def build(
        cls,
        config: Any,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        attn_implementation: str = "sdpa",
        random: bool = True,
    ) -> Self:
        """A model of any size, allocated once, in its final dtype and place.

        With `random=False` the memory is left as it is, for weights that are loaded next.
        """
        made: Any = cls
        with torch.device("meta"), default_dtype(dtype):
            model: Self = made(config, attn_implementation=attn_implementation)
        model.eval()
        if torch.device(device).type == "meta":
            return model
        model.to_empty(device=device)
        if random:
            model.reset_parameters()
        return model


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Floating-point parameters made inside have this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


# -- checkpoints ---------------------------------------------------------------------------------


def local_folder(path_or_hub_id: str | Path, revision: str | None = None) -> Path:
    """The folder itself, or a snapshot of the hub repository. Errors: CheckpointError."""
    folder = Path(path_or_hub_id)
    if folder.is_dir():
        return folder
    name = str(path_or_hub_id)
    if isinstance(path_or_hub_id, Path) or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise CheckpointError(f"{name!r} is neither a folder nor a hub id of the form 'owner/name'")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=["*.json", "*.safetensors", "*.pt"]
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"there is no folder {name!r}, and fetching it from the Hugging Face hub failed "
            f"({type(error).__name__}: {str(error).splitlines()[0]}). Without a network, copy the "
            "checkpoint here and give the folder."
        ) from error


def shards(folder: Path) -> list[Path]:
    """The files that hold the tensors. Errors: CheckpointError when one is absent."""
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if index.exists():
        names = sorted(set(read_json(index)["weight_map"].values()))
        absent = [name for name in names if not (folder / name).exists()]
        if absent:
            raise CheckpointError(f"{folder} lacks {listed(absent)}, named in {index.name}")
        return [folder / name for name in names]
    if single.exists():
        return [single]
    raise CheckpointError(f"{folder} holds no model.safetensors and no {index.name}")


def fill(target: Mapping[str, Tensor], tensors: Iterable[tuple[str, Tensor]], misfit: str) -> None:
    """Copy tensors into parameters of the same names; on the meta device names are compared alone.

    Args:
        target: every parameter and buffer, by the names of the checkpoint.
        tensors: names and values, one after the other.
        misfit: beginning of the sentence that says what is wrong.

    Raises:
        CheckpointError: tensors that are missing, unexpected or of another shape.
    """
    missing, unexpected, wrong = set(target), [], []
    for name, tensor in tensors:
        if name not in target:
            unexpected.append(name)
            continue
        missing.discard(name)
        if target[name].shape != tensor.shape:
            wrong.append(f"{name} {list(tensor.shape)} instead of {list(target[name].shape)}")
            continue
        if not target[name].is_meta:
            with torch.no_grad():
                target[name].copy_(tensor)
    problems = [
        f"{what} ({len(names)}): {listed(names)}"
        for what, names in (
            ("missing tensors", sorted(missing)),
            ("unexpected tensors", unexpected),
            ("tensors of another shape", wrong),
        )
        if names
    ]
    if problems:
        raise CheckpointError(f"{misfit}. " + "; ".join(problems))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a policy folder. Errors: CheckpointError."""
    if not path.exists():
        raise CheckpointError(f"{path.parent} is no policy folder: it has no {path.name}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return found


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write an indented JSON file."""
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def listed(names: list[str], most: int = 12) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


# -- observations --------------------------------------------------------------------------------


def check_image(image: Any, camera: int | str) -> np.ndarray:
    """A camera's image as uint8 [H, W, 3]. Errors: TypeError (type, dtype), ValueError (shape)."""
    if isinstance(image, Image.Image):
        return np.asarray(image.convert("RGB"))
    if not isinstance(image, np.ndarray):
        raise TypeError(
            f"image of camera {camera} must be a numpy array or a PIL image, got "
            f"{type(image).__name__}"
        )
    if image.dtype != np.uint8:
        raise TypeError(
            f"image of camera {camera} has dtype {image.dtype}; expected uint8 values 0..255 "
            "(multiply by 255 and round if yours are in [0, 1])"
        )
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(
            f"image of camera {camera} has shape {image.shape}; expected [height, width, 3]"
        )
    return image


def check_instruction(instruction: Any) -> str:
    """A non-empty sentence. Errors: TypeError or ValueError."""
    if not isinstance(instruction, str):
        raise TypeError(
            f"instruction must be a string such as 'pick up the can', got "
            f"{type(instruction).__name__}"
        )
    if not instruction.strip():
        raise ValueError("instruction is empty; say what the robot should do")
    return instruction


def check_keys(observation: Any, known: Sequence[str]) -> None:
    """Refuse what is no dict of known entries with images and an instruction.

    Errors: TypeError, ValueError.
    """
    if not isinstance(observation, Mapping):
        raise TypeError(
            f"an observation is a dict with {', '.join(known)}; got {type(observation).__name__}"
        )
    unknown = sorted(set(observation) - set(known))
    missing = [key for key in ("images", "instruction") if key not in observation]
    if unknown or missing:
        raise ValueError(
            f"observation has unknown entries {unknown} and lacks {missing}; expected "
            f"{', '.join(known)} (only the first two are always needed)"
        )
