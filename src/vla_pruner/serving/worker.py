"""Who runs the policy: this process, one of its own, or a Ray actor; the last two are replaced."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import signal
import socket
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from vla_pruner._short import cut, word
from vla_pruner.serving.ladder import Rung
from vla_pruner.serving.limits import RateLimit, Refused
from vla_pruner.serving.policy import EpisodeKey, ServedPolicy, Step

logger = logging.getLogger(__name__)

START_S = 300.0
"""Seconds that a process may take to load its policy and to warm up."""

KILLED_S = 10.0
"""Seconds in which a killed process is gone, but for one that hangs in the kernel."""

Rows = Sequence[tuple[int, str, Mapping[str, Any]]]
"""Number and label of an episode, and its observation."""


class Hung(RuntimeError):
    """The worker hung or died and was replaced; the episode starts anew."""


class Failed(RuntimeError):
    """The policy gave no usable answer; the episode may go on."""


class Worker(Protocol):
    """Runs passes of one policy; called by one thread at a time."""

    def start(self) -> tuple[bool, int]:
        """Warm up. Whether an episode's first step runs on all tokens; entries of an action."""

    def step(self, rows: Rows, rung: Rung | None, ended: Sequence[int]) -> list[Step | Exception]:
        """One pass, after forgetting episodes that ended. Raises Hung: call `start` again."""

    def abandon(self) -> None:
        """End a pass that is under way, if that can be done; from any thread."""

    def close(self) -> None:
        """Give everything back."""


class Here:
    """A policy in this process; nothing ends a pass that hangs."""

    def __init__(self, served: ServedPolicy) -> None:
        self.served = served
        self._keys: dict[int, EpisodeKey] = {}

    def start(self) -> tuple[bool, int]:
        width = 0
        key, blank = self.served.start("warm-up"), self.served.blank()
        first = self.served.warm_up(key)
        if blank is not None:
            for _ in range(8):  # Until a pass has pruned: what is compiled, is compiled now.
                step = self.served.step([key], [blank])[0]
                width = step.actions.shape[-1]
                if not step.warm_up_next:
                    self.served.step([key], [blank])
                    break
            self.served.end(key)
        return first, width

    def step(self, rows: Rows, rung: Rung | None, ended: Sequence[int]) -> list[Step | Exception]:
        for number in ended:
            if (key := self._keys.pop(number, None)) is not None:
                self.served.end(key)
        if rung is not None:
            self.served.change(rung.method, rung.keep, rung.options)
        keys = [self._keys.setdefault(n, self.served.start(label)) for n, label, _ in rows]
        return self._isolated(keys, [seen for *_, seen in rows])

    def _isolated(self, keys: list[EpisodeKey], seen: list[Any]) -> list[Step | Exception]:
        """A pass; where it fails, each row by itself, so that only the one at fault has none."""
        if not keys:
            return []
        try:
            steps = self.served.step(keys, seen)
        except Exception as error:
            if len(keys) == 1:
                return [_typed(error)]
            return [self._isolated([key], [row])[0] for key, row in zip(keys, seen, strict=True)]
        return [step if np.isfinite(step.actions).all() else _broken() for step in steps]

    def abandon(self) -> None:
        """A thread cannot be ended."""

    def close(self) -> None:
        for key in self._keys.values():
            self.served.end(key)
        self._keys.clear()


class Apart:
    """A policy in a process of its own, killed when a pass takes longer than it may."""

    def __init__(self, make: Callable[[], ServedPolicy], watchdog_s: float = 30.0) -> None:
        """Nothing is started yet.

        Args:
            make: gives the policy, in the other process; picklable.
            watchdog_s: seconds that a pass may take.
        """
        self._make, self._watchdog_s = make, watchdog_s
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self._context = context
        self._process: Any = None
        self._pipe: Any = None

    def start(self) -> tuple[bool, int]:
        self.close()
        self._pipe, theirs = self._context.Pipe()
        self._process = self._context.Process(
            target=_apart, args=(theirs, self._make), daemon=True, name="vla-pruner policy"
        )
        try:
            self._begin(self._process)
        except Exception:  # A process that comes later finds its pipe closed, and goes.
            self._pipe.close()
            self._process = self._pipe = None
            raise
        finally:
            theirs.close()
        found = self._answer(START_S, "start")
        if isinstance(found, Exception):
            self.close()
            raise found
        return found

    def _begin(self, process: Any) -> None:
        """Begin in time: the first process of all waits until what it copies has imported."""
        failed: list[Exception] = []

        def begin() -> None:
            try:
                process.start()
            except Exception as error:  # no memory, or a `make` that cannot be pickled
                failed.append(error)

        beginning = threading.Thread(target=begin, daemon=True, name="vla-pruner start")
        beginning.start()
        beginning.join(START_S)
        if beginning.is_alive():
            failed.append(Hung(f"no process began within {START_S:g} s: the machine is too busy"))
        if failed:
            raise failed[0]

    def step(self, rows: Rows, rung: Rung | None, ended: Sequence[int]) -> list[Step | Exception]:
        if self._process is None:
            raise self._lost("is gone")
        with self._killed_after(self._watchdog_s):  # A process that does not read leaves us here.
            try:
                self._pipe.send((rows, rung, ended))
            except OSError as error:
                raise self._lost(f"is gone ({error})") from None
        found = self._answer(self._watchdog_s, "answer")
        if isinstance(found, Exception):
            raise found
        return found

    def _answer(self, seconds: float, what: str) -> Any:
        try:
            if self._pipe.poll(seconds):
                with self._killed_after(self._watchdog_s):  # It may stop within its answer.
                    return self._pipe.recv()
        except (EOFError, OSError):
            raise self._lost("died") from None
        raise self._lost(f"did not {what} within {seconds:g} s")

    @contextlib.contextmanager
    def _killed_after(self, seconds: float) -> Iterator[None]:
        watchdog = threading.Timer(seconds, self._process.kill)
        watchdog.daemon = True
        watchdog.start()
        try:
            yield
        finally:
            watchdog.cancel()

    def _lost(self, what: str) -> Hung:
        self.close()
        return Hung(f"the policy's process {what} and is replaced; start the episode anew")

    def abandon(self) -> None:
        if (process := self._process) is not None and process.pid is not None:
            process.kill()

    def close(self) -> None:
        if (process := self._process) is not None:
            if process.pid is not None:  # else it has not begun
                process.kill()
                process.join(KILLED_S)
            self._pipe.close()
        self._process = self._pipe = None


def _apart(pipe: Any, make: Callable[[], ServedPolicy]) -> None:
    """The other process: answer until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one that started it.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    logger.addFilter(RateLimit())
    with contextlib.suppress(EOFError, OSError, KeyboardInterrupt):
        try:
            here = Here(make())
            pipe.send(here.start())
        except Exception as error:
            pipe.send(RuntimeError(f"the policy cannot be served: {_said(error)}"))
            return
        while True:
            rows, rung, ended = pipe.recv()
            try:
                found: Any = here.step(rows, rung, ended)
            except Exception as error:
                found = _typed(error)
            pipe.send(found)


class OnRay:
    """A policy in an actor of a Ray cluster, on a node that has room; replaced as in `Apart`."""

    def __init__(
        self,
        make: Callable[[], ServedPolicy],
        watchdog_s: float = 30.0,
        *,
        address: str = "auto",
        gpus: float = 0.0,
    ) -> None:
        """Nothing is started yet.

        Args:
            make: gives the policy, on its node; picklable.
            watchdog_s: seconds that a pass may take.
            address: of the cluster; "auto" is the one on this machine.
            gpus: that the actor reserves; it reserves one CPU, too.
        """
        self._make, self._watchdog_s = make, watchdog_s
        self._address, self._gpus = address, gpus
        self._actor: Any = None

    def start(self) -> tuple[bool, int]:
        import ray

        self.close()
        join_cluster(self._address)
        placed = {"num_cpus": 1, "num_gpus": self._gpus, "scheduling_strategy": "SPREAD"}
        self._actor = ray.remote(_OnNode).options(**placed).remote(self._make)
        found = self._answer(self._actor.start.remote(), START_S, "start")
        if isinstance(found, Exception):
            self.close()
            raise found
        return found

    def step(self, rows: Rows, rung: Rung | None, ended: Sequence[int]) -> list[Step | Exception]:
        if self._actor is None:
            raise self._lost("is gone")
        asked = self._actor.step.remote(list(rows), rung, list(ended))
        found = self._answer(asked, self._watchdog_s, "answer")
        if isinstance(found, Exception):
            raise found
        return found

    def _answer(self, asked: Any, seconds: float, what: str) -> Any:
        import ray

        try:
            return ray.get(asked, timeout=seconds)
        except ray.exceptions.GetTimeoutError:
            raise self._lost(f"did not {what} within {seconds:g} s") from None
        except ray.exceptions.RayError as error:  # the actor, its node, or what was sent is gone
            raise self._lost(f"died ({cut(str(error), 80)})") from None

    def _lost(self, what: str) -> Hung:
        self.close()
        return Hung(f"the policy's actor {what} and is replaced; start the episode anew")

    def abandon(self) -> None:
        if (actor := self._actor) is not None:
            import ray

            ray.kill(actor, no_restart=True)

    def close(self) -> None:
        with contextlib.suppress(Exception):  # its node may be gone
            self.abandon()
        self._actor = None


class _OnNode:
    """What runs on a node."""

    def __init__(self, make: Callable[[], ServedPolicy]) -> None:
        self._make = make
        self._here: Here | None = None

    def start(self) -> Any:
        """As `Here.start`, or why not."""
        try:
            self._here = Here(self._make())
            return self._here.start()
        except Exception as error:
            return RuntimeError(f"the policy cannot be served: {_said(error)}")

    def step(self, rows: Rows, rung: Rung | None, ended: Sequence[int]) -> Any:
        """As `Here.step`, or why not."""
        assert self._here is not None
        try:
            return self._here.step(rows, rung, ended)
        except Exception as error:
            return _typed(error)


_joining = threading.Lock()


def join_cluster(address: str) -> None:
    """Be a driver of a Ray cluster; once per process.

    Raises:
        RuntimeError: nobody answers there.
        ModuleNotFoundError: Ray is not installed.
    """
    import ray

    with _joining:
        if ray.is_initialized():
            return
        host, _, port = address.removeprefix("ray://").rpartition(":")
        try:
            if port.isdecimal():  # Ray itself would try for minutes
                socket.create_connection((host, int(port)), timeout=10).close()
            ray.init(address=address, log_to_driver=False)
        except OSError as error:  # ConnectionError among them
            raise RuntimeError(
                f"no Ray cluster answers at {word(address)} ({error}); start one with "
                "`ray start --head`, or give the address of its head"
            ) from error


def _said(error: Exception) -> str:
    return cut(f"{type(error).__name__}: {error}", 400)


def _typed(error: Exception) -> Exception:
    """What a client is told of an error of the policy."""
    if isinstance(error, ValueError | TypeError):
        return Refused(cut(str(error), 400))
    number = uuid.uuid4().hex[:8]
    logger.warning("the policy failed (%s): %s", number, _said(error))
    return Failed(f"the policy failed ({number}): {_said(error)}")


def _broken() -> Exception:
    return Failed("the policy's actions are NaN or infinite: none is given")
