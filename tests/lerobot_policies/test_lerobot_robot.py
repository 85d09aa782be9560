"""The policy type `pruned` on a robot: what it shows, `lerobot-rollout`, the async client."""

from __future__ import annotations

import copy
import os
import runpy
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("lerobot.rollout", reason="needs lerobot 0.6 or newer; run `make test-lerobot`")

from lerobot.configs.policies import PreTrainedConfig
from simulated_arm import JOINTS, SimulatedArm, SimulatedArmConfig
from tiny_lerobot import batch_of, pi

import vla_pruner as vp
import vla_pruner.lerobot
from vla_pruner.lerobot import PrunedConfig, PrunedPolicy

ROOT = Path(__file__).parents[2]
SERVER_PYTHON = os.environ.get("VLA_PRUNER_PYTHON")


@pytest.fixture(scope="module")
def flows():
    """pi0 and pi0.5 with tiny random weights."""
    made = {}
    for name in ("pi0", "pi05"):
        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            made[name] = pi(patch, name)
    return made


# -- what it shows ---------------------------------------------------------------------------------
def test_it_shows_what_it_prunes(checkpoint):
    inner = PreTrainedConfig.from_pretrained(checkpoint)
    shown = PrunedConfig(device="cpu", pretrained_path=checkpoint, overrides={"n_action_steps": 2})
    assert shown.type == "pruned"
    assert shown.input_features == inner.input_features and len(inner.image_features) == 2
    assert shown.output_features == inner.output_features
    assert (shown.use_amp, shown.use_peft) == (inner.use_amp, inner.use_peft)
    assert (shown.n_action_steps, inner.n_action_steps) == (2, 3)
    assert shown.action_delta_indices == inner.action_delta_indices
    with pytest.raises(AttributeError, match="no_such_option"):
        _ = shown.no_such_option
    assert copy.deepcopy(shown).input_features == inner.input_features


def test_actions_go_to_the_joints_that_were_trained(tmp_path):
    from lerobot.policies.pi05.configuration_pi05 import PI05Config
    from lerobot.rollout.context import _resolve_action_key_order

    robot, trained = JOINTS[:7], JOINTS[:7][::-1]
    PI05Config(device="cpu", action_feature_names=trained).save_pretrained(tmp_path)
    shown = PrunedConfig(device="cpu", pretrained_path=tmp_path)
    assert _resolve_action_key_order(list(shown.action_feature_names), robot) == trained


def test_amp_and_peft_are_those_of_the_policy(tmp_path):
    from lerobot.policies.pi05.configuration_pi05 import PI05Config

    PI05Config(device="cpu", use_peft=True, use_amp=True).save_pretrained(tmp_path)
    shown = PrunedConfig(device="cpu", pretrained_path=tmp_path)
    assert shown.use_peft and shown.use_amp


def test_what_lerobot_sets_here_reaches_the_policy(tmp_path):
    from lerobot.policies.pi05.configuration_pi05 import PI05Config

    PI05Config(device="cpu").save_pretrained(tmp_path)
    shown = PrunedConfig(device="cpu", pretrained_path=tmp_path)
    shown.compile_model = True
    assert shown.inner(tmp_path).compile_model is True


def test_it_loads_as_lerobots_servers_load(checkpoint):
    policy = PrunedPolicy.from_pretrained(checkpoint)
    chunk = policy.predict_action_chunk(batch_of(1, 56))
    assert chunk.shape == (2, 6, 7) and torch.isfinite(chunk).all()


def test_options_of_the_method(checkpoint, monkeypatch):
    made = []
    monkeypatch.setattr(vla_pruner.lerobot, "prune", lambda policy, method: made.append(method))
    config = PrunedConfig(
        device="cpu", pretrained_path=checkpoint, keep=8, options={"window": 1, "alpha": 0.25}
    )
    PrunedPolicy.from_pretrained(checkpoint, config=config)
    assert (made[0].keep, made[0].window, made[0].alpha) == (8, 1, 0.25)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"keep": 0}, "would drop every visual token"),
        ({"keep": float("nan")}, "is not in"),
        ({"keep": 8.5}, "is not in"),
        ({"method": "fastvv", "keep": 0.5}, "did you mean 'fastv'"),
        ({"method": "fastv@0.5", "keep": 0.25}, "say it once"),
        ({"layer": -1}, "layer=-1"),
        ({"options": {"windw": 1}}, "has no option 'windw'"),
        ({"overrides": {"n_action_step": 2}}, "smolvla has no option 'n_action_step'"),
        ({"overrides": {"type": "pi0"}}, "smolvla has no option 'type'"),
    ],
)
def test_what_means_nothing_is_refused_before_a_policy_is_loaded(checkpoint, options, said):
    with pytest.raises(ValueError, match=said):
        PrunedConfig(device="cpu", pretrained_path=checkpoint, **options)


def test_all_tokens_are_all_however_it_is_written():
    assert [PrunedConfig(keep=keep).build().keep for keep in (1, 1.0, 8, 8.0)] == [1.0, 1.0, 8, 8]


def test_overrides_may_be_of_any_kind(tmp_path):
    from lerobot.policies.pi05.configuration_pi05 import PI05Config

    PI05Config(device="cpu").save_pretrained(tmp_path)
    given = {"compile_model": True, "action_feature_names": ["j1", "j2"], "rtc_config": None}
    given |= {"dtype": "bfloat16", "num_inference_steps": 3}
    shown = PrunedConfig(device="cpu", pretrained_path=tmp_path, overrides=given)
    assert {name: getattr(shown, name) for name in given} == given
    assert shown.inner(tmp_path).num_inference_steps == 3


def test_a_policy_without_features_gets_those_that_lerobot_finds(tmp_path):
    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot.policies.pi05.configuration_pi05 import PI05Config

    PI05Config(device="cpu", input_features={}, output_features={}).save_pretrained(tmp_path)
    shown = PrunedConfig(device="cpu", pretrained_path=tmp_path)
    assert shown.input_features == {}
    found = {"observation.state": PolicyFeature(FeatureType.STATE, (8,))}
    shown.input_features = found  # as `make_policy` does
    assert shown.inner(tmp_path).input_features == found


def test_a_pruned_configuration_is_not_pruned_again(tmp_path):
    (tmp_path / "config.json").write_text('{"type": "pruned", "device": "cpu"}')
    with pytest.raises(ValueError, match='of the type "pruned"'):
        PrunedConfig(device="cpu", pretrained_path=tmp_path)


def test_its_distribution_is_found_without_flags(tmp_path):
    """As installed: a folder with the metadata of `lerobot_policy_pruned` beside its package."""
    info = tmp_path / "lerobot_policy_pruned-0.2.0.dist-info"
    info.mkdir()
    named = (ROOT / "packages/lerobot_policy_pruned/pyproject.toml").read_text("utf-8")
    assert 'name = "lerobot_policy_pruned"' in named
    (info / "METADATA").write_text(
        "Metadata-Version: 2.4\nName: lerobot_policy_pruned\nVersion: 0.2.0\n"
    )
    code = (
        "from lerobot.utils.import_utils import register_third_party_plugins as find; find()\n"
        "from lerobot.configs.policies import PreTrainedConfig\n"
        "assert 'pruned' in PreTrainedConfig.get_known_choices()"
    )
    path = [tmp_path, ROOT / "packages/lerobot_policy_pruned/src", ROOT / "src"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=300)


# -- how it runs -----------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["pi0", "pi05"])
@pytest.mark.parametrize(
    ("method", "keep"), [("vla-pruner", 0.25), ("vla-pruner", 1.0), ("fastv", 0.25)]
)
def test_under_autocast(flows, name, method, keep):
    policy = flows[name]
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        whole = policy.predict_action_chunk(batch_of(4, 56))
    with vp.prune(policy, method, keep=keep) as session, torch.autocast("cpu", torch.bfloat16):
        for step in range(5):
            torch.manual_seed(0)
            chunk = policy.predict_action_chunk(batch_of(step, 56))
    assert torch.isfinite(chunk).all()
    assert session.last.visual_kept == (8 if keep < 1 else 32)
    assert torch.equal(chunk, whole) == (keep == 1.0)


def test_resets_come_from_another_thread(flows):
    """As from lerobot's RTC engine."""
    policy, stop = flows["pi05"], threading.Event()

    def resets():
        while not stop.is_set():
            policy.reset()
            time.sleep(0.0005)

    with vp.prune(policy, keep=0.25):
        thread = threading.Thread(target=resets)
        thread.start()
        try:
            for step in range(60):
                assert torch.isfinite(policy.predict_action_chunk(batch_of(step, 56))).all()
        finally:
            stop.set()
            thread.join()


def test_another_tools_function_is_not_kept(flows, monkeypatch):
    import transformers.models.gemma.modeling_gemma as code

    original, calls = code.eager_attention_forward, []

    def other(*args, **options):
        calls.append(1)
        return original(*args, **options)

    policy = flows["pi05"]
    monkeypatch.setattr(code, "eager_attention_forward", other)
    with vp.prune(policy, keep=0.25):
        policy.predict_action_chunk(batch_of(0, 56))
    monkeypatch.undo()
    calls.clear()
    with vp.prune(policy, keep=0.25):
        policy.predict_action_chunk(batch_of(0, 56))
    assert calls == []


# -- lerobot-rollout -------------------------------------------------------------------------------
OPTIONS = (
    "--robot.type=simulated_arm",
    "--policy.device=cpu",
    "--device=cpu",
    "--policy.keep=8",
    "--task=pick up the can",
    "--fps=5",
    "--duration=4",
    "--play_sounds=false",
    "--return_to_initial_position=false",
)


def rollout(monkeypatch, checkpoint, *options, seconds=4):
    """Actions that the command sends."""
    from lerobot.scripts import lerobot_rollout

    SimulatedArm.sent.clear()
    chosen = ["--policy.type=pruned", f"--policy.pretrained_path={checkpoint}"]
    others = [option for option in OPTIONS if not option.startswith("--duration=")]
    words = ["lerobot-rollout", *chosen, *others, f"--duration={seconds}", *options]
    monkeypatch.setattr(sys, "argv", words)
    lerobot_rollout.main()
    return list(SimulatedArm.sent)


@pytest.mark.parametrize("inference", ["sync", "rtc"])
def test_a_rollout(monkeypatch, checkpoint, inference):
    sessions = []
    original = vla_pruner.lerobot.prune
    monkeypatch.setattr(
        vla_pruner.lerobot, "prune", lambda *a: sessions.append(original(*a)) or sessions[-1]
    )
    more = {"sync": (), "rtc": ("--inference.rtc.execution_horizon=4",)}[inference]
    for seconds in (4, 60):  # a busy machine carries out fewer actions in its time
        sessions.clear()
        sent = rollout(
            monkeypatch, checkpoint, f"--inference.type={inference}", *more, seconds=seconds
        )
        if len(sent) > 3:
            break
    assert len(sent) > 3 and set(sent[0]) == set(JOINTS[:7])
    assert sessions[0].last.visual_kept < sessions[0].last.visual_full


def test_the_example(monkeypatch, checkpoint):
    SimulatedArm.sent.clear()
    example = str(ROOT / "examples" / "lerobot_rollout.py")
    monkeypatch.setattr(sys, "argv", [example, str(checkpoint), *OPTIONS])
    runpy.run_path(example, run_name="__main__")
    assert len(SimulatedArm.sent) > 3


def test_a_rollout_without_a_camera_is_refused_before_it_moves(monkeypatch, checkpoint):
    with pytest.raises(ValueError, match="Visual feature mismatch"):
        rollout(monkeypatch, checkpoint, "--robot.views=a,wrist")
    assert SimulatedArm.sent == []


# -- lerobot's asynchronous client -----------------------------------------------------------------
@pytest.mark.skipif(
    SERVER_PYTHON is None, reason="VLA_PRUNER_PYTHON: an interpreter with our doors"
)
def test_its_async_client_at_our_door(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # it writes its logs where it is
    from lerobot.async_inference.configs import RobotClientConfig
    from lerobot.async_inference.robot_client import RobotClient

    command = [SERVER_PYTHON, "-m", "vla_pruner", "serve", "--policy", "mini-oft", "--method"]
    command += ["vla-pruner", "--keep", "0.25", "--protocol", "lerobot:0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    server = subprocess.Popen(
        [*command, "--accept-lerobot-pickles"], stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        line = server.stdout.readline()
        address = line.split("lerobot on ")[1].split()[0]
        config = RobotClientConfig(
            policy_type="smolvla",
            pretrained_name_or_path="named/and/not/loaded",
            robot=SimulatedArmConfig(size=64),
            actions_per_chunk=8,
            task="pick up the milk",
            server_address=address,
            fps=20,
        )
        SimulatedArm.sent.clear()
        client = RobotClient(config)
        assert client.start()
        receiver = threading.Thread(target=client.receive_actions, daemon=True)
        control = threading.Thread(target=client.control_loop, args=(config.task,), daemon=True)
        receiver.start()
        control.start()
        until = time.monotonic() + 120
        while len(SimulatedArm.sent) < 40 and time.monotonic() < until:
            time.sleep(0.1)
        client.stop()
        control.join(10)
        assert len(SimulatedArm.sent) >= 40
        assert all(
            torch.isfinite(torch.tensor(list(each.values()))).all() for each in SimulatedArm.sent
        )
    finally:
        server.terminate()
        assert server.wait(60) == 0
