"""`vla-pruner serve` and the arguments of the server: what fits is served, the rest refused."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vla_eval", reason="vla-eval is missing: pip install 'vla-pruner[serve]'")

from vla_pruner import cli
from vla_pruner.serving.server import PolicyServer


def test_the_shipped_policy_is_driven_as_its_folder_says() -> None:
    server = PolicyServer("mini-oft", "fastv", 0.5, "pickplace", {"layer": 2})
    server.served.close()
    assert server.chunk_size == 2
    assert server.translator.gripper == "robosuite"
    assert server.served.session.method.layer == 2


def test_other_policies_write_the_gripper_as_rlds_and_run_whole_chunks(oft: Any) -> None:
    server = PolicyServer(oft, keep=0.5, unnorm_key="libero_spatial")
    server.served.close()
    assert server.translator.gripper == "rlds"
    assert server.chunk_size == 4


def test_a_configuration_of_vla_eval_makes_the_server(tmp_path: Path) -> None:
    from jsonargparse import ActionConfigFile, ArgumentParser

    file = tmp_path / "server.yaml"
    file.write_text(
        "args: {policy: mini-oft, method: vla-pruner, keep: 64, benchmark: pickplace, "
        "options: {window: 2}, gripper: robosuite, max_batch_size: 4}"
    )
    parser = ArgumentParser()  # as `vla_eval.model_servers.serve.run_server` makes it
    parser.add_argument("--config", action=ActionConfigFile)
    parser.add_class_arguments(PolicyServer, nested_key="args", fail_untyped=False)
    server = PolicyServer(**parser.parse_args(["--config", str(file)]).args.as_dict())
    server.served.close()
    method = server.served.session.method
    assert (method.keep, method.window, server.max_batch_size) == (64, 2, 4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"benchmark": "libre"}, "no benchmark is called 'libre'; there are pickplace, libero"),
        ({"chunk_size": 9}, r"chunk_size=9: OpenVLAOFT gives 4 action\(s\) at a time"),
        ({"chunk_size": 0}, "at least 1"),
        ({"unnorm_key": None}, "choose one with --unnorm-key"),
        ({"gripper": "up"}, "gripper='up' is unknown; use robosuite or rlds"),
        ({"keep": 2.0}, "keep"),
        ({"method": "fastvv"}, "did you mean 'fastv'"),
        ({"method": "vla-adp"}, "clients do not report.*gate=none"),
    ],
)
def test_what_cannot_be_served_is_refused(
    open_server: Callable, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        open_server(**options)


def test_a_model_that_gives_no_actions_is_refused(make: Callable) -> None:
    with pytest.raises(ValueError, match="a LlamaForCausalLM has no `predict_actions"):
        PolicyServer(make(), keep=0.5)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--port", "99999"], "--port 99999"),
        (["--option", "window=1"], "say with --method what prunes"),
        (["--keep", "0.25"], "say with --method what prunes"),
        (["--method", "vla-pruner"], "--method vla-pruner: say with --keep how many"),
        (["--policy", "mini-ofd"], "no policy that ships here"),
        (["--benchmark", "metaworld"], "no benchmark is called 'metaworld'"),
        # Found before the policy, which is not there either.
        (["--policy", "mini-ofd", "--token-file", "none"], "none holds no token"),
        (["--policy", "mini-ofd", "--tls-cert", "a", "--tls-key", "b"], "no certificate and key"),
    ],
)
def test_bad_arguments_end_in_a_sentence(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["serve", *arguments]) == cli.BAD_INPUT
    assert said in capsys.readouterr().err


def test_a_taken_port_ends_in_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["serve", "--benchmark", "pickplace", "--port", str(port)]) == cli.FAILED
    assert f"cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err


def test_the_command_serves_until_it_is_interrupted() -> None:
    arguments = ["serve", "--benchmark", "pickplace", "--port", "0", "--method", "vla-pruner"]
    process = subprocess.Popen(
        [sys.executable, "-m", "vla_pruner", *arguments, "--keep", "0.25"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=Path(__file__).parents[2],
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    said = process.stdout.readline()
    while "serving mini-oft for pickplace, method vla-pruner@0.25: vla-eval on ws://" not in said:
        assert said, "the server ended before it listened"
        said = process.stdout.readline()
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=120)
    assert process.returncode == cli.INTERRUPTED, rest
    assert "Traceback" not in rest


def test_a_flow_policy_is_served_with_its_one_set_of_statistics() -> None:
    server = PolicyServer("mini-pi0", "fastv", 0.5, "pickplace")
    try:
        state = np.zeros(8)
        image = np.zeros((160, 160, 3), np.uint8)
        seen = {"images": [image, image], "instruction": "put the can in its bin", "proprio": state}
        actions = server.served.act([server.served.start("a")], [seen])
    finally:
        server.served.close()
    assert actions.shape == (1, 8, 7) and np.isfinite(actions).all()
    with pytest.raises(ValueError, match="--unnorm-key action: this policy has no statistics"):
        PolicyServer("mini-pi0", "fastv", 0.5, "pickplace", unnorm_key="action")
