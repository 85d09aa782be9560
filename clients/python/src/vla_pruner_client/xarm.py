"""An xArm6 over `xarm-python-sdk`: joint servo within limits. Not tried on hardware.

    from xarm.wrapper import XArmAPI
    from vla_pruner_client import Client
    from vla_pruner_client.xarm import XArm6, drive

    arm = XArm6(XArmAPI("192.168.1.200", is_radian=True), cameras)
    drive(arm, Client("ws://127.0.0.1:8000"), "pick up the can", seconds=60)

What this does is no safety function: the controller's own limits and the emergency stop stay on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from vla_pruner_client import Client, Command, Executor

JOINTS = 6
SDK_JOINT_LIMITS = (
    (-2 * math.pi, 2 * math.pi),
    (-2.042035, 2.024581),
    (-3.822271, 0.174532),
    (-2 * math.pi, 2 * math.pi),
    (-1.692969, math.pi),
    (-2 * math.pi, 2 * math.pi),
)
"""Rad; the narrower of what the SDK (1.18.4) allows the two common kinds of xArm6."""
SDK_JOINT_SPEED = math.pi
"""Rad/s; the SDK cuts joint speeds to this."""
LARGEST_TURN = math.pi / 4
"""Rad; an answer of the inverse kinematics that turns a joint further for one action is no way."""
GRIPPER_OPEN = 850.0
"""Pulses of an open gripper; 0 is closed."""

HALTED = "the arm was told to stop"

Cameras = Callable[[], Mapping[str, np.ndarray]]
"""Gives the newest image uint8 [H, W, 3] of each camera, by the name that the server reads."""


class Api(Protocol):
    """What is used of `xarm.wrapper.XArmAPI`; all angles in radians, positions in mm."""

    def get_err_warn_code(self) -> Any: ...
    def motion_enable(self, enable: bool = True) -> int: ...
    def set_mode(self, mode: int = 0) -> int: ...
    def set_state(self, state: int = 0) -> int: ...
    def get_servo_angle(self, *, is_radian: bool) -> Any: ...
    def get_forward_kinematics(
        self, angles: Any, *, input_is_radian: bool, return_is_radian: bool
    ) -> Any: ...
    def get_inverse_kinematics(
        self, pose: Any, *, input_is_radian: bool, return_is_radian: bool
    ) -> Any: ...
    def set_servo_angle_j(self, angles: Any, *, is_radian: bool) -> int: ...
    def set_reduced_tcp_boundary(self, boundary: Any) -> int: ...
    def set_fence_mode(self, on: bool) -> int: ...
    def set_gripper_enable(self, enable: bool) -> int: ...
    def set_gripper_mode(self, mode: int) -> int: ...
    def get_gripper_position(self) -> Any: ...
    def set_gripper_position(self, pos: float, wait: bool = False) -> int: ...


class ArmError(RuntimeError):
    """The arm refused, or is in an error; it was told to stop."""


@dataclass(frozen=True)
class Limits:
    """What the arm is never told to exceed.

    Args:
        joint_speed: rad/s of the fastest joint.
        joints: lowest and highest angle of each, rad; at most those of the SDK.
        margin: rad that are kept from them.
        workspace: lowest and highest x, y, z of the tool, mm, from the arm's base.

    Raises:
        ValueError: wider than the SDK's, or empty.
    """

    workspace: tuple[tuple[float, float], tuple[float, float], tuple[float, float]]
    joint_speed: float = 1.0
    joints: tuple[tuple[float, float], ...] = SDK_JOINT_LIMITS
    margin: float = 0.02

    def __post_init__(self) -> None:
        if not 0 < self.joint_speed <= SDK_JOINT_SPEED:
            raise ValueError(f"joint_speed={self.joint_speed:g}: 0 to {SDK_JOINT_SPEED:.4g} rad/s")
        if len(self.joints) != JOINTS or self.margin < 0:
            raise ValueError(f"joints: {JOINTS} pairs of rad, and margin >= 0")
        for (low, high), (lowest, highest) in zip(self.joints, SDK_JOINT_LIMITS, strict=True):
            if not lowest <= low + self.margin < high - self.margin <= highest:
                raise ValueError(f"joints ({low:g}, {high:g}): within ({lowest:g}, {highest:g})")
        box = np.asarray(self.workspace, np.float64)
        if box.shape != (3, 2) or not np.isfinite(box).all() or (box[:, 0] >= box[:, 1]).any():
            raise ValueError("workspace: lowest before highest, in mm, of x, y and z")

    def clipped(self, wanted: np.ndarray, last: np.ndarray, seconds: float) -> np.ndarray:
        """Joint angles [6] on the way to those wanted, as far as `seconds` allow."""
        low, high = np.array(self.joints).T
        step = np.clip(wanted, low + self.margin, high - self.margin) - last
        farthest, most = np.abs(step).max(), self.joint_speed * max(seconds, 0.0)
        return last + step * (most / farthest if farthest > most else 1.0)

    def holds(self, position: np.ndarray) -> bool:
        """Whether a tool position [3] in mm is in the workspace."""
        low, high = np.array(self.workspace).T
        return bool(np.all((position >= low) & (position <= high)))


class XArm6:
    """One arm and its cameras.

    Args:
        api: `XArmAPI(IP, is_radian=True)`, connected.
        cameras: see `Cameras`; called by the client's thread.
        limits: see `Limits`.
        hz: times in a second that `send` is called; speeds hold however often that is.
        actions: "joints": actions are joint angles [6] in rad; "delta": differences of the tool's
            pose, x y z in m and roll pitch yaw in rad. Either is followed by the gripper.
        gripper: how it is written: "rlds" 0 closed, 1 open; "robosuite" 1 closed, -1 open.
    """

    def __init__(
        self,
        api: Api,
        cameras: Cameras,
        limits: Limits,
        *,
        hz: float = 30.0,
        actions: Literal["joints", "delta"] = "joints",
        gripper: Literal["rlds", "robosuite"] = "rlds",
    ) -> None:
        if (
            not 0 < hz < math.inf
            or actions not in ("joints", "delta")
            or gripper not in ("rlds", "robosuite")
        ):
            raise ValueError("hz > 0, actions joints or delta, gripper rlds or robosuite")
        self.api, self.cameras, self.limits = api, cameras, limits
        self.hz, self.actions, self.gripper = hz, actions, gripper
        self.refused = 0
        """Commands that would have left the workspace, or that cannot be reached; it held."""
        self._at: np.ndarray | None = None
        self._sent = -math.inf
        self._grip: float | None = None
        self._stopped = ""

    @property
    def stop(self) -> Literal["hold", "zero"]:
        """What an executor does without actions: the last joint angles, or differences of zero."""
        return "hold" if self.actions == "joints" else "zero"

    def start(self) -> None:
        """Switch on, into servo mode, with the controller's fence around the workspace.

        Raises:
            ArmError: the arm has an error, or refuses.
        """
        error, _ = self._read("get_err_warn_code", self.api.get_err_warn_code())
        if error:
            raise ArmError(
                f"the controller has error {error}: look at the arm, clear it, try again"
            )
        box = [edge for low, high in self.limits.workspace for edge in (high, low)]
        for name, arguments in (
            ("set_reduced_tcp_boundary", [box]),
            ("set_fence_mode", [True]),
            ("motion_enable", [True]),
            ("set_mode", [1]),
            ("set_state", [0]),
            ("set_gripper_enable", [True]),
            ("set_gripper_mode", [0]),
        ):
            self._done(name, getattr(self.api, name)(*arguments))
        at = self.joints()
        tool = self._tool(at)[:3]
        if not self.limits.holds(tool):
            raise ArmError(
                self._because(
                    f"the tool is at {tool.round().tolist()} mm, outside of the workspace "
                    f"{self.limits.workspace}, and no way from there is allowed; move it in by hand"
                )
            )
        self._at, self._stopped = at, ""

    def joints(self) -> np.ndarray:
        """Measured joint angles [6], rad. Errors: ArmError."""
        angles = self._read("get_servo_angle", self.api.get_servo_angle(is_radian=True))
        return self._numbers("get_servo_angle", angles)

    def observe(self, instruction: str) -> dict[str, Any]:
        """Images, joints [6], gripper [1] (1 open), both as a state [7], instruction."""
        pulses = self._read("get_gripper_position", self.api.get_gripper_position())
        opened, joints = np.array([float(pulses) / GRIPPER_OPEN]), self.joints()
        seen: dict[str, Any] = dict(self.cameras())
        seen["observation/joint_position"], seen["observation/gripper_position"] = joints, opened
        return seen | {"observation/state": np.concatenate([joints, opened]), "prompt": instruction}

    def send(self, action: np.ndarray) -> None:
        """Go one tick towards an action [7], within the limits.

        Raises:
            ArmError: the arm refused; it was told to stop.
            ValueError: not seven finite numbers; nothing is sent.
        """
        action = np.asarray(action, np.float64)
        if action.shape != (JOINTS + 1,) or not np.isfinite(action).all():
            raise ValueError(f"an action is 7 finite numbers; got {action.tolist()}")
        at = self._started()
        now = time.monotonic()
        wanted, target = self._wanted(action[:JOINTS], at), at
        if wanted is not None:
            # A tick that comes early may not go as far as one that comes in time.
            target = self.limits.clipped(wanted, at, min(now - self._sent, 1 / self.hz))
            if not self.limits.holds(self._tool(target)[:3]):
                self.refused += 1
                target = at
        self._go(target)
        self._sent = now
        self._grasp(float(action[JOINTS]))

    def hold(self) -> None:
        """Stay where the arm was told to be last, on the way to wherever. Errors: ArmError."""
        self._go(self._started())

    def end(self) -> None:
        """Stop where the arm is. Errors: ArmError, it did not hear of it."""
        said = self._halt()
        if said != HALTED:
            raise ArmError(said)

    def _started(self) -> np.ndarray:
        if self._at is None:
            raise ArmError(f"{self._stopped or 'the arm was not started'}; call start() first")
        return self._at

    def _go(self, target: np.ndarray) -> None:
        self._done("set_servo_angle_j", self.api.set_servo_angle_j(target.tolist(), is_radian=True))
        self._at = target

    def _wanted(self, action: np.ndarray, at: np.ndarray) -> np.ndarray | None:
        """Joint angles of an action; None: they cannot be had."""
        if self.actions == "joints":
            return action
        if not action.any():
            return at
        pose = self._tool(at) + action * ([1000.0] * 3 + [1.0] * 3)
        pose[3:] -= 2 * math.pi * np.round(pose[3:] / (2 * math.pi))  # a tool that looks down: pi
        code, angles = self.api.get_inverse_kinematics(
            pose.tolist(), input_is_radian=True, return_is_radian=True
        )
        if code == 0 and len(angles) >= JOINTS:
            # The same pose a whole turn away is no reason to turn; another elbow is one to stand.
            turn = np.asarray(angles[:JOINTS], np.float64) - at
            turn -= 2 * math.pi * np.round(turn / (2 * math.pi))
            if np.abs(turn).max() <= LARGEST_TURN:
                return at + turn
        self.refused += 1
        return None

    def _tool(self, joints: np.ndarray) -> np.ndarray:
        """Pose [6] of the tool at these angles: mm and rad."""
        found = self.api.get_forward_kinematics(
            joints.tolist(), input_is_radian=True, return_is_radian=True
        )
        pose = self._read("get_forward_kinematics", found)
        return self._numbers("get_forward_kinematics", pose)

    def _grasp(self, value: float) -> None:
        opened = (1 - value) / 2 if self.gripper == "robosuite" else value
        pulses = GRIPPER_OPEN * min(max(opened, 0.0), 1.0)
        if self._grip is None or abs(pulses - self._grip) > 0.02 * GRIPPER_OPEN:
            moved = self.api.set_gripper_position(pulses, wait=False)
            self._done("set_gripper_position", moved)
            self._grip = pulses

    def _numbers(self, name: str, found: Any) -> np.ndarray:
        """Six finite numbers of an answer, or the arm stops."""
        made = np.asarray(found[:JOINTS], np.float64)
        if made.shape != (JOINTS,) or not np.isfinite(made).all():
            raise ArmError(self._because(f"{name} gave {found} instead of numbers"))
        return made

    def _read(self, name: str, answer: Any) -> Any:
        self._done(name, answer[0])
        return answer[1]

    def _done(self, name: str, code: int) -> None:
        if code != 0:
            raise ArmError(self._because(f"{name} answered {code} (the SDK's API code)"))

    def _because(self, reason: str) -> str:
        """Stop the arm; the sentence that says why, and whether it heard."""
        self._stopped = f"{reason}: {self._halt()}"
        return self._stopped

    def _halt(self) -> str:
        self._at = None
        try:
            code: Any = self.api.set_state(4)
        except Exception as error:  # of a connection that is gone
            code = repr(error)
        if code in (0, 1, 2):  # also with an error or a warning that nobody has cleared
            return HALTED
        return f"set_state(4) answered {code}: THE ARM MAY STILL MOVE, use the emergency stop"


def drive(
    arm: XArm6,
    client: Client,
    instruction: str,
    *,
    seconds: float,
    ask_at: int = 0,
    max_age_s: float = 1.0,
    ticked: Callable[[Mapping[str, Any] | None, Command], None] | None = None,
) -> int:
    """Let a served policy act for some seconds; how many ticks the arm stood.

    The arm is stopped at the end, and on every error. Without actions it holds where it is, which
    may be short of what was asked last.

    Args:
        arm: it is started here.
        client: of the server.
        instruction: what to do.
        seconds: at most.
        ask_at, max_age_s: see `Executor`.
        ticked: told after each tick what was seen last, and what was done: a recorder's `add`.

    Raises:
        ArmError: the arm refused.
    """
    last: list[Mapping[str, Any]] = []

    def observe() -> Mapping[str, Any]:
        last[:] = [arm.observe(instruction)]
        return last[0]

    stood = 0
    try:
        arm.start()
        with Executor(
            client, observe, stop=arm.stop, ask_at=ask_at, max_age_s=max_age_s
        ) as executor:
            try:
                due = time.monotonic()
                over = due + seconds
                for _ in range(round(seconds * arm.hz)):
                    command = executor.step()
                    stood += command.stopped
                    if command.action is not None:
                        arm.hold() if command.stopped else arm.send(command.action)
                    if ticked is not None:
                        ticked(last[0] if last else None, command)
                    due = max(due + 1 / arm.hz, time.monotonic() - 1 / arm.hz)
                    if due >= over:
                        break
                    time.sleep(max(due - time.monotonic(), 0))
            finally:
                arm.end()  # before the executor waits for its last question
    finally:
        arm.end()
    return stood
