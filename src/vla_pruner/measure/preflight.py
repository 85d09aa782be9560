"""What to know before a number is trusted: conventions of a policy that fail without an error.

`doctor` prints these behind its own checks, and what each mistake costs (`costs.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from vla_pruner.core.layout import Adapter
from vla_pruner.measure.doctor import Act, Finding, look
from vla_pruner.models.given.folder import is_finite
from vla_pruner.models.openvla.processing import opens_at_one


def preflight(
    model: nn.Module,
    adapter: Adapter,
    act: Act,
    said: Mapping[str, Any],
    folder: Path | None = None,
) -> list[Finding]:
    """Conventions of a policy, as far as its files and two of its calls tell.

    Args:
        model: a policy or vision-language model that can act.
        adapter: bound to it.
        act: lets it act on a frame.
        said: what its folder says under `control`.
        folder: where it was loaded from, if from a folder.
    """
    findings = [_finite(model), _direction(adapter, act)]
    config = getattr(model, "config", None)
    if (cameras := getattr(config, "num_images", None)) is not None:
        findings.append(_cameras(int(cameras), said))
    statistics = getattr(config, "norm_stats", None)
    if isinstance(statistics, Mapping) and statistics:
        findings += _statistics(statistics, said)
        if len(statistics) == 1:
            findings += _state(next(iter(statistics.values())))
    if (crop := getattr(config, "center_crop", None)) is not None:
        what = "cropped to 90 % of their area" if crop else "used whole"
        findings.append(
            Finding("images", True, f"{what}, as the checkpoint says; training has to have done so")
        )
    if (made_for := _made_for(folder)) is not None:
        findings.append(made_for)
    return findings


def _finite(model: nn.Module) -> Finding:
    """Broken weights give actions that are not numbers, or silence in one layer."""
    broken = [
        name
        for name, value in [*model.named_parameters(), *model.named_buffers()]
        if not value.is_meta and not is_finite(value)
    ]
    if not broken:
        return Finding("weights are finite", True, "all of them")
    return Finding(
        "weights are finite",
        False,
        f"NaN or infinity in {broken[0]}" + (f" and {len(broken) - 1} more" if broken[1:] else ""),
        "the file is damaged, or was converted with an overflow; load it again",
    )


def _direction(adapter: Adapter, act: Act) -> Finding:
    """Whether an image token sees what is behind it, as policies that write in one pass need."""
    check = "attends in the direction it was trained in"
    frame = np.full((224, 224, 3), 128, np.uint8)
    plain = look(adapter, act, frame)
    if plain is None:
        return Finding(check, None, "no visual tokens in a call")
    visual = plain.layout.visual[0]
    last = int(visual.max())
    if plain.inputs.shape[1] <= last + 1:
        return Finding(check, None, "nothing stands behind the image tokens")

    def change(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        embeds = kwargs.get("inputs_embeds", args[0] if args else None)
        if embeds is None or embeds.shape != plain.inputs.shape:
            return None
        embeds = embeds.clone()
        embeds[:, last + 1] = -embeds[:, last + 1]
        return ((embeds, *args[1:]), kwargs) if args else (args, kwargs | {"inputs_embeds": embeds})

    hook = adapter.decoder.register_forward_pre_hook(change, with_kwargs=True)
    try:
        changed = look(adapter, act, frame)
    finally:
        hook.remove()
    assert changed is not None
    both = not torch.equal(plain.outputs[0, visual], changed.outputs[0, visual])
    parallel = plain.layout.action_rows is not None or plain.read is not None
    found = f"image tokens {'see' if both else 'do not see'} what stands behind them"
    if both or not parallel:
        return Finding(check, True, found)
    return Finding(
        check,
        False,
        found + ", in a policy that writes its actions in one pass",
        "load it with the transformers of its authors, or as vp.models.load does",
    )


def _cameras(count: int, said: Mapping[str, Any]) -> Finding:
    named = said.get("cameras")
    if named is not None and len(named) != count:
        return Finding(
            "cameras",
            False,
            f"reads {count}, but its config.json names {', '.join(named)}",
            "name as many cameras, in the order of training, under `control`",
        )
    order = ", ".join(named) if named else "in the order of training; its files do not say which"
    return Finding("cameras", True, f"{count}: {order}")


def _statistics(statistics: Mapping[str, Any], said: Mapping[str, Any]) -> list[Finding]:
    """Which datasets, and how the gripper and the orientation are written in them."""
    names, key = sorted(statistics), said.get("unnorm_key")
    findings = [
        Finding(
            "statistics",
            True,
            names[0] if len(names) == 1 else f"{len(names)} datasets: name one with --unnorm-key",
        )
    ]
    if len(names) > 1 and key not in names:
        return findings
    action = statistics[key or names[0]].get("action", {})
    unit = opens_at_one(action)
    if unit is None:
        return findings
    written = "rlds" if unit else "robosuite"
    found = f"{'0 close, 1 open' if unit else '+1 close, -1 open'} by its range"
    if "gripper" not in said:  # commands that act go by the same range
        return [*findings, Finding("gripper", True, found)]
    agrees = written == said["gripper"]
    advice = f"write {written!r} under `control` in its config.json"
    found += f", driven as {said['gripper']}"
    findings.append(Finding("gripper", agrees, found, "" if agrees else advice))
    return findings


def _state(statistics: Mapping[str, Any]) -> list[Finding]:
    """Which signs of a rotation were trained on, where the state holds one as axis and angle.

    A rotation has two quaternions and so two such vectors; half a turn about an axis is near both.
    """
    said = statistics.get("proprio", {})
    low, high = (said.get(end) or said.get(other) for end, other in _ENDS)
    if low is None or high is None or len(low) != 8:
        return []
    turned = [(float(a), float(b)) for a, b in zip(low[3:6], high[3:6], strict=True)]
    a, b = max(turned, key=lambda ends: max(map(abs, ends)))
    found = f"orientation as axis and angle, the widest from {a:.1f} to {b:.1f}: "
    if a < -1 and b > 1:
        return [Finding("state", True, found + "both signs of its quaternion were seen")]
    return [Finding("state", True, found + "one sign was seen; give it orientations of that sign")]


_ENDS = (("q01", "min"), ("q99", "max"))


def _made_for(folder: Path | None) -> Finding | None:
    """The version of transformers that a checkpoint of other code was written with."""
    import transformers

    file = None if folder is None else folder / "config.json"
    if file is None or not file.is_file():
        return None
    config = json.loads(file.read_text("utf-8"))
    version = config.get("transformers_version")
    if version is None:
        return None
    found = f"written with {version}, {transformers.__version__} is installed"
    ours = config.get("model_type") == "openvla" or "vla_pruner" in config
    if ours or str(version).split(".")[0] == transformers.__version__.split(".")[0]:
        return Finding("transformers", True, found + (" (read by the port)" if ours else ""))
    return Finding(
        "transformers",
        None,
        found,
        "another major version may mask, scale or position otherwise; compare an action with one "
        "of the original environment",
    )
