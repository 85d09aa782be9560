"""What a wrong convention costs: mini-oft with one mistake at a time, all tokens, the same scenes.

    python experiments/pitfalls.py --scenes 40

Each mistake runs without any error. Writes `results/pitfalls.csv`, continues one that is
there, and prints the table of docs/pitfalls.md.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

import vla_pruner as vp
from vla_pruner.episodes.control import Control
from vla_pruner.episodes.episode import run_episode
from vla_pruner.episodes.policy_runner import Answer, LocalPolicyRunner
from vla_pruner.measure.statistics import wilson
from vla_pruner.models.openvla import oft
from vla_pruner.scenes.suites import PICK_PLACE, open_suite

RESULTS = Path(__file__).parent / "results" / "pitfalls.csv"
Images, State = Sequence[np.ndarray], np.ndarray


def other_sign(state: State) -> State:
    """The same orientation from the quaternion's negative: axis-angle (3:6) past pi."""
    angle = max(float(np.linalg.norm(state[3:6])), 1e-6)
    turned = state.copy()
    turned[3:6] *= 1 - 2 * np.pi / angle
    return turned


def causal(embeds: Tensor, valid: Tensor | None) -> Tensor:
    """What Llama does by itself: each position sees those before it."""
    batch, length = embeds.shape[:2]
    low = torch.finfo(embeds.dtype).min
    return torch.full((length, length), low, dtype=embeds.dtype).triu(1).expand(batch, 1, -1, -1)


class Mistaken(LocalPolicyRunner):
    """A policy whose observations are changed before it sees them."""

    def __init__(
        self, policy: Any, arguments: dict[str, Any], change: Callable[[Images, State], Any]
    ) -> None:
        super().__init__(policy, None, arguments)
        self._change = change

    def act(self, images: Images, instruction: str, state: Any, *, picture: bool = False) -> Answer:
        images, state = self._change(images, state)
        return super().act(images, instruction, state, picture=picture)


def unseen(model: Any) -> AbstractContextManager[Any]:
    """Visual tokens are zeros: what an image that never reaches the decoder amounts to."""
    real = model.visual_embeds
    return mock.patch.object(model, "visual_embeds", lambda pixels: torch.zeros_like(real(pixels)))


Change = Callable[[Images, State], tuple[Images, State]]
MISTAKES: dict[str, dict[str, Any]] = {
    "none": {},
    "causal attention": {
        "within": lambda model: mock.patch.object(oft, "bidirectional_mask", causal)
    },
    "image never arrives": {"within": unseen},
    "gripper read as 0 and 1": {"gripper": "rlds"},
    "quaternion of the other sign": {"change": lambda images, s: (images, other_sign(s))},
    "state of zeros": {"change": lambda images, s: (images, np.zeros_like(s))},
    "cameras swapped": {"change": lambda images, s: (images[::-1], s)},
    "images upside down": {"change": lambda images, s: ([i[::-1, ::-1].copy() for i in images], s)},
    "BGR instead of RGB": {"change": lambda images, s: ([i[..., ::-1].copy() for i in images], s)},
    "no centre crop": {"arguments": {"center_crop": False}},
    "whole chunk of 8 carried out": {"execute": 8},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=40)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    policy: Any = vp.models.load("mini-oft", dtype=torch.float32)
    suite = open_suite(PICK_PLACE)
    scene = suite.open_scene()
    done = read(arguments.out)
    for name, mistake in MISTAKES.items():
        control = Control.of(policy, suite.cameras)
        for key in ("gripper", "execute"):
            if key in mistake:
                control = replace(control, **{key: mistake[key]})
        change: Change = mistake.get("change", lambda images, state: (images, state))
        runner = Mistaken(policy, control.arguments | mistake.get("arguments", {}), change)
        for seed in suite.held_out(arguments.scenes):
            if (name, seed) in done:
                continue
            with mistake.get("within", lambda model: nullcontext())(policy):
                episode = run_episode(
                    runner,
                    scene,
                    seed,
                    suite.task_of(seed),
                    control=control,
                    step_limit=suite.step_limit,
                )
            done[name, seed] = episode.success
            write(arguments.out, done)
    print("| mistake | solved |\n|---|---|")
    for name in MISTAKES:
        found = [solved for (what, _), solved in done.items() if what == name]
        interval = wilson(sum(found), len(found))
        print(
            f"| {name} | {sum(found)} of {len(found)} "
            f"({100 * interval.low:.0f}-{100 * interval.high:.0f} %) |"
        )


def read(file: Path) -> dict[tuple[str, int], bool]:
    """Success by mistake and scene; nothing where there is no file."""
    if not file.exists():
        return {}
    with file.open(newline="") as stream:
        rows = csv.DictReader(stream)
        return {(row["mistake"], int(row["seed"])): row["success"] == "True" for row in rows}


def write(file: Path, done: dict[tuple[str, int], bool]) -> None:
    """All rows; the old file stays until the new one is whole."""
    partial = file.with_suffix(".partial")
    with partial.open("w", newline="") as stream:
        out = csv.writer(stream, lineterminator="\n")
        out.writerow(("mistake", "seed", "success"))
        out.writerows((what, seed, solved) for (what, seed), solved in done.items())
    partial.replace(file)


if __name__ == "__main__":
    main()
