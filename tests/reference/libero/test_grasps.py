"""Grasps from above, on shapes whose best grasp is known."""

import numpy as np
import pytest

from checks import near
from vla_pruner.reference.libero.grasps import WIDEST_M, across, half_turn, rim

NOTHING = np.zeros((0, 3))


def block(size, yaw=0.0, at=(0.0, 0.0, 0.0)):
    """Points [N, 3] on a block of `size` (m) that is turned by `yaw`."""
    axis = np.linspace(-0.5, 0.5, 9)
    grid = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3) * size
    turn = np.array([[np.cos(yaw), -np.sin(yaw), 0], [np.sin(yaw), np.cos(yaw), 0], [0, 0, 1]])
    return grid @ turn.T + at


def bowl(radius, handle=False):
    angles = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    heights = np.linspace(0, 0.05, 11)
    ring = radius * np.stack([np.cos(angles), np.sin(angles)], 1)
    points = np.concatenate([np.c_[ring, np.full(48, height)] for height in heights])
    if handle:
        points = np.concatenate([points, [[x, 0.0, 0.05] for x in radius + np.arange(1, 5) / 100]])
    return points + np.array([0.1, -0.2, 0.9])


@pytest.mark.parametrize("yaw_deg", [-60, 0, 25, 85])
def test_a_block_is_taken_across_its_narrow_side(yaw_deg):
    yaw = np.deg2rad(yaw_deg)
    grasp = across(block([0.12, 0.04, 0.1], yaw, at=(0.3, -0.1, 0.9)), NOTHING)
    assert abs(half_turn(grasp.yaw - yaw)) < np.deg2rad(6)
    assert grasp.width == pytest.approx(0.04, abs=0.01)
    near(grasp.centre[:2], [0.3, -0.1])
    assert grasp.centre[2] == pytest.approx(0.95 - 0.035)


def test_a_flat_thing_is_taken_at_half_its_height():
    grasp = across(block([0.08, 0.05, 0.03]), NOTHING)
    assert grasp.centre[2] == pytest.approx(0.0)


def test_an_obstacle_beside_the_narrow_side_turns_the_gripper():
    cube = block([0.05, 0.05, 0.06])
    wall = block([0.03, 0.01, 0.06], at=(0.0, 0.045, 0.0))
    free, beside = across(cube, NOTHING), across(cube, np.concatenate([wall, wall * [1, -1, 1]]))
    assert abs(free.yaw) < 0.1
    assert abs(abs(beside.yaw) - np.pi / 2) < 0.3


def test_a_thing_too_wide_says_so():
    assert across(block([0.2, 0.2, 0.1]), NOTHING).width > WIDEST_M


@pytest.mark.parametrize("handle", [False, True])
def test_a_vessel_is_taken_at_its_rim(handle):
    grasp = rim(bowl(0.06, handle), NOTHING, depth=0.02)
    assert np.linalg.norm(grasp.centre[:2] - [0.1, -0.2]) == pytest.approx(0.06, abs=0.003)
    assert grasp.centre[2] == pytest.approx(0.95 - 0.02)
    # The fingers close along the radius: one inside, one outside.
    closing = np.array([-np.sin(grasp.yaw), np.cos(grasp.yaw)])
    radial = grasp.centre[:2] - [0.1, -0.2]
    assert abs(closing @ radial) / np.linalg.norm(radial) == pytest.approx(1.0, abs=0.01)


def test_the_rim_is_taken_where_nothing_is_in_the_way():
    free = rim(bowl(0.06), NOTHING, depth=0.02)
    blocked = rim(bowl(0.06), block([0.04, 0.04, 0.1], at=free.centre), depth=0.02)
    assert np.linalg.norm(blocked.centre - free.centre) > 0.04


def test_a_second_attempt_differs_and_is_reproducible():
    cube = block([0.05, 0.05, 0.06])
    attempts = [across(cube, NOTHING, np.random.default_rng(seed)).yaw for seed in (0, 0, 1, 2, 3)]
    assert attempts[0] == attempts[1]
    assert len(set(attempts)) > 1


@pytest.mark.parametrize("angle", np.linspace(-7, 7, 29))
def test_half_turn_keeps_the_line_of_the_gripper(angle):
    wrapped = half_turn(angle)
    assert -np.pi / 2 <= wrapped < np.pi / 2
    assert np.sin(wrapped - angle) == pytest.approx(0.0, abs=1e-9)
