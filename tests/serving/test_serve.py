"""`vla-pruner serve` and the arguments of the server: what fits is served, the rest refused."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vla_eval", reason="vla-eval is missing: pip install 'vla-pruner[serve]'")

from vla_pruner import cli
from vla_pruner.commands import serve
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


@pytest.fixture
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object) -> None:
        raise AssertionError("the policy was loaded before the arguments were read")

    monkeypatch.setattr(serve, "_load", load)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--port 99999", "--port 99999"),
        ("--port 1000000000000000000000", "--port 1000000000000000000000"),
        ("--host=", "--host is empty"),
        ("--option window=1", "say with --method what prunes"),
        ("--keep 0.25", "say with --method what prunes"),
        ("--method vla-pruner", "--method vla-pruner: say with --keep how many"),
        ("--benchmark metaworld", "no benchmark is called 'metaworld'"),
        ("--benchmark=", "no benchmark is called ''"),
        ("--device cuda:x", "--device cuda:x"),
        ("--capture fast", "--capture fast: there are"),
        ("--token-file none", "none holds no token"),
        ("--tls-cert a --tls-key b", "no certificate and key"),
        ("--tls-cert a", "TLS takes two files"),
        ("--protocol gr00t --tls-cert CERT --tls-key KEY", "no certificate|ZeroMQ"),
        ("--ladder x", "--ladder: say with --deadline-ms"),
        ("--ladder nowhere --deadline-ms 100", "nowhere cannot be read as a receipt"),
        ("--ladder FILE --deadline-ms 100", "cannot be read as a receipt"),
        ("--watchdog-s 5", "add --replicas or --ray"),
        ("--ray-gpus 1", "say with --ray"),
        ("--keys droid", "--keys is for the door openpi: add --protocol openpi"),
        ("--fps 30", "--fps is for the door lerobot"),
        ("--jpeg --protocol act", "--jpeg is for the door vla-eval"),
        ("--benchmark libero --protocol act", "--benchmark is for the door vla-eval"),
        ("--protocol openpi --keys nowhere", "--keys 'nowhere': choose libero, droid, aloha"),
        ("--protocol openpi --keys FILE", "must say `cameras` and `state`"),
        ("--protocol gr00t --modalities nowhere", "nowhere cannot be read"),
        ("--protocol gr00t --modalities FILE", "must say `video` and `state`"),
        ("--protocol lerobot", "say --accept-lerobot-pickles"),
        ("--protocol lerobot --accept-lerobot-pickles --cameras a,a", "something twice"),
        ("--protocol lerobot --accept-lerobot-pickles --cameras=", "or nothing"),
        (
            "--protocol lerobot --accept-lerobot-pickles --token-file FILE",
            "holds? .*token|one word",
        ),
    ],
)
def test_what_means_nothing_ends_in_a_sentence_before_anything_is_loaded(
    arguments: str, said: str, tmp_path: Path, nothing_is_loaded: None, capsys: Any
) -> None:
    (tmp_path / "file").touch()
    words = arguments.replace("FILE", str(tmp_path / "file")).split()
    free = [] if "--port" in words or "--protocol" in words else ["--port", "0"]
    assert cli.main(["serve", *words, *free]) == cli.BAD_INPUT
    assert re.search(said, capsys.readouterr().err)


@pytest.mark.parametrize("value", ["-1", "0", "nan", "inf", "1e300", "x", " "])
@pytest.mark.parametrize(
    "option",
    [
        "batch",
        "deadline-ms",
        "watchdog-s",
        "max-text",
        "max-pixels",
        "max-episodes",
        "max-connections",
        "idle-s",
        "fps",
        "chunk-size",
    ],
)
def test_numbers_of_the_server_are_read_first(
    option: str, value: str, nothing_is_loaded: None, capsys: Any
) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["serve", f"--{option}={value}"])
    assert end.value.code == cli.BAD_INPUT
    assert f"argument --{option}:" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    ["--wait-ms=-1", "--replicas=-1", "--replicas=1e9", "--ray-gpus=nan", "--port=x", "--ray=here"],
)
def test_numbers_that_may_be_0_are_read_first(
    words: str, nothing_is_loaded: None, capsys: Any
) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["serve", words])
    assert end.value.code == cli.BAD_INPUT and words.split("=")[0] in capsys.readouterr().err


def test_a_policy_that_is_not_there_ends_in_a_sentence(capsys: Any) -> None:
    assert cli.main(["serve", "--policy", "mini-ofd"]) == cli.BAD_INPUT
    assert "no policy that ships here" in capsys.readouterr().err


def test_a_host_that_is_not_this_machine_is_refused_before_anything_is_loaded(
    nothing_is_loaded: None, capsys: Any
) -> None:
    assert cli.main(["serve", "--host", "192.0.2.1"]) == cli.FAILED
    assert "cannot listen on 192.0.2.1:8000" in capsys.readouterr().err


def test_a_taken_port_ends_in_a_sentence(nothing_is_loaded: None, capsys: Any) -> None:
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
    limit = threading.Timer(300, process.kill)
    limit.start()
    said = process.stdout.readline()
    while "serving mini-oft for pickplace, method vla-pruner@0.25: vla-eval on ws://" not in said:
        assert said, "the server ended before it listened"
        said = process.stdout.readline()
    limit.cancel()
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
