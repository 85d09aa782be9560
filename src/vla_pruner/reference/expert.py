"""The scripted expert: the right action for any state of the scene, without memory.

It decides from the present state alone (there is no phase counter), so it can label every state
that a policy or a disturbance leads to, and a policy that imitates it needs no memory either.
"""

from __future__ import annotations

import numpy as np
from scipy.spatial.transform import Rotation

from ..scenes.pick_place import BIN_FLOOR_M, BIN_WALL_TOP_M, FULL_STEP_M, FULL_TURN_RAD, SceneState

OPEN, CLOSE = -1.0, 1.0

_POINTING_DOWN = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0]])
_TRAVEL_Z = 1.03
"""Finger height above every object that stands in a bin."""
_CARRY_BOTTOM_Z = 0.99
"""Height of the carried object's underside above every other object."""
_RELEASE_BOTTOM_Z = BIN_FLOOR_M + 0.04
_RETREAT_Z = 1.10
_GRASP_DEPTH = 0.035
_SHALLOWEST_GRASP = 0.018
_PALM_FREE_Z = BIN_WALL_TOP_M - 0.025
"""Finger height at which the palm clears the wall of a bin."""
_ALIGNED_XY = 0.012
_ALIGNED_Z = 0.014
_ALIGNED_YAW = 0.12
_CANDIDATE_YAWS = np.linspace(-np.pi / 2, np.pi / 2, 36, endpoint=False)


def act(state: SceneState) -> np.ndarray:
    """The expert's action, `[7]` float64 in [-1, 1], at `state`."""
    if state.held:
        return _carry(state)
    if state.object_in_bin():
        return _retreat(state)
    return _grasp(state)


def _carry(state: SceneState) -> np.ndarray:
    """Lift straight up, travel to the bin, lower, release."""
    low, high = state.vertices.min(axis=0), state.vertices.max(axis=0)
    to_bin = state.bin_centre - (low[:2] + high[:2]) / 2
    above_bin = float(np.max(np.abs(to_bin)))
    if above_bin < 0.04:
        if low[2] < _RELEASE_BOTTOM_Z + 0.015:
            return _toward(state, np.zeros(3), _bin_yaw(state), OPEN)
        rise = _RELEASE_BOTTOM_Z - low[2]
        return _toward(state, np.array([*to_bin, rise]), _bin_yaw(state), CLOSE)
    rise = _CARRY_BOTTOM_Z - low[2]
    may_travel = np.clip((0.08 - rise) / 0.05, 0.0, 1.0)
    return _toward(state, np.array([*(to_bin * may_travel), rise]), _bin_yaw(state), CLOSE)


def _retreat(state: SceneState) -> np.ndarray:
    """Rise with open fingers, then stay."""
    rise = max(0.0, _RETREAT_Z - state.eef_position[2])
    return _toward(state, np.array([0.0, 0.0, rise]), _gripper_yaw(state), OPEN)


def _grasp(state: SceneState) -> np.ndarray:
    """Go above the object, descend while aligned with it, close the fingers."""
    yaw, xy, width = _narrowest_side(state)
    top = state.vertices[:, 2].max()
    grasp_z = min(max(top - _GRASP_DEPTH, _PALM_FREE_Z), top - _SHALLOWEST_GRASP)
    to_object = xy - state.eef_position[:2]
    distance = float(np.linalg.norm(to_object))
    height = state.eef_position[2]
    turn = abs(_half_turn(yaw - _gripper_yaw(state)))

    at_grasp = distance < _ALIGNED_XY and abs(height - grasp_z) < _ALIGNED_Z and turn < _ALIGNED_YAW
    if at_grasp:
        return _toward(state, np.array([*to_object, grasp_z - height]), yaw, CLOSE)

    fits = state.finger_opening > width + 0.01 or height < top - 0.005
    above = top + 0.03
    if not fits or turn > 0.2:
        lowest = above
    else:
        lowest = grasp_z + np.clip((distance - _ALIGNED_XY) / 0.03, 0.0, 1.0) * (above - grasp_z)
    safe_z = lowest + np.clip((distance - 0.05) / 0.05, 0.0, 1.0) * max(0.0, _TRAVEL_Z - lowest)
    # A gripper that is too low rises before it travels, or it would sweep objects away.
    may_travel = (
        1.0 if distance < 0.03 else np.clip(1.0 - (safe_z - height - 0.03) / 0.05, 0.0, 1.0)
    )
    return _toward(state, np.array([*(to_object * may_travel), safe_z - height]), yaw, OPEN)


def _narrowest_side(state: SceneState) -> tuple[float, np.ndarray, float]:
    """Where to grasp from above: gripper yaw, grasp centre `[2]`, and the width there."""
    top, bottom = state.vertices[:, 2].max(), state.vertices[:, 2].min()
    band = state.vertices[:, :2]
    if top - bottom > 0.05:
        upper = state.vertices[:, 2] > top - 2 * _GRASP_DEPTH
        band = band[upper] if upper.sum() > 8 else band
    closing = np.stack([-np.sin(_CANDIDATE_YAWS), np.cos(_CANDIDATE_YAWS)])  # [2, 36]
    across = state.vertices[:, :2] @ closing  # [N, 36]
    widths = np.ptp(across, axis=0)
    best = int(np.argmin(widths + 0.004 * np.abs(_CANDIDATE_YAWS)))
    yaw = float(_CANDIDATE_YAWS[best])
    axes = np.array([[-np.sin(yaw), np.cos(yaw)], [np.cos(yaw), np.sin(yaw)]])
    along = band @ axes.T
    centre = (along.min(axis=0) + along.max(axis=0)) / 2 @ axes
    return yaw, centre, float(widths[best])


def _gripper_yaw(state: SceneState) -> float:
    """Yaw of the gripper; 0 when it closes along the world's y axis."""
    return float(np.arctan2(-state.eef_rotation[0, 0], state.eef_rotation[1, 0]))


def _bin_yaw(state: SceneState) -> float:
    """The yaw nearest to the gripper's at which the object stands square in its bin."""
    return round(_gripper_yaw(state) / (np.pi / 2)) * (np.pi / 2)


def _half_turn(angle: float) -> float:
    """`angle` modulo the gripper's symmetry, in [-pi/2, pi/2)."""
    return (angle + np.pi / 2) % np.pi - np.pi / 2


def _toward(state: SceneState, move: np.ndarray, yaw: float, gripper: float) -> np.ndarray:
    """Action that moves by `move` (m), turns to `yaw` pointing down, commands `gripper`."""
    current = _gripper_yaw(state)
    yaw = current + _half_turn(yaw - current)
    wanted = Rotation.from_euler("z", yaw).as_matrix() @ _POINTING_DOWN
    turn = Rotation.from_matrix(wanted @ state.eef_rotation.T).as_rotvec()
    return np.concatenate(
        [_into_ball(move / FULL_STEP_M), _into_ball(turn / FULL_TURN_RAD), [gripper]]
    )


def _into_ball(vector: np.ndarray) -> np.ndarray:
    """`vector` shortened to length 1 if it is longer."""
    return vector / max(1.0, float(np.linalg.norm(vector)))
