"""Brightness, edges and patch means, pixel by pixel."""

from __future__ import annotations

import math

import pytest
import torch

from vla_pruner.pruning.frames import edges, grey, mean_over_patches, patch_size, patches


def image(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, generator=generator).float()


def test_patches_and_their_means_belong_together():
    frames = image(2, 3, 3, 8, 12)
    tokens = 3 * 2 * 3
    assert patch_size(frames, tokens) == 4
    means = mean_over_patches(grey(frames), tokens, 4)
    for row in range(2):
        for token, patch in enumerate(patches(frames, tokens)[row]):
            colours = patch.view(3, 16)
            bright = 0.299 * colours[0] + 0.587 * colours[1] + 0.114 * colours[2]
            assert float(means[row, token]) == pytest.approx(float(bright.mean()), rel=1e-5)
    with pytest.raises(ValueError, match="cannot be cut into 17 square patches"):
        patch_size(frames, 17)


def test_edges_are_sobel_gradients():
    bright = image(1, 2, 6, 7)[:, :, :, :]
    found = edges(bright)
    x = [[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]]
    for camera in range(2):
        for row in range(6):
            for column in range(7):
                across = down = 0.0
                for i in range(3):
                    for j in range(3):
                        r = min(max(row + i - 1, 0), 5)
                        c = min(max(column + j - 1, 0), 6)
                        value = float(bright[0, camera, r, c])
                        across += x[i][j] * value
                        down += x[j][i] * value
                expected = math.hypot(across, down)
                assert float(found[0, camera, row, column]) == pytest.approx(expected, rel=1e-4)
    assert edges(torch.full((1, 1, 5, 5), 7.0)).eq(0).all()


def test_edges_move_with_the_image():
    bright = torch.zeros(1, 1, 16, 16)
    bright[0, 0, 4:8, 4:8] = 200
    moved = bright.roll((4, 4), dims=(2, 3))
    assert torch.equal(edges(moved), edges(bright).roll((4, 4), dims=(2, 3)))
