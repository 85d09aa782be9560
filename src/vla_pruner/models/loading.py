"""Load a model by name: a policy that ships with this package, a folder, or a hub id."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

WEIGHTS = Path(__file__).parents[1] / "reference" / "weights"


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
    dtype: torch.dtype | None = None,
    **options: Any,
) -> nn.Module:
    """A model ready to act, in evaluation mode.

    Args:
        name_or_path: a policy that ships here (`shipped()`), a folder, or a hub id. OpenVLA and
            OpenVLA-OFT become the ports of this package; any other vision-language model is loaded
            by transformers.
        device, dtype: where to put the weights; `dtype=None` keeps the checkpoint's.
        options: for `vla_pruner.models.openvla.from_pretrained`, or for transformers.

    Raises:
        ValueError: there is no such model, or its files do not fit.
    """
    where = locate(name_or_path)
    if _model_type(where) == "openvla":
        from vla_pruner.models.openvla import from_pretrained

        return from_pretrained(where, device=device, dtype=dtype, **options)
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(where, dtype=dtype or "auto", **options)
    return model.to(device).eval()


def _model_type(where: str) -> str | None:
    """`model_type` in the config.json of a folder or hub id. Raises ValueError: there is none."""
    if Path(where).is_dir():
        file = Path(where) / "config.json"
        if not file.is_file():
            raise ValueError(f"{where} is no model folder: it has no config.json")
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
    try:
        return json.loads(file.read_text(encoding="utf-8")).get("model_type")
    except (json.JSONDecodeError, AttributeError):
        raise ValueError(f"{file} is not a JSON object") from None
