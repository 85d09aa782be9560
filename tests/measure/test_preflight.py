"""Conventions that fail without an error are found before anything is measured."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import vla_pruner as vp
from vla_pruner.episodes.control import gripper_of
from vla_pruner.measure import doctor
from vla_pruner.measure.costs import COSTS
from vla_pruner.measure.doctor import Finding, act_of
from vla_pruner.measure.preflight import preflight
from vla_pruner.models.base import find_adapter
from vla_pruner.models.openvla import oft

ROOT = Path(__file__).parents[2]


def findings_of(
    name: str, said: dict[str, Any], folder: Path | None = None, model: Any = None
) -> dict[str, Finding]:
    model = model or vp.models.load(name)
    adapter = find_adapter(model)
    adapter.bind(model)
    found = preflight(model, adapter, act_of(model, name, "pick it up"), said, folder)
    return {one.check: one for one in found}


def test_a_policy_that_ships_passes() -> None:
    found = findings_of("mini-oft", {"cameras": ["agentview", "wrist"]})
    assert {one.well for one in found.values()} == {True}, found
    assert found["gripper"].found == "+1 close, -1 open by its range"
    assert "tokens see" in found["attends in the direction it was trained in"].found


def test_token_by_token_policies_are_causal() -> None:
    found = findings_of("mini-openvla", {})["attends in the direction it was trained in"]
    assert found.well and "do not see" in found.found


def test_a_chunk_policy_that_became_causal(monkeypatch: pytest.MonkeyPatch) -> None:
    def causal(embeds: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
        length = embeds.shape[1]
        low = torch.finfo(embeds.dtype).min
        return torch.full((1, 1, length, length), low, dtype=embeds.dtype).triu(1)

    monkeypatch.setattr(oft, "bidirectional_mask", causal)
    found = findings_of("mini-oft", {})["attends in the direction it was trained in"]
    assert found.well is False and "7 of 40" in found.cost and "vp.models.load" in found.advice


def test_a_gripper_that_is_read_the_other_way() -> None:
    found = findings_of("mini-oft", {"gripper": "rlds"})["gripper"]
    assert found.well is False and "'robosuite'" in found.advice


def test_cameras_that_do_not_agree_in_number() -> None:
    found = findings_of("mini-oft", {"cameras": ["agentview"]})["cameras"]
    assert found.well is False and "reads 2" in found.found


def test_weights_that_are_not_numbers() -> None:
    model: Any = vp.models.load("mini-oft")
    with torch.no_grad():
        model.action_head.model.fc2.bias[3] = float("nan")
    adapter = find_adapter(model)
    adapter.bind(model)
    (found,) = [
        one
        for one in preflight(model, adapter, lambda frame: None, {}, None)
        if one.check == "weights are finite"
    ]
    assert found.well is False and "fc2.bias" in found.found


def test_another_major_version_of_transformers(tmp_path: Path) -> None:
    said = {"model_type": "llava", "transformers_version": "4.40.1"}
    (tmp_path / "config.json").write_text(json.dumps(said))
    found = findings_of("mini-oft", {}, tmp_path)["transformers"]
    assert found.well is None and "4.40.1" in found.found
    said = {"model_type": "openvla", "transformers_version": "4.40.1"}
    (tmp_path / "config.json").write_text(json.dumps(said))
    assert findings_of("mini-oft", {}, tmp_path)["transformers"].well


def test_statistics_from_0_to_1_say_how_the_gripper_is_driven_where_nobody_else_did() -> None:
    model: Any = vp.models.load("mini-oft")
    action = model.config.norm_stats["pick_place"]["action"]
    action["q01"], action["q99"] = [*action["q01"][:-1], 0.0], [*action["q99"][:-1], 1.0]
    found = findings_of("mini-oft", {}, model=model)["gripper"]
    assert found.well and "0 close, 1 open" in found.found
    assert gripper_of(model, {}, None, otherwise="robosuite") == "rlds"
    assert gripper_of(model, {"gripper": "robosuite"}, None, otherwise="rlds") == "robosuite"
    whole: Any = vp.models.load("mini-oft")
    assert gripper_of(whole, {}, None, otherwise="robosuite") == "robosuite"
    assert gripper_of(object(), {}, None, otherwise="rlds") == "rlds"


def test_signs_of_a_rotation_that_were_seen() -> None:
    assert "both signs" in findings_of("mini-oft", {})["state"].found
    assert "one sign" in findings_of("mini-oft-libero", {})["state"].found


def test_every_check_says_what_a_mistake_costs_as_it_was_measured() -> None:
    source = Path(doctor.__file__).parent
    code = "".join((source / name).read_text("utf-8") for name in ("doctor.py", "preflight.py"))
    code += (source.parent / "commands" / "doctor.py").read_text("utf-8")
    names = re.findall(r'(?:Finding\(\s*|check = |_exact\()"([^"]+)"', code)
    assert len(set(names)) > 15 and set(names) == set(COSTS)
    with (ROOT / "experiments" / "results" / "pitfalls.csv").open(newline="") as file:
        rows = [(row["mistake"], row["success"] == "True") for row in csv.DictReader(file)]
    checked = 0
    for cost in COSTS.values():
        for what, solved, scenes in re.findall(r"([^:;]+): (\d+) of (\d+)", cost):
            mistake = what.strip().replace("an image that never arrives", "image never arrives")
            mistake = mistake.replace("without a session the ", "")
            found = [success for name, success in rows if name == mistake]
            assert (sum(found), len(found)) == (int(solved), int(scenes)), what
            checked += 1
    assert checked > 8
