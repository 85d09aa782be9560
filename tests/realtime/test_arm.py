"""A simulated arm that does not wait: ticks by the clock, what is told, and a dead server."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[2] / "clients" / "python" / "src"))
pytest.importorskip("websockets", reason="pip install 'vla-pruner[doors]'")
if find_spec("robosuite") is None:  # Importing it here would choose how MuJoCo draws.
    pytest.skip("pip install 'vla-pruner[sim]'", allow_module_level=True)

from vla_pruner_client import Answer, Lost

from vla_pruner.cli import main
from vla_pruner.episodes.condition import Condition
from vla_pruner.episodes.control import Control
from vla_pruner.realtime import arm, served
from vla_pruner.realtime.arm import Asked, Camera, Pace, Trial, WatchedClient, run_trial
from vla_pruner.realtime.served import Served, served_by
from vla_pruner.realtime.table import HEADS, film, table
from vla_pruner.scenes.pick_place import PickPlaceScene

CONTROL = Control(("agentview", "wrist"), 2, reads_state=True)
SEED = 1_000_000


@pytest.fixture(scope="module")
def scene() -> Any:
    made = PickPlaceScene()
    yield made
    made.close()


class Scripted(WatchedClient):
    """Chunks of four moves upwards, `waits[n]` seconds after question n; then nothing."""

    def __init__(self, answers: int) -> None:
        super().__init__("ws://127.0.0.1:9", timeout_s=0.2)
        self.left, self.seen = answers, []  # type: ignore[var-annotated]

    def infer(self, observation: Mapping[str, Any], *, deadline_s: float | None = None) -> Answer:
        self.seen.append(dict(observation))
        if not self.left:
            self.lost += 1
            raise Lost("nobody")
        self.left -= 1
        actions = np.zeros((4, 7), np.float32)
        actions[:, 2], actions[:, 6] = 0.3, 1.0
        self.answers.append(Asked(0.01, False, self.standing))
        return Answer(actions, False, 4)


def test_the_time_of_a_pace() -> None:
    assert (Pace().ticks, Pace().speed) == (5, 1.0)
    assert (Pace(25, 25).ticks, Pace(25, 25).speed) == (1, 5.0)
    with pytest.raises(ValueError, match="whole ticks"):
        Pace(25, 10)
    with pytest.raises(ValueError, match="divisor of 50"):
        Pace(20, 5)


def test_parts_of_a_step_are_a_step(scene: Any) -> None:
    action = np.array([0.4, 0.2, -0.3, 0, 0, 0.1, -1.0])
    ends = []
    for parts in (1, 5):
        scene.reset(SEED, 0)
        for part in range(parts):
            scene.advance(action, 50 // parts, again=part > 0)
        ends.append(scene.proprio())
    assert np.abs(ends[0] - ends[1]).max() < 1e-3
    scene.reset(SEED, 0)
    scene.step(action)
    assert np.array_equal(scene.proprio(), ends[0])


def test_it_moves_holds_and_tells(scene: Any, tmp_path: Path) -> None:
    client, hands = Scripted(2), []

    def ticked(trial: Trial) -> bool:
        hands.append(scene.pose()[0])
        return trial.held >= 20 and len(trial.ages_ms) == 8 and client.lost > 0

    trial = run_trial(
        scene,
        client,
        SEED,
        0,
        control=CONTROL,
        pace=Pace(25, 25),
        step_limit=2000,
        condition="scripted",
        max_age_s=600,
        film=True,
        ticked=ticked,
    )
    assert len(trial.ages_ms) == 8 and min(trial.ages_ms) > 0 and not trial.success
    assert trial.ticks == trial.before + 8 + trial.held == len(trial.states)
    assert trial.lost > 0 and trial.motion is not None and trial.motion["hand_path"] > 0.1
    assert client.seen[0]["observation/image"].shape == (160, 160, 3)
    assert set(client.seen[0]) == {
        "observation/image",
        "observation/wrist_image",
        "observation/state",
        "prompt",
    }
    still = np.array(hands[-8:])
    assert hands[-1][2] - hands[0][2] > 0.1
    assert np.abs(still - still[0]).max() < 0.005  # It holds.
    assert json.loads(json.dumps(trial.as_dict()))["answers"][0]["stood"] is True
    film(tmp_path / "film.webp", scene, [trial, trial])
    from PIL import Image

    with Image.open(tmp_path / "film.webp") as picture:
        assert picture.size == (640, 320) and picture.n_frames > 3  # type: ignore[attr-defined]


def test_a_camera_that_nobody_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arm, "CAMERA_S", 0.05)
    with pytest.raises(ConnectionError, match=r"0\.05 s"):
        Camera().look()
    camera = Camera()
    threading.Timer(0.02, camera.close).start()
    monkeypatch.setattr(arm, "CAMERA_S", 20)
    with pytest.raises(ConnectionError, match="closed"):
        camera.look()


def test_the_table_says_what_happened() -> None:
    def made(name: str, seed: int, success: bool, held: int, seconds: float) -> Trial:
        motion = {"seconds": 4.0, "hand_path": 1.5, "hand_jerk": 9.0, "joint_path": None}
        motion |= {"joint_jerk": None, "action_rate": 0.1, "gripper_switches": 1}
        asked = [
            Asked(2 * seconds, False, True, True),
            Asked(seconds, False, held > 0, False),
            Asked(seconds, True, False, False),
        ]
        return Trial(seed, name, 25.0, success, 100, held, 10, 0, 0, [80.0, 120.0], asked, motion)

    trials = [made("none", n, n < 2, 45, 0.6) for n in range(4)]
    trials += [made("vla-pruner@0.25", n, n < 3, 0, 0.3) for n in range(4)]
    lines = table(trials, ["none", "vla-pruner@0.25"]).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert rows[0] == ["condition", *HEADS]
    full, pruned = (dict(zip(rows[0], row, strict=True)) for row in rows[2:])
    assert full["solved"] == "2 of 4 (15-85 %)" and full["difference"] == "-"
    assert full["stood still, % of ticks"] == "50.0" and pruned["stood still, % of ticks"] == "0.0"
    assert pruned["difference"].startswith("+25 (")
    assert full["answers: late, lost, of"] == "8, 0, 12"
    assert pruned["answers: late, lost, of"] == "4, 0, 12"
    assert pruned["answer, ms: median, warm-up"] == "300, 600"
    assert pruned["age of actions, ms: median, p95"] == "100, 120"
    row = trials[0].as_row()
    assert (row["late"], row["answers"], row["age_ms"], row["answer_ms"]) == (2, 3, "100", "600")
    assert pruned["hand path, m"] == "1.5 (1.00x)" and full["first action after, s"] == "0.40"


def test_what_is_started() -> None:
    condition = Condition.parse("vla-pruner@0.25:window=1")
    words = served_by("mini-oft", condition, device="cpu", more=["--gripper", "rlds"])
    assert " ".join(words[3:]) == (
        "serve --policy mini-oft --device cpu --protocol openpi:0 --method vla-pruner --keep 0.25 "
        "--option window=1 --gripper rlds"
    )


def test_a_server_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys; sys.exit('no such policy')"
    monkeypatch.setattr(served, "served_by", lambda *_, **__: [sys.executable, "-c", code])
    with pytest.raises(RuntimeError, match=r"server of none ended: no such policy"):
        Served("x", Condition())


def test_the_server_is_killed_in_mid_chunk(scene: Any) -> None:
    """mini-oft behind the real door: the rest of the chunk is carried out, then the arm holds."""
    hands: list[np.ndarray] = []
    grips: list[float] = []
    killed: list[int] = []
    with Served("mini-oft", Condition.parse("vla-pruner@0.25")) as server:

        def ticked(trial: Trial) -> bool:
            hands.append(scene.pose()[0])
            grips.append(float(scene.proprio()[6]))
            if len(trial.ages_ms) == 3 and not killed:
                killed.append(trial.held)
                server.kill()
                client.timeout_s = 1.0
            return bool(killed) and trial.held >= killed[0] + 30

        client = WatchedClient(server.url, timeout_s=120)
        trial = run_trial(
            scene,
            client,
            SEED,
            0,
            control=CONTROL,
            pace=Pace(25, 12.5),
            step_limit=100_000,
            max_age_s=600,
            ticked=ticked,
        )
    assert killed and len(trial.ages_ms) >= 3 and trial.answers
    assert not trial.success
    still = np.array(hands[-8:])
    assert np.abs(still - still[0]).max() < 0.005
    assert abs(grips[-1] - grips[-8]) < 0.005


def test_refusals(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["realtime", "--hz", "20"]) == 2
    assert "divisor of 50" in capsys.readouterr().err
    for option, value in (("--max-age-s", "0"), ("--max-age-s", "nan"), ("--deadline-ms", "-4")):
        with pytest.raises(SystemExit):
            main(["realtime", f"{option}={value}"])
        assert f"argument {option}: {value} is no number" in capsys.readouterr().err
    assert main(["realtime", "--url", "ws://x", "--conditions", "none", "vla-pruner@0.5"]) == 2
    assert "--url is one server" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "vla_pruner_client", None)
    assert main(["realtime"]) == 1
    assert "pip install ./clients/python" in capsys.readouterr().err


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two scenes under two conditions in turn, with servers that are scripted."""
    from vla_pruner.commands import realtime

    urls: list[str] = []

    class Fake:
        def __init__(self, policy: str, condition: Condition, **_: Any) -> None:
            self.url = condition.name

        def __enter__(self) -> Fake:
            return self

        def __exit__(self, *_: object) -> None:
            urls.append("closed")

    def client(url: str, **_: Any) -> Scripted:
        urls.append(url)
        return Scripted(3)

    monkeypatch.setattr(served, "Served", Fake)
    monkeypatch.setattr(arm, "WatchedClient", client)
    monkeypatch.setattr("vla_pruner.scenes.suites.pick_place", None, raising=False)
    suite = SimpleNamespace(
        cameras=("agentview", "wrist"),
        held_out=lambda episodes, first: list(range(SEED, SEED + episodes)),
        open_scene=PickPlaceScene,
        task_of=lambda seed: seed % 4,
        step_limit=10,
    )
    monkeypatch.setattr("vla_pruner.scenes.suites.open_suite", lambda name: suite)
    out = str(tmp_path / "out")
    assert main(["realtime", "--episodes", "2", "--actions-hz", "25", "--out", out]) == 0
    assert urls == ["none", "vla-pruner@0.25"] * 3 + ["closed"] * 2
    found = json.loads((tmp_path / "out" / "realtime.json").read_text())
    assert [one["ticks"] for one in found["trials"]] == [10] * 4
    rows = (tmp_path / "out" / "episodes.csv").read_text().splitlines()
    assert rows[0].startswith("suite,condition,seed,success,ticks,") and len(rows) == 5
    assert rows[1].startswith("robosuite_pickplace+clock25,none,")
    assert found["about"]["speed"] == 5 and found["about"]["cpu"]
    assert "| `vla-pruner@0.25` | 0 of 2" in (tmp_path / "out" / "realtime.md").read_text()
    assert "Results:" in capsys.readouterr().out
    assert realtime.run.__doc__
