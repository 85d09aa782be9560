"""Files of a policy folder, read as strangers wrote them: names and numbers, never code.

What is missing, damaged or of another kind is a CheckpointError with the file and the reason. Files
must lie in the folder itself: names that lead elsewhere are refused, and so are links, but for
those of the hub's cache into its own `blobs`.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from .checks import listed, shown, whole

LARGEST_JSON = 64 << 20
_PACKAGE = Path(__file__).parents[2]
# Modules that compiling and distributed training put around others, and names of nested states.
_AROUND = {"module", "_orig_mod", "_forward_module", "_fsdp_wrapped_module"}
_AROUND |= {"_checkpoint_wrapped_module"}
_ADAPTER = ["base_model", "model"]
_NESTED = ("state_dict", "model_state_dict", "model", "module")
_KINDS: dict[Any, str] = {dict: "an object", list: "a list", str: "a string"}
CONTROL = ("cameras", "execute", "gripper", "suites", "unnorm_key")
GRIPPERS = ("robosuite", "rlds")


class CheckpointError(ValueError):
    """A policy folder that cannot be loaded, and why."""


class Stored(NamedTuple):
    """A tensor of a file."""

    file: Path
    name: str
    tensor: Tensor


@contextmanager
def reading(file: Path, doing: str = "") -> Iterator[None]:
    """Whatever goes wrong inside is a CheckpointError that names the file."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        said = str(error).strip().split("\n")[0][:300]
        if not isinstance(error, ValueError) or not said:
            said = f"{type(error).__name__}: {said}"
        raise CheckpointError(f"{file}: {doing}{said}") from error


# -- files ---------------------------------------------------------------------------------------


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


def own_file(path: Path, folder: Path) -> Path:
    """A file that lies in the folder. Errors: CheckpointError."""
    root, there = folder.resolve(), path.resolve()
    homes = [root]
    if root.parent.name == "snapshots":
        homes.append((root.parent.parent / "blobs").resolve())
    # Some installers link the files of a package, and so those of the policies that ship with it.
    ours = folder.absolute().is_relative_to(_PACKAGE)
    if not ours and not any(there.is_relative_to(home) for home in homes):
        raise CheckpointError(f"{path} leads out of the folder, to {there}; copy the file there")
    if not there.is_file():
        raise CheckpointError(f"{path} is no file")
    return path


def member(folder: Path, name: Any, named_in: Path) -> Path:
    """The file of a folder that another of its files names. Errors: CheckpointError."""
    if not isinstance(name, str) or not re.fullmatch(r"[^/\\\0]+", name) or name in (".", ".."):
        raise CheckpointError(f"{named_in} names {shown(name)}, which is no file of its folder")
    if not (folder / name).exists():
        raise CheckpointError(f"{folder} lacks {name}, named in {named_in.name}")
    return own_file(folder / name, folder)


def read_json(path: Path, folder: Path | None = None) -> dict[str, Any]:
    """The object in a JSON file of a policy folder. Errors: CheckpointError."""
    if not path.exists():
        raise CheckpointError(f"{path.parent} is no policy folder: it has no {path.name}")
    own_file(path, folder or path.parent)
    with reading(path):
        if (size := path.stat().st_size) > LARGEST_JSON:
            raise CheckpointError(f"{path} holds {size >> 20} MiB; no such file is so large")
        content = path.read_bytes()
    try:
        found = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 text: {error}") from error
    except (json.JSONDecodeError, RecursionError, ValueError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return found


def entry(values: Mapping[str, Any], name: str, kind: type, file: Path) -> Any:
    """An entry of a JSON object, or an empty one of its kind if there is none or it is null.

    Args:
        values: the object.
        name: the entry's.
        kind: dict, list or str.
        file: where the object was read.

    Raises:
        CheckpointError: an entry of another kind.
    """
    found = values.get(name)
    if found is None:
        return kind()
    if not isinstance(found, kind):
        raise CheckpointError(f"{file}: {name} must be {_KINDS[kind]}, got {shown(found)}")
    return found


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write an indented JSON file."""
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


# -- tensors -------------------------------------------------------------------------------------


def shards(folder: Path) -> list[Path]:
    """The files that hold the tensors. Errors: CheckpointError when one is absent."""
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if index.exists():
        weight_map = entry(read_json(index), "weight_map", dict, index)
        if not weight_map:
            raise CheckpointError(f"{index} has no weight_map")
        named = {member(folder, name, index) for name in weight_map.values()}
        return sorted(named)
    if single.exists():
        return [own_file(single, folder)]
    adapters = [*folder.glob("adapter_config.json"), *folder.glob("*/adapter_config.json")]
    hint = f"; {adapters[0].parent} is an adapter, merge it first" if adapters else ""
    raise CheckpointError(f"{folder} holds no model.safetensors and no {index.name}{hint}")


def stored_tensors(file: Path) -> Iterator[Stored]:
    """Tensors of a safetensors file. Errors: CheckpointError."""
    with reading(file, "not a whole safetensors file: "):
        opened: Any = safe_open(file, framework="pt")
    with opened as tensors:
        for name in tensors.keys():  # noqa: SIM118 - not a dict
            with reading(file, f"{name}: "):
                tensor = tensors.get_tensor(name)
            yield Stored(file, name, tensor)


def pickled_tensors(file: Path) -> Iterator[Stored]:
    """Tensors of a `.pt` file, of which nothing else is unpickled. Errors: CheckpointError."""
    try:
        mapped = zipfile.is_zipfile(file)
        state: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:
        said = str(error).strip().split("\n")[0][:300]
        raise CheckpointError(
            f"{file} is not a plain file of tensors and was not loaded: {said}"
        ) from error
    while isinstance(state, Mapping):
        inner = [name for name in _NESTED if isinstance(state.get(name), Mapping)]
        if not inner:
            break
        state = state[inner[0]]
    if not isinstance(state, Mapping) or not state:
        raise CheckpointError(f"{file} holds no tensors by name but {shown(state)}")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"{file} holds more than tensors: {shown(name)} is a {type(tensor).__name__}; "
                f"found {listed(list(state))}"
            )
        yield Stored(file, name, tensor)


def plain_name(name: str) -> str:
    """A tensor's name without the modules that compiling, training and adapters put around it."""
    parts = [part for part in name.split(".") if part not in _AROUND]
    plain: list[str] = []
    for part in parts:
        plain.append(part)
        if plain[-2:] == _ADAPTER:
            del plain[-2:]
    return ".".join(plain)


def fill(target: Mapping[str, Tensor], tensors: Iterable[Stored], misfit: str) -> None:
    """Copy tensors into parameters of the same names; on the meta device only compare them.

    Args:
        target: every parameter and buffer, by the names of the checkpoint.
        tensors: one after the other.
        misfit: beginning of the sentence that says what is wrong.

    Raises:
        CheckpointError: tensors that are missing, unexpected, of another shape or kind, or that
            hold NaN or infinite numbers.
    """
    missing, unexpected, twice, wrong, kinds = set(target), [], [], [], []
    broken: list[str] = []
    for file, name, tensor in tensors:
        if name not in target:
            unexpected.append(name)
            continue
        to = target[name]
        if name not in missing:
            twice.append(name)
            continue
        missing.discard(name)
        if to.shape != tensor.shape:
            wrong.append(f"{name} {list(tensor.shape)} instead of {list(to.shape)}")
            continue
        if to.is_floating_point() != tensor.is_floating_point() or tensor.layout != torch.strided:
            kinds.append(f"{name} {str(tensor.dtype).removeprefix('torch.')}")
            continue
        if to.is_meta:
            continue
        with torch.no_grad():
            to.copy_(tensor)
        if not is_finite(to):
            why = f" as {to.dtype}".replace("torch.", "") if is_finite(tensor) else ""
            broken.append(f"{name}{why} ({file.name})")
    problems = [
        f"{what} ({len(names)}): {listed(names)}"
        for what, names in (
            ("missing tensors", sorted(missing)),
            ("unexpected tensors", unexpected),
            ("tensors that come twice", twice),
            ("tensors of another shape", wrong),
            ("tensors that are no plain floating-point numbers", kinds),
        )
        if names
    ]
    if problems:
        raise CheckpointError(f"{misfit}. " + "; ".join(problems))
    if broken:
        raise CheckpointError(
            f"{file.parent}: NaN or infinite numbers in {len(broken)} tensors: {listed(broken)}"
        )


def is_finite(tensor: Tensor) -> bool:
    """Whether every number is finite, in one pass and without a copy."""
    if tensor.numel() == 0 or not tensor.is_floating_point():
        return True
    ends = (tensor if tensor.element_size() > 1 else tensor.float()).aminmax()
    return bool(torch.isfinite(torch.stack(ends)).all())


def read_fast_tokenizer(folder: Path, **options: Any) -> Any:
    """The tokenizer in `tokenizer.json`, None when there is none. Errors: CheckpointError."""
    from transformers import PreTrainedTokenizerFast

    file = folder / "tokenizer.json"
    if not file.exists():
        return None
    own_file(file, folder)
    with reading(file, "not a whole tokenizer: "):
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file), **options)
        if not tokenizer("pick up")["input_ids"]:
            raise ValueError("it finds no words in a sentence")
    return tokenizer


# -- how the policy is driven --------------------------------------------------------------------


def check_control(raw: Mapping[str, Any], file: Path, *, cameras: int, chunk: int) -> None:
    """The entry `control` of a config.json, if there is one; see `episodes.control`.

    Args:
        raw: content of the file.
        file: where it was read.
        cameras: how many the policy sees.
        chunk: actions of one call.

    Raises:
        CheckpointError: an unknown entry, or one out of range.
    """
    said = entry(raw, "control", dict, file)
    unknown = sorted(set(said) - set(CONTROL))
    if unknown:
        raise CheckpointError(
            f"{file}: control has unknown entries {listed(unknown)}; known are {', '.join(CONTROL)}"
        )
    with reading(file, "control: "):
        suites = said.get("suites", ["any"])
        if not isinstance(suites, list) or not suites or not all(map(_is_name, suites)):
            raise ValueError(f"suites={shown(suites)} must be a list of names")
        if not _is_name(said.get("unnorm_key", "any")):
            raise ValueError(f"unnorm_key={shown(said['unnorm_key'])} must be a name")
        if "execute" in said:
            whole("execute", said["execute"], 1, chunk)
        if said.get("gripper", GRIPPERS[0]) not in GRIPPERS:
            raise ValueError(f"gripper={shown(said['gripper'])} must be {' or '.join(GRIPPERS)}")
        if "cameras" not in said:
            return
        names = said["cameras"]
        if (
            not isinstance(names, list)
            or not all(map(_is_name, names))
            or len(names) != cameras
            or len(set(names)) < cameras
        ):
            raise ValueError(f"cameras={shown(names)} must be {cameras} different names")


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value != ""
