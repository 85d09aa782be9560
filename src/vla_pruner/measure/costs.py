"""What a mistake costs that `doctor` looks for, by the name of its check.

Scenes solved are those of mini-oft, all tokens, one mistake at a time, of 40 or 20 that it solves
(experiments/pitfalls.py, docs/pitfalls.md).
"""

from __future__ import annotations

UNMEASURED = "not measured"

COSTS = {
    "model family": "no session attaches: nothing is pruned",
    "acts on a frame": "there is no action at all",
    "visual tokens are where expected": "words leave instead of image tokens; an image that never "
    "arrives: 0 of 20 solved",
    "visual tokens in a session": "without a session the image never arrives: 0 of 20 solved",
    "the image reaches the action": "an image that never arrives: 0 of 20 solved",
    "same attention kernel when pruned": "the kernel's own time and rounding pass for pruning's",
    "keep=1.0 changes nothing": "the baseline of every comparison is another model",
    "dropping equals hiding": "actions are wrong beyond what was dropped; in success: "
    + UNMEASURED,
    "can be pruned": "nothing is pruned",
    "undone without a trace": "later figures are of a model that pruning has changed",
    "weights are finite": "no action: one that is not finite is refused, never sent",
    "attends in the direction it was trained in": "causal attention: 7 of 40 solved",
    "cameras": "cameras swapped: 0 of 20 solved; BGR instead of RGB: 0 of 20",
    "statistics": "actions in another dataset's units; in success: " + UNMEASURED,
    "gripper": "gripper read as 0 and 1: 0 of 20 solved",
    "state": "quaternion of the other sign: 18 of 20 solved; state of zeros: 0 of 20",
    "images": "images upside down: 0 of 20 solved; no centre crop: 20 of 20",
    "transformers": "causal attention: 7 of 40 solved; an image that never arrives: 0 of 20",
    "receipt": "a budget that was found safe for another policy",
}
