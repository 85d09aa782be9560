"""Where to grasp a thing from above, from points on its surface; no simulator."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

WIDEST_M = 0.074
"""Things wider than this do not fit between the fingers."""

_FINGERTIP_M = 0.035
"""How far the fingers reach down beside a tall thing."""
_PALM_ABOVE_M = 0.04
"""Height of the palm over the fingertips."""
_PALM_HALF_M = (0.11, 0.045)
"""Half the palm's extent along and across the closing direction."""
_FINGER_HALF_ACROSS_M = 0.018


@dataclass(frozen=True)
class Grasp:
    """A grasp from above; lengths in metres, world frame.

    Attributes
    ----------
    yaw : turn of the gripper about z from its first pose, in which it closes along y.
    centre : `[3]`, where the point between the finger pads goes.
    width : how far the fingers stay apart.
    top : highest point of the thing.
    """

    yaw: float
    centre: np.ndarray
    width: float
    top: float


def across(
    points: np.ndarray, obstacles: np.ndarray, rng: np.random.Generator | None = None
) -> Grasp:
    """Close around the whole thing, at the yaw where it is narrowest and the hand is free.

    `points` [N, 3] lie on the thing, `obstacles` [M, 3] on everything else. With `rng` equally good
    grasps are drawn at random, so that a second attempt differs from the first.
    """
    top, bottom = points[:, 2].max(), points[:, 2].min()
    tall = top - bottom > 0.05
    height = max(bottom + 0.008, top - _FINGERTIP_M) if tall else (top + bottom) / 2
    band = points[np.abs(points[:, 2] - height) < 0.02]
    if len(band) <= 8:
        band = points
    if rng is not None:
        height += rng.uniform(-0.006, 0.01)
    best_cost, best = np.inf, None
    for yaw in np.linspace(-np.pi / 2, np.pi / 2, 36, endpoint=False):
        closing = np.array([-np.sin(yaw), np.cos(yaw)])
        along = np.array([np.cos(yaw), np.sin(yaw)])
        spread, length = band[:, :2] @ closing, points[:, :2] @ along
        width = float(np.ptp(spread))
        centre = closing * _middle(spread) + along * _middle(length)
        blocked = _blocked(obstacles, np.array([*centre, height]), closing, (width / 2, 0.065))
        cost = width + 0.002 * abs(yaw) + 0.004 * min(blocked, 20) + (width > WIDEST_M)
        if rng is not None:
            cost += 0.02 * rng.random()
        if cost < best_cost:
            best_cost = cost
            best = Grasp(float(yaw), np.array([*centre, height]), width, float(top))
    assert best is not None
    return best


def rim(
    points: np.ndarray,
    obstacles: np.ndarray,
    depth: float,
    rng: np.random.Generator | None = None,
) -> Grasp:
    """Take the wall of a round vessel between the fingers, `depth` metres below its rim.

    Arguments and `rng` as in `across`.
    """
    top = points[:, 2].max()
    centre, radius = _circle(points[points[:, 2] > top - 0.008, :2])
    best_cost, best = np.inf, None
    for angle in np.linspace(-np.pi, np.pi, 32, endpoint=False):
        outwards = np.array([np.cos(angle), np.sin(angle)])
        yaw = half_turn(angle - np.pi / 2)
        place = np.array([*(centre + radius * outwards), top - depth])
        blocked = _blocked(obstacles, place, outwards, (0.0, 0.058))
        cost = 0.3 * abs(yaw) + 0.5 * min(blocked, 20)
        if rng is not None:
            cost += 0.4 * rng.random()
        if cost < best_cost:
            best_cost, best = cost, Grasp(yaw, place, 0.01, float(top))
    assert best is not None
    return best


def half_turn(angle: float) -> float:
    """`angle` modulo the gripper's symmetry, in [-pi/2, pi/2)."""
    return float((angle + np.pi / 2) % np.pi - np.pi / 2)


def _blocked(
    obstacles: np.ndarray,
    place: np.ndarray,
    closing: np.ndarray,
    fingers_m: tuple[float, float],
) -> int:
    """How many obstacle points are where the fingers or the palm would be.

    `fingers_m` is the range of distances along the closing direction that the fingers sweep.
    """
    if len(obstacles) == 0:
        return 0
    offset = obstacles[:, :2] - place[:2]
    along = np.abs(offset @ closing)
    aside = np.abs(offset @ np.array([-closing[1], closing[0]]))
    low = obstacles[:, 2] > place[2] - 0.015
    high = obstacles[:, 2] > place[2] + _PALM_ABOVE_M
    nearest, furthest = fingers_m
    fingers = low & (along >= nearest) & (along < furthest) & (aside < _FINGER_HALF_ACROSS_M)
    palm = high & (along < _PALM_HALF_M[0]) & (aside < _PALM_HALF_M[1])
    return int(fingers.sum() + palm.sum())


def _circle(points: np.ndarray) -> tuple[np.ndarray, float]:
    """Centre `[2]` and radius of the circle through most of `points` [N, 2].

    Trimmed least squares: the quarter that fits worst, such as a mug's handle, is left out.
    """
    used = np.ones(len(points), dtype=bool)
    centre, radius = points.mean(axis=0), 0.0
    for _ in range(6):
        system = np.c_[2 * points[used], np.ones(used.sum())]
        solution = np.linalg.lstsq(system, (points[used] ** 2).sum(axis=1), rcond=None)[0]
        centre = solution[:2]
        radius = float(np.sqrt(max(solution[2] + centre @ centre, 1e-6)))
        miss = np.abs(np.linalg.norm(points - centre, axis=1) - radius)
        used = miss <= max(np.quantile(miss, 0.75), 0.003)
    return centre, radius - 0.001


def _middle(values: np.ndarray) -> float:
    return float(values.max() + values.min()) / 2
