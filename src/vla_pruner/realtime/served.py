"""A policy behind openpi's door in a process of its own, started and ended from here."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from vla_pruner._short import cut
from vla_pruner.episodes.condition import ALL_TOKENS, Condition

START_S = 600.0
"""Seconds that a server may take to load its policy and to warm up."""


def served_by(policy: str, condition: Condition, *, device: str, more: list[str]) -> list[str]:
    """The command that serves a policy under a condition, at any free port."""
    words = ["serve", "--policy", policy, "--device", device, "--protocol", "openpi:0"]
    words += ["--method", condition.method]
    if condition.keep is not None:
        words += ["--keep", str(condition.keep)]
    for name, value in condition.options:
        words += ["--option", f"{name}={value}"]
    return [sys.executable, "-m", "vla_pruner", *words, *more]


class Served(contextlib.AbstractContextManager["Served"]):
    """`vla-pruner serve` in a process.

    Args:
        policy, condition: what is served.
        device: where it runs.
        more: further arguments of `serve`.

    Raises:
        RuntimeError: it does not start; the sentence ends with what it said.
    """

    def __init__(
        self,
        policy: str,
        condition: Condition,
        *,
        device: str = "cpu",
        more: list[str] | None = None,
    ) -> None:
        self.name = condition.name if condition.method != "none" else ALL_TOKENS
        self._log = tempfile.NamedTemporaryFile("w+", suffix=".log")  # noqa: SIM115
        command = served_by(policy, condition, device=device, more=more or [])
        self.process = subprocess.Popen(command, stdout=self._log, stderr=subprocess.STDOUT)
        try:
            self.url = self._address()
        except BaseException:  # Ctrl-C, too: nobody else would end it
            self.kill()
            raise

    def _address(self) -> str:
        until = time.monotonic() + START_S
        while time.monotonic() < until:
            said = Path(self._log.name).read_text("utf-8", "replace")
            if found := re.search(r"openpi on (wss?://\S+)", said):
                return found[1]
            if self.process.poll() is not None:
                raise RuntimeError(f"the server of {self.name} ended: {cut(said.strip(), 2000)}")
            time.sleep(0.1)
        raise RuntimeError(f"the server of {self.name} did not start in {START_S:g} s")

    def kill(self) -> None:
        """As when the machine loses power."""
        self.process.kill()
        self.process.wait()

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.kill()
        self._log.close()
