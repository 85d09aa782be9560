"""The colours of all pages, light and dark, and what people with two kinds of cones see of them."""

from __future__ import annotations

from itertools import combinations

import numpy as np

PAPER = {"light": "#faf9f6", "dark": "#131417"}
"""Behind everything."""

SERIES = {
    "light": ("#0b6fb0", "#d9690d", "#730b0b", "#a68563", "#7716d9", "#592449"),
    "dark": ("#6cbcf7", "#f08c2e", "#f2c291", "#8c6238", "#8d49f2", "#1c6b8c"),
}
"""Of lines, in turn. The first two are also those of the semantic and of the action score."""

VISION = {
    "three kinds of cones": np.eye(3),
    "protanopia": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
    "deuteranopia": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
    "tritanopia": np.array(
        [
            [1.255528, -0.076749, -0.178779],
            [-0.078411, 0.930809, 0.147602],
            [0.004733, 0.691367, 0.303900],
        ]
    ),
}
"""Linear RGB as it looks: Machado, Oliveira and Fernandes 2009, severity 1."""

_XYZ = np.array(
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
)
"""Linear sRGB to CIE XYZ under D65."""
_WHITE = _XYZ.sum(axis=1)


def closest(colours: tuple[str, ...], vision: str) -> float:
    """The smallest CIE 1976 distance of any two colours, as seen; 2.3 is just noticeable.

    Args:
        colours: "#rrggbb", two or more.
        vision: a key of `VISION`.
    """
    seen = [_lab(VISION[vision] @ _linear(colour)) for colour in colours]
    return min(float(np.linalg.norm(a - b)) for a, b in combinations(seen, 2))


def contrast(first: str, second: str) -> float:
    """Contrast ratio of WCAG 2, 1 to 21; graphics need 3, text 4.5."""
    dark, bright = sorted(float(_XYZ[1] @ _linear(colour)) for colour in (first, second))
    return (bright + 0.05) / (dark + 0.05)


def _linear(colour: str) -> np.ndarray:
    """ "#rrggbb" as linear RGB in [0, 1]."""
    value = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def _lab(linear: np.ndarray) -> np.ndarray:
    """Linear RGB as CIE L*a*b*."""
    share = _XYZ @ np.clip(linear, 0, 1) / _WHITE
    root = np.where(share > 0.008856, np.cbrt(share), 7.787 * share + 16 / 116)
    return np.array([116 * root[1] - 16, 500 * (root[0] - root[1]), 200 * (root[1] - root[2])])
