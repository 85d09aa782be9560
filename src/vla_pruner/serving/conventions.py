"""What the messages of each vla-eval benchmark mean: cameras, robot state, actions, and checks.

Non-obvious behaviours
----------------------
* Policies write the gripper in one of two ways. Those trained on RLDS data (every published OpenVLA
  and OpenVLA-OFT checkpoint) say 0 to close and 1 to open; those trained in robosuite, such as the
  ones that ship with this package, say +1 to close and -1 to open.
* vla-eval's class for SIMPLER's Google robot turns the gripper it is sent, g, into the relative
  command 1 - 2 g, and latches a command above 0.5 for 15 steps. SIMPLER's own rule latches the
  policy's last absolute opening minus the new one, and its first command is none. What is sent is
  therefore `(1 - (last - new)) / 2`, at first 0.5, with the last opening that was carried out
  (`Hand`): then the class does what SIMPLER does.
* vla-eval's SIMPLER class declares `euler_xyz` and `binary_close_positive`, but hands the rotation
  to a controller that reads axis-angle, and reads the gripper as 0 close, 1 open. What is sent is
  what the class does; what is declared is what it declares, so that its check passes.
* LIBERO's state holds the orientation as robosuite's axis-angle without sign correction: that is
  what published checkpoints were trained on (`quat_no_antipodal`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
from vla_eval.rotation import euler_xyz_to_matrix, matrix_to_quat, quat_to_axisangle
from vla_eval.specs import (
    GRIPPER_CLOSE_POS,
    IMAGE_RGB,
    LANGUAGE,
    POSITION_DELTA,
    ROTATION_AA,
    ROTATION_EULER,
    STATE_EEF_POS_AA_GRIP,
    DimSpec,
)

from vla_pruner._short import cut, short
from vla_pruner.episodes.control import Gripper

ACTION_DIM = 7
LONGEST_JPEG = 65_500
"""Pixels of a side, as libjpeg writes them."""


@dataclass(frozen=True)
class Convention:
    """How one benchmark speaks.

    Args:
        name: as in `--benchmark`.
        cameras: entries of `images`, in the order in which policies take them.
        state: entry that holds the robot state; None: the benchmark sends none that policies read.
        wants_open: the gripper is sent as 0 close, 1 open; otherwise as -1 open, +1 close.
        relative: the gripper is sent as the change since the last action, see above.
        euler: policies write rotations as Euler angles, which are sent as axis-angle.
        params: arguments of the benchmark's class that a server asks for.
        camera_params, state_params: further ones, for policies with a second camera or with a
            state.
    """

    name: str
    cameras: tuple[str, ...]
    state: str | None = None
    wants_open: bool = False
    relative: bool = False
    euler: bool = False
    params: Mapping[str, Any] = field(default_factory=dict)
    camera_params: Mapping[str, Any] = field(default_factory=dict)
    state_params: Mapping[str, Any] = field(default_factory=dict)


CONVENTIONS = {
    convention.name: convention
    for convention in (
        Convention(
            "pickplace",
            ("agentview", "wrist"),
            state="states",
            camera_params={"send_wrist_image": True},
            state_params={"send_state": True},
        ),
        Convention(
            "libero",
            ("agentview", "wrist"),
            state="states",
            params={"seed": 7, "env_seed": 0},
            camera_params={"send_wrist_image": True},
            state_params={"send_state": True, "quat_no_antipodal": True},
        ),
        Convention(
            "simpler-google",
            ("primary",),
            wants_open=True,
            relative=True,
            euler=True,
            params={"gripper_mode": "sticky", "success_mode": "truncation"},
        ),
        Convention(
            "simpler-widowx",
            ("primary",),
            wants_open=True,
            euler=True,
            params={"gripper_mode": "binary", "success_mode": "truncation"},
        ),
    )
}


@dataclass(frozen=True)
class Translator:
    """Messages of one benchmark to observations of one policy, and its actions back.

    Args:
        convention: of the benchmark.
        cameras: images that the policy takes.
        state_dim: numbers of robot state that the policy reads; None: none.
        gripper: how the policy writes it.
        jpeg: pass images through JPEG (quality 95) first, as training data of published
            checkpoints was stored.
    """

    convention: Convention
    cameras: int
    state_dim: int | None
    gripper: Gripper
    jpeg: bool = False

    def __post_init__(self) -> None:
        shown, name = self.convention.cameras, self.convention.name
        if self.gripper not in get_args(Gripper):
            raise ValueError(
                f"gripper={short(self.gripper)} is unknown; use {' or '.join(get_args(Gripper))}"
            )
        if not 1 <= self.cameras <= len(shown):
            raise ValueError(
                f"this policy sees {self.cameras} cameras; {name} shows {len(shown)}: "
                f"{', '.join(shown)}"
            )
        if self.state_dim is not None and self.convention.state is None:
            raise ValueError(
                f"this policy reads a robot state of {self.state_dim} numbers, and {name} sends "
                "none; serve a policy without one"
            )
        if self.state_dim is not None and self.state_dim != STATE_EEF_POS_AA_GRIP.dims:
            raise ValueError(
                f"this policy reads a robot state of {self.state_dim} numbers; {name} sends "
                f"{STATE_EEF_POS_AA_GRIP.dims}: position, axis-angle, two fingers"
            )

    # -- what is declared ------------------------------------------------------------------------
    def action_spec(self) -> dict[str, DimSpec]:
        """What is sent, for vla-eval's check."""
        rotation = ROTATION_EULER if self.convention.euler else ROTATION_AA
        return {"position": POSITION_DELTA, "rotation": rotation, "gripper": GRIPPER_CLOSE_POS}

    def observation_spec(self) -> dict[str, DimSpec]:
        """What is read, for vla-eval's check."""
        spec = dict.fromkeys(self.convention.cameras[: self.cameras], IMAGE_RGB)
        spec["language"] = LANGUAGE
        if self.state_dim is not None:
            spec["state"] = STATE_EEF_POS_AA_GRIP
        return spec

    def observation_params(self) -> dict[str, Any]:
        """Arguments that vla-eval hands to the benchmark, where its own config says nothing."""
        params = dict(self.convention.params)
        if self.cameras > 1:
            params.update(self.convention.camera_params)
        if self.state_dim is not None:
            params.update(self.convention.state_params)
        return params

    # -- messages --------------------------------------------------------------------------------
    def observation(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """The policy's observation in a message: `images`, `instruction`, perhaps `proprio`.

        Raises:
            ValueError: a camera, the instruction or the state is missing or of another shape; the
                message says which.
        """
        images = message.get("images")
        wanted = self.convention.cameras[: self.cameras]
        if not isinstance(images, Mapping):
            raise ValueError(
                f"`images` must map camera names to images; got {type(images).__name__}"
            )
        if missing := [camera for camera in wanted if camera not in images]:
            raise ValueError(
                f"no image of {', '.join(missing)}: this policy needs {', '.join(wanted)}, and "
                f"`images` holds {cut(', '.join(map(str, images)), 200) or 'none'}"
                + self._advice(self.convention.camera_params)
            )
        instruction = message.get("task_description")
        if not isinstance(instruction, str) or not instruction.strip():
            raise ValueError(f"`task_description` must be a sentence; got {short(instruction)}")
        views = [self._image(camera, images[camera]) for camera in wanted]
        observation: dict[str, Any] = {"images": views, "instruction": instruction}
        if self.state_dim is not None:
            observation["proprio"] = self._state(message)
        return observation

    def _image(self, camera: str, image: Any) -> np.ndarray:
        shape, dtype = getattr(image, "shape", None), getattr(image, "dtype", None)
        if not isinstance(image, np.ndarray) or dtype != np.uint8:
            raise ValueError(
                f"image {short(camera)} must be uint8; got {dtype or type(image).__name__}"
            )
        if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise ValueError(
                f"image {short(camera)} has shape {shape}; expected (height, width, 3)"
            )
        return through_jpeg(image) if self.jpeg else image

    def _state(self, message: Mapping[str, Any]) -> np.ndarray:
        name = str(self.convention.state)
        if name not in message:
            raise ValueError(
                f"this policy reads a robot state and the message has no {short(name)}"
                + self._advice(self.convention.state_params)
            )
        found = message[name]
        try:
            made = np.asarray(found if isinstance(found, list | np.ndarray) else None)
        except ValueError:  # Lists of different lengths.
            made = np.asarray(None)
        if made.dtype.kind not in "iuf":
            raise ValueError(f"{short(name)} must be a list of numbers; got {short(found)}")
        state = made.astype(np.float64)
        if state.shape != (self.state_dim,):
            raise ValueError(f"{short(name)} has shape {state.shape}; expected ({self.state_dim},)")
        if not np.isfinite(state).all():
            raise ValueError(f"{short(name)} is not finite: {short(state.tolist())}")
        return state

    def _advice(self, params: Mapping[str, Any]) -> str:
        if not params:
            return ""
        return f"; run the benchmark with {', '.join(f'{k}={v}' for k, v in params.items())}"

    # -- actions ---------------------------------------------------------------------------------
    def hand(self) -> Hand:
        """What an episode's actions, each as it is sent, go through last."""
        return Hand(self.convention.relative)

    def actions(self, actions: np.ndarray) -> np.ndarray:
        """A policy's actions `[..., 7]` as the benchmark takes them, float32; grippers clipped.

        Raises:
            ValueError: another number of values.
        """
        if actions.shape[-1] != ACTION_DIM:
            raise ValueError(
                f"this policy gives actions of {actions.shape[-1]} values; {self.convention.name} "
                f"takes {ACTION_DIM}: position, rotation, gripper"
            )
        sent = np.array(actions, dtype=np.float32)
        closing = sent[..., 6] if self.gripper == "robosuite" else 1 - 2 * sent[..., 6]
        closing = np.clip(closing, -1, 1)
        sent[..., 6] = (1 - closing) / 2 if self.convention.wants_open else closing
        if self.convention.euler:
            sent[..., 3:6] = np.apply_along_axis(_euler_to_axis_angle, -1, sent[..., 3:6])
        return sent


class Hand:
    """The gripper of one episode, where it is sent as a change (`Convention.relative`)."""

    def __init__(self, relative: bool) -> None:
        self._relative = relative
        self._last: float | None = None

    def __call__(self, action: np.ndarray) -> np.ndarray:
        """An action `[7]` of `Translator.actions` that is carried out now, as it is sent."""
        if not self._relative:
            return action
        opening = float(action[6])
        change = 0.0 if self._last is None else self._last - opening
        self._last = opening
        sent = action.copy()
        sent[6] = (1 - change) / 2
        return sent


def _euler_to_axis_angle(euler: np.ndarray) -> np.ndarray:
    """Roll, pitch, yaw `[3]` about fixed axes to axis-angle `[3]`, radians."""
    return quat_to_axisangle(matrix_to_quat(euler_xyz_to_matrix(euler)))


def through_jpeg(image: np.ndarray) -> np.ndarray:
    """A uint8 image `[H, W, 3]` as JPEG of quality 95 leaves it. Errors: ValueError, too long."""
    from io import BytesIO

    from PIL import Image

    if max(image.shape[:2]) > LONGEST_JPEG:
        raise ValueError(
            f"an image of {image.shape[0]} x {image.shape[1]} pixels: JPEG holds sides of at most "
            f"{LONGEST_JPEG}"
        )
    stored = BytesIO()
    Image.fromarray(image).save(stored, format="JPEG", quality=95)
    return np.asarray(Image.open(stored).convert("RGB"))
