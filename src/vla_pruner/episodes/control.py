"""How a policy is driven in a scene: cameras, actions per call, state, gripper, statistics."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from vla_pruner._short import cut, short
from vla_pruner.models.openvla.processing import opens_at_one, resolve_key

Gripper = Literal["robosuite", "rlds"]
"""How a policy writes the gripper: +1 close and -1 open, or 0 close and 1 open."""


@dataclass(frozen=True)
class Control:
    """How a policy is driven in a scene.

    Args:
        cameras: the scene's cameras, in the order that the policy expects.
        execute: actions of a chunk that are carried out before the policy is asked again.
        reads_state: whether the policy is given the state of the robot.
        gripper: how the policy writes the last entry of an action; scenes take "robosuite".
            Checkpoints trained on RLDS data, such as all published OpenVLA ones, write "rlds".
        unnorm_key: dataset whose statistics scale the actions; None: the policy has but one.
    """

    cameras: tuple[str, ...]
    execute: int
    reads_state: bool
    gripper: Gripper = "robosuite"
    unnorm_key: str | None = None

    def __post_init__(self) -> None:
        if not self.cameras or self.execute < 1:
            raise ValueError(
                f"a policy needs at least one camera and one action per call; got "
                f"cameras={self.cameras}, execute={self.execute}"
            )
        if self.gripper not in get_args(Gripper):
            raise ValueError(
                f"gripper={short(self.gripper)} is unknown; use {' or '.join(get_args(Gripper))}"
            )

    @classmethod
    def of(
        cls,
        policy: Any,
        available: Sequence[str],
        *,
        folder: Path | None = None,
        execute: int | None = None,
        gripper: Gripper | None = None,
        unnorm_key: str | None = None,
    ) -> Control:
        """How a policy wants to be driven.

        What is said under `control` in the config.json of its folder comes first. Otherwise it sees
        the first cameras of the scene, and carries out two actions of a chunk.

        Args:
            policy: its `config` says how many images it reads, whether it gives a chunk of actions
                and whether it reads the state of the robot.
            available: cameras of the scene.
            folder: where the policy was loaded from, if from a folder.
            execute: overrides the number of actions.
            gripper: overrides how the gripper is written; None: see `gripper_of`.
            unnorm_key: dataset whose statistics scale the actions.

        Raises:
            ValueError: a camera that the scene does not have, more actions than a chunk has, or
                statistics that the policy does not have, or several of them and none chosen.
        """
        config = getattr(policy, "config", None)
        said = said_by(folder)
        chunk = getattr(config, "chunk", 1)
        cameras = tuple(said.get("cameras", available[: getattr(config, "num_images", 1)]))
        if unknown := [camera for camera in cameras if camera not in available]:
            raise ValueError(
                f"the policy asks for the cameras {', '.join(unknown)}; "
                f"the scene has {', '.join(available)}"
            )
        if execute is not None and hasattr(config, "chunk") and execute > chunk:
            raise ValueError(f"execute={execute}: a chunk of this policy has {chunk} actions")
        key = statistics_of(policy, unnorm_key, folder=folder)
        return cls(
            cameras=cameras,
            execute=int(said.get("execute", min(2, chunk))) if execute is None else execute,
            reads_state=getattr(config, "proprio_dim", None) is not None,
            gripper=gripper or gripper_of(policy, said, key, otherwise="robosuite"),
            unnorm_key=key,
        )

    @property
    def arguments(self) -> dict[str, Any]:
        """What `predict_action` is given besides the observation."""
        return {} if self.unnorm_key is None else {"unnorm_key": self.unnorm_key}

    def command(self, action: np.ndarray) -> np.ndarray:
        """An action `[dim]` of the policy as the scene takes it."""
        if self.gripper == "robosuite":
            return action
        return np.concatenate([action[:-1], 1 - 2 * action[-1:]])


def said_by(folder: Path | None) -> Mapping[str, Any]:
    """What the config.json of a policy's folder says under `control`; nothing where it does not."""
    file = None if folder is None else folder / "config.json"
    if file is None or not file.is_file():
        return {}
    found = json.loads(file.read_text("utf-8")).get("control", {})
    if not isinstance(found, Mapping):
        raise ValueError(f"{file}: `control` must map names to values")
    return found


def gripper_of(
    policy: Any, said: Mapping[str, Any], key: str | None, *, otherwise: Gripper
) -> Gripper:
    """How a policy writes the gripper: as its folder says, or else as its statistics show.

    Args:
        policy: its `config.norm_stats` holds ranges of actions by dataset.
        said: what its folder says under `control`.
        key: the dataset whose statistics scale its actions; None: it has but one.
        otherwise: where neither says anything, or the range is wider than 0 to 1.
    """
    if "gripper" in said:
        return said["gripper"]
    found = getattr(getattr(policy, "config", None), "norm_stats", None)
    if not isinstance(found, Mapping) or not found:
        return otherwise
    action = found[key or next(iter(found))].get("action", {})
    return "rlds" if opens_at_one(action) else otherwise


def statistics_of(policy: Any, key: str | None, *, folder: Path | None = None) -> str | None:
    """The dataset whose statistics scale a policy's actions; None: there is nothing to choose.

    Args:
        policy: its `config.norm_stats` holds them by dataset, and its `predict_action` takes an
            `unnorm_key`; any other policy has nothing to choose.
        key: what was asked for; None: what the folder says under `control`, or the only one.
        folder: where the policy was loaded from, if from a folder.

    Raises:
        ValueError: statistics that the policy does not have, or several and none chosen.
    """
    key = key or said_by(folder).get("unnorm_key")
    found = getattr(getattr(policy, "config", None), "norm_stats", None)
    takes = inspect.signature(getattr(policy, "predict_action", _nothing)).parameters
    if not isinstance(found, Mapping) or not found or "unnorm_key" not in takes:
        if key is not None:
            raise ValueError(
                f"--unnorm-key {key}: this policy has no statistics of several datasets to choose "
                "from; leave it out"
            )
        return None
    if key is None and len(found) > 1:
        raise ValueError(
            "the policy has statistics of several datasets; choose one with --unnorm-key "
            f"(in Python and YAML `unnorm_key`): {cut(', '.join(sorted(found)), 1000)}"
        )
    chosen = resolve_key(found, key)
    return chosen if len(found) > 1 else None


def _nothing() -> None:
    """Takes no argument."""
