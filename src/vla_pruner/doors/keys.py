"""Where a robot's message has its images, state and instruction, and what its gripper is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from vla_pruner._short import cut, printable, short
from vla_pruner._yaml import read_yaml
from vla_pruner.episodes.control import Gripper
from vla_pruner.serving.engine import Refused


@dataclass(frozen=True)
class Keys:
    """Names in a message. A name with dots also finds what lies in maps: `images.cam_high`.

    Args:
        cameras: images, in the order in which a policy takes them; a policy with fewer takes the
            first ones.
        state: arrays of the robot's state, laid one behind the other.
        prompt: the instruction.
        channels_first: images are [3, height, width] instead of [height, width, 3].
        gripper: how the robot reads the last entry of an action; None: as the policy writes it.
    """

    cameras: tuple[str, ...]
    state: tuple[str, ...]
    prompt: str = "prompt"
    channels_first: bool = False
    gripper: Gripper | None = None


KEYS = {
    "libero": Keys(
        ("observation/image", "observation/wrist_image"),
        ("observation/state",),
        gripper="robosuite",
    ),
    "droid": Keys(
        ("observation/exterior_image_1_left", "observation/wrist_image_left"),
        ("observation/joint_position", "observation/gripper_position"),
    ),
    "aloha": Keys(
        (
            "images.cam_high",
            "images.cam_left_wrist",
            "images.cam_right_wrist",
            "images.cam_low",
        ),
        ("state",),
        channels_first=True,
    ),
}


def keys_of(name: str) -> Keys:
    """The names called `name`, or those in a YAML file.

    Raises:
        ValueError: no such name or file, or a file that does not fit.
    """
    if name in KEYS:
        return KEYS[name]
    file = Path(name)
    if not file.is_file():
        raise ValueError(f"--keys {short(name)}: choose {', '.join(KEYS)}, or name a YAML file")
    found = read_yaml(file)
    known = [field.name for field in fields(Keys)]
    if not isinstance(found, Mapping) or not {"cameras", "state"} <= set(found) <= set(known):
        raise ValueError(
            f"{file} must say `cameras` and `state`, and may say {', '.join(known[2:])}; it says "
            f"{short(list(found) if isinstance(found, Mapping) else found)}"
        )
    for name in ("cameras", "state"):
        if not isinstance(found[name], list) or not all(isinstance(k, str) for k in found[name]):
            raise ValueError(f"{file}: `{name}` must be a list of names; got {short(found[name])}")
        check_names(f"{file}: `{name}`", found[name])
    more = {name: value for name, value in found.items() if name not in ("cameras", "state")}
    if not isinstance(more.get("prompt", ""), str):
        raise ValueError(f"{file}: `prompt` must be a name; got {short(more['prompt'])}")
    if not isinstance(more.get("channels_first", False), bool):
        raise ValueError(f"{file}: `channels_first` must be true or false")
    if more.get("gripper") not in (None, "robosuite", "rlds"):
        raise ValueError(f"{file}: `gripper` must be robosuite or rlds")
    return Keys(tuple(found["cameras"]), tuple(found["state"]), **more)


def check_names(what: str, names: Sequence[str]) -> None:
    """Refuse names that are empty, or one name for two cameras. Errors: ValueError."""
    if len(set(names)) < len(names) or not all(name.strip() for name in names):
        raise ValueError(f"{what} names something twice, or nothing: {short(list(names))}")


@dataclass(frozen=True)
class Robot:
    """What the policy behind a door takes and gives; all that a door knows of it.

    Args:
        cameras: images that it takes.
        state_dim: numbers of the robot's state that it reads; None: none.
        action_dim: numbers of an action; None: not known.
        gripper: how it writes the last entry of an action.
    """

    cameras: int = 1
    state_dim: int | None = None
    action_dim: int | None = None
    gripper: Gripper = "rlds"

    def check(self, shown: int, who: str, state: Sequence[str] | None = None) -> None:
        """Refuse to serve clients that show too few cameras, or no state. Errors: ValueError."""
        if not 1 <= self.cameras <= shown:
            raise ValueError(
                f"this policy takes {self.cameras} images and {who} has {shown}; name more cameras "
                "in a YAML file of keys"
            )

        if self.state_dim is not None and state is not None and not state:
            raise ValueError(
                f"this policy reads {self.state_dim} numbers of state, and {who} names none of it"
            )

    def observation(self, message: Mapping[Any, Any], keys: Keys) -> dict[str, Any]:
        """What the policy reads, found in a message.

        Raises:
            Refused: something is missing, or is not what it should be; the sentence names it.
        """
        if not isinstance(message, Mapping):
            raise Refused(f"an observation is a map of names; got {type(message).__name__}")
        views = [picture(find(message, name), name, keys.channels_first) for name in self._of(keys)]
        prompt = find(message, keys.prompt)
        if not isinstance(prompt, str) or not prompt.strip():
            raise Refused(f"{keys.prompt!r} must be a sentence; got {short(prompt)}")
        made: dict[str, Any] = {"images": views, "instruction": prompt}
        if self.state_dim is not None:
            parts = [numbers(find(message, name), name) for name in keys.state]
            made["proprio"] = self.state(np.concatenate(parts), " + ".join(keys.state))
        return made

    def state(self, state: np.ndarray, name: str) -> np.ndarray:
        """A state of the right length. Errors: Refused."""
        if len(state) != self.state_dim:
            raise Refused(
                f"{name} has {len(state)} numbers; this policy reads {self.state_dim} of state"
            )
        return state

    def actions(self, actions: np.ndarray, wants: Gripper | None) -> np.ndarray:
        """A policy's actions `[H, D]` with the gripper as the robot reads it, float32."""
        return with_gripper(np.asarray(actions, np.float32), self.gripper, wants)

    def _of(self, keys: Keys) -> tuple[str, ...]:
        return keys.cameras[: self.cameras]


def with_gripper(actions: np.ndarray, written: Gripper, read: Gripper | None) -> np.ndarray:
    """The last entry of actions `[..., D]`: +1 close and -1 open, or 0 close and 1 open; clipped.

    `read=None`: as the policy writes it.
    """
    if read is None:
        return actions
    made, last = actions.copy(), actions[..., -1]
    if read != written:
        last = 1 - 2 * last if read == "robosuite" else (1 - last) / 2
    made[..., -1] = np.clip(last, -1 if read == "robosuite" else 0, 1)
    return made


def find(message: Mapping[Any, Any], name: str) -> Any:
    """The entry of a message with this name, or in maps along its dots. Errors: Refused."""
    if name in message:
        return message[name]
    found: Any = message
    for step in name.split("."):
        if not isinstance(found, Mapping) or step not in found:
            shown = printable(cut(", ".join(sorted(map(str, message))), 200)) or "nothing"
            raise Refused(f"the observation has no {name!r}; it has {shown}")
        found = found[step]
    return found


def picture(value: Any, name: str, channels_first: bool = False) -> np.ndarray:
    """A uint8 image [height, width, 3]. Errors: Refused."""
    shape = getattr(value, "shape", None)
    if not isinstance(value, np.ndarray) or value.dtype != np.uint8:
        kind = value.dtype if isinstance(value, np.ndarray) else type(value).__name__
        raise Refused(f"{name!r} must be an image of uint8 values 0..255; got {kind}")
    wanted = "[3, height, width]" if channels_first else "[height, width, 3]"
    if value.ndim != 3 or 0 in value.shape or value.shape[0 if channels_first else 2] != 3:
        raise Refused(f"{name!r} has shape {shape}; expected {wanted}")
    return np.ascontiguousarray(np.moveaxis(value, 0, -1)) if channels_first else value


def numbers(value: Any, name: str) -> np.ndarray:
    """Finite numbers as float64 [N]. Errors: Refused."""
    if isinstance(value, list) and all(type(each) in (int, float) for each in value):
        value = np.array(value, dtype=np.float64)
    if type(value) in (int, float) or isinstance(value, np.generic):
        value = np.array([value])
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "iuf" or value.ndim != 1:
        raise Refused(f"{name!r} must be an array of numbers [N]; got {short(value)}")
    made: np.ndarray = value.astype(np.float64)
    if not np.isfinite(made).all():
        raise Refused(f"{name!r} holds numbers that are not finite")
    return made
