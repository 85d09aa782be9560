"""The reference task in words and numbers: objects, instructions, seeds, limits; no simulator."""

from __future__ import annotations

OBJECT_NAMES = ("milk", "bread", "cereal box", "can")
"""The objects by target index; every scene holds all four."""

INSTRUCTION_TEMPLATES = (
    "pick up the {object} and place it in its bin",
    "put the {object} in its bin",
    "take the {object} and put it into its bin",
    "grasp the {object} and move it to its bin",
    "move the {object} into the bin where it belongs",
    "place the {object} in the bin it belongs to",
)
"""Template 0 is the instruction of the benchmark; the others are paraphrases for training."""

CAMERAS = ("agentview", "wrist")
IMAGE_SIZE = 160
"""Images are `[IMAGE_SIZE, IMAGE_SIZE, 3]`."""

ACTION_DIM = 7
PROPRIO_DIM = 8
