"""Load a model by name: a policy that ships with this package, a folder, or a hub id."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import torch

from vla_pruner._short import short

from .given.checks import listed
from .given.folder import CheckpointError, is_finite, read_json, reading
from .port import Policy

WEIGHTS = Path(__file__).parents[1] / "reference" / "weights"


DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}

IN_THE_REPOSITORY = ("mini-oft", "mini-oft-libero", "mini-openvla", "mini-pi0", "smol-oft")
"""Policies of a checkout; the wheel brings the first."""


def shipped() -> dict[str, Path]:
    """Name and folder of each policy that ships with this package."""
    return {config.parent.name: config.parent for config in sorted(WEIGHTS.glob("*/config.json"))}


def locate(name_or_path: str | Path) -> str:
    """The folder of a shipped policy; any other name as it is."""
    return str(shipped().get(str(name_or_path), name_or_path))


def load(
    name_or_path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    **options: Any,
) -> Policy:
    """A model ready to act, in evaluation mode.

    Args:
        name_or_path: a policy that ships here (`shipped()`), a folder, or a hub id. OpenVLA,
            OpenVLA-OFT, pi0 and pi0.5 become the ports of this package; any other vision-language
            model is loaded by transformers.
        device, dtype: where to put the weights, and as what, a name of `DTYPES` or torch's own.
            None keeps the checkpoint's; only a shipped policy of bf16 becomes float32 on a CPU
            that `lacks_bf16`.
        options: for `from_pretrained` of the port (`vla_pruner.models.openvla`, `.pi0`), or for
            transformers.

    Warns:
        UserWarning: any other model stays in bf16 on such a CPU.

    Raises:
        ValueError: there is no such model or dtype, or its files do not fit.
    """
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ValueError(f"dtype {short(dtype)} is unknown; use one of {', '.join(DTYPES)}")
        dtype = DTYPES[dtype]
    where = locate(name_or_path)
    slow = dtype is None and torch.device(device).type == "cpu" and lacks_bf16()
    if slow and Path(where) in shipped().values():
        dtype = torch.float32
    model = _load(where, device, dtype, options)
    if slow and getattr(model, "dtype", None) == torch.bfloat16:
        warnings.warn(
            f"{where} is stored in bf16, which this CPU multiplies several times slower than "
            "float32; give dtype float32 where there is memory for twice as much",
            stacklevel=2,
        )
    return model


def lacks_bf16() -> bool:
    """Whether this CPU has no arithmetic for bf16.

    Without AVX-512 or better, torch multiplies bf16 matrices in a plain loop: on two cores of a
    Zen 3 at a seventh of the speed of float32.
    """
    tells = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return tells is None or not tells()  # Builds without oneDNN do not tell, and multiply slowly.


def _load(
    where: str, device: str | torch.device, dtype: torch.dtype | None, options: dict[str, Any]
) -> Policy:
    config = read_config(where)
    if config.get("model_type") == "openvla":
        from vla_pruner.models import openvla

        return openvla.from_pretrained(where, device=device, dtype=dtype, **options)
    if config.get("type") in ("pi0", "pi05") or "action_horizon" in config:
        from vla_pruner.models import pi0

        return pi0.from_pretrained(where, device=device, dtype=dtype, **options)
    from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

    if options.pop("trust_remote_code", False):
        raise ValueError(
            "trust_remote_code: Python code that comes with a model is not run here; load it "
            "yourself and give the model to `vp.prune`"
        )
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise CheckpointError(f"{where}: its config.json names no model_type")
    if kind not in CONFIG_MAPPING and "auto_map" in config:
        raise CheckpointError(
            f"{where} is a {kind!r}, which transformers knows only by Python code that comes with "
            "the model; such code is not run here. Load it yourself, and prune the model"
        )
    with reading(Path(where), "transformers cannot load it: "):
        model, found = AutoModelForImageTextToText.from_pretrained(
            where,
            dtype=dtype or "auto",
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    if absent := sorted(found["missing_keys"]):  # transformers would go on with random numbers
        raise CheckpointError(f"{where} lacks {len(absent)} tensors: {listed(absent)}")
    broken = [name for name, tensor in model.named_parameters() if not is_finite(tensor)]
    if broken:
        raise CheckpointError(f"{where}: NaN or infinite numbers in {listed(broken)}")
    ready: Policy = model.to(device).eval()
    return ready


def read_config(where: str) -> dict[str, Any]:
    """The config.json of a folder or hub id. Raises ValueError: there is none."""
    if not where.strip():
        raise ValueError("the name of the model is empty; name a policy, a folder or a hub id")
    if Path(where).is_dir():
        file = Path(where) / "config.json"
        if not file.is_file():
            raise ValueError(f"{where} is no model folder: it has no config.json")
    elif where in IN_THE_REPOSITORY:
        raise ValueError(
            f"{where} is not in the wheel, only in the repository: install from a checkout "
            f"(pip install -e .), or give the path of its folder "
            f"src/vla_pruner/reference/weights/{where}"
        )
    elif not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", where):
        raise ValueError(
            f"{where!r} is no policy that ships here ({', '.join(shipped()) or 'none does'}), "
            "no folder, and no hub id of the form owner/name"
        )
    else:
        from huggingface_hub import hf_hub_download

        try:
            file = Path(hf_hub_download(where, "config.json"))
        except OSError as error:
            raise ValueError(
                f"there is no folder {where!r} here, and the Hugging Face hub did not give its "
                f"config.json ({str(error).strip().splitlines()[0]})"
            ) from error
    return read_json(file)
