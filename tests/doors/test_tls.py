"""TLS with a certificate made here: who trusts it gets an answer, and nobody else does."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import subprocess
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from talking import ROBOT, ask, libero, near, seen

from vla_pruner.doors.act import ActDoor
from vla_pruner.doors.door import Listen
from vla_pruner.doors.keys import KEYS, with_gripper
from vla_pruner.doors.openpi import OpenpiDoor
from vla_pruner.doors.wire import from_json, to_json

pytest.importorskip("vla_pruner_client", reason="pip install ./clients/python")
from vla_pruner_client import Client, Lost


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1, signed by itself, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("the command openssl, which makes the certificate, is not installed")
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    made = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    made += ["-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    made += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)]
    subprocess.run(made, check=True, capture_output=True)
    return cert, key


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
def test_our_client_trusts_the_certificate_or_gets_nothing(
    served: Any, direct: Callable, files: tuple[Path, Path]
) -> None:
    cert, key = files
    trusting = ssl.create_default_context(cafile=str(cert))
    old = ssl.create_default_context(cafile=str(cert))
    old.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
    old.maximum_version = ssl.TLSVersion.TLSv1_1

    def inquire(url: str) -> Any:
        assert url.startswith("wss://")
        with Client(url, ssl=trusting, timeout_s=60) as client:
            actions = client.infer(libero(1)).actions
        for context in (ssl.create_default_context(), old):
            with Client(url, ssl=context, timeout_s=2) as client, pytest.raises(Lost):
                client.infer(libero(1))
        plain = url.replace("wss", "ws")
        with Client(plain, timeout_s=2) as client, pytest.raises(Lost):
            client.infer(libero(1))
        with Client(url, ssl=trusting, timeout_s=60) as client:  # the others did no harm
            again = client.infer(libero(1)).actions
        return actions, again

    async def talk(url: str) -> Any:
        return await asyncio.to_thread(inquire, url)

    def make(engine: Any) -> OpenpiDoor:
        return OpenpiDoor(engine, Listen(cert=cert, key=key), ROBOT, KEYS["libero"])

    wanted = with_gripper(direct([1])[0], "rlds", "robosuite")
    for actions in ask(served, make, talk):
        assert near([actions], [wanted])


def test_act_over_https(served: Any, direct: Callable, files: tuple[Path, Path]) -> None:
    cert, key = files
    row = seen(1)
    body = {
        "image": row["images"][0],
        "wrist_image": row["images"][1],
        "state": row["proprio"],
        "instruction": row["instruction"],
    }

    def inquire(url: str) -> Any:
        assert url.startswith("https://")
        context = ssl.create_default_context(cafile=str(cert))
        request = urllib.request.Request(
            url if url.endswith("/act") else url.rstrip("/") + "/act",
            data=to_json(body),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, context=context, timeout=60) as answer:
            found = from_json(answer.read())
        with pytest.raises(OSError, match="certificate"):
            urllib.request.urlopen(request, timeout=20)
        return found

    async def talk(url: str) -> Any:
        return await asyncio.to_thread(inquire, url)

    found = ask(served, lambda engine: ActDoor(engine, Listen(cert=cert, key=key), ROBOT), talk)
    assert near([found], direct([1]))


def test_a_key_that_is_of_another_certificate(files: tuple[Path, Path], tmp_path: Path) -> None:
    cert, _ = files
    other = tmp_path / "key.pem"
    subprocess.run(
        f"openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out {other}".split(),
        check=True,
        capture_output=True,
    )
    with pytest.raises(ValueError, match=r"no certificate and key"):
        Listen(cert=cert, key=other).tls()


def test_nobody_is_asked_for_a_pass_phrase(files: tuple[Path, Path], tmp_path: Path) -> None:
    cert, key = files
    locked = tmp_path / "locked.pem"
    command = f"openssl pkey -in {key} -aes128 -passout pass:secret -out {locked}"
    subprocess.run(command.split(), check=True, capture_output=True)
    with pytest.raises(ValueError, match="the key is encrypted: take the pass phrase off"):
        Listen(cert=cert, key=locked).tls()
    for missing in (tmp_path / "none.pem", tmp_path):
        with pytest.raises(ValueError, match="no certificate and key"):
            Listen(cert=missing, key=key).tls()
