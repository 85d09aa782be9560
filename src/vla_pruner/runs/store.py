"""Finished episodes in a SQLite file: one row each, written by one process, never lost or doubled.

    sqlite3 RUN/episodes.sqlite "SELECT suite, condition, avg(success) FROM episodes GROUP BY 1, 2"

An episode is written in one transaction when it has finished, so that an interruption at any moment
leaves either all of it or nothing.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from vla_pruner._short import short
from vla_pruner.episodes.condition import Condition
from vla_pruner.episodes.episode import Episode
from vla_pruner.measure.statistics import median
from vla_pruner.runs.job import Job, Planned, Setup
from vla_pruner.runs.replay import TimedReplay

FILE = "episodes.sqlite"
VERSION = 1

_ADDED = {
    "held": "INTEGER",  # steps in which the robot held still, with `--live`
    "motion": "TEXT",  # JSON: how the robot moved
}
"""Columns of `episodes` that older files do not have."""

_REPLAY_COLUMNS = ("latency_ms", "warm_up", "peak_mb", "flops", "decoder_flops")

_SCHEMA = """
CREATE TABLE setups (           -- what must be the same for episodes to be comparable
    suite TEXT NOT NULL, policy TEXT NOT NULL, setup TEXT NOT NULL,
    PRIMARY KEY (suite, policy)
);
CREATE TABLE plan (             -- what was asked for, in the order of the report's rows
    suite TEXT NOT NULL, policy TEXT NOT NULL, condition TEXT NOT NULL,
    method TEXT NOT NULL, keep, options TEXT NOT NULL,
    settings TEXT NOT NULL,     -- all options of the method, defaults included
    recipe TEXT,                -- digest of the calibration recipe, where the method follows one
    first INTEGER NOT NULL, episodes INTEGER NOT NULL,
    PRIMARY KEY (suite, policy, condition)
);
CREATE TABLE environments (id INTEGER PRIMARY KEY, stamp TEXT NOT NULL);
CREATE TABLE episodes (
    suite TEXT NOT NULL, task TEXT NOT NULL, initial_state INTEGER NOT NULL, seed INTEGER NOT NULL,
    policy TEXT NOT NULL, weights TEXT NOT NULL,
    condition TEXT NOT NULL, method TEXT NOT NULL, keep, options TEXT NOT NULL, recipe TEXT,
    target INTEGER NOT NULL, instruction TEXT NOT NULL,
    success INTEGER NOT NULL, steps INTEGER NOT NULL,
    policy_calls INTEGER NOT NULL, warm_up_calls INTEGER NOT NULL,
    tokens INTEGER NOT NULL, visual INTEGER NOT NULL, visual_kept INTEGER NOT NULL,
    full_macs INTEGER NOT NULL,  -- of all calls together, without pruning
    prefill_macs INTEGER NOT NULL,
    median_ms REAL NOT NULL,
    calls TEXT NOT NULL,        -- JSON: a list per column, one entry per call of the policy
    stand_in_assets INTEGER NOT NULL,
    version TEXT NOT NULL, git TEXT, environment INTEGER NOT NULL REFERENCES environments (id),
    finished TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%SZ', 'now')),
    PRIMARY KEY (suite, policy, condition, seed)
);
"""

_REPLAYS = """
CREATE TABLE IF NOT EXISTS replays (  -- `vla-pruner latency`: the same observations in turn
    suite TEXT NOT NULL, policy TEXT NOT NULL, condition TEXT NOT NULL,
    scene INTEGER NOT NULL, round INTEGER NOT NULL,
    calls TEXT NOT NULL,        -- JSON: latency_ms, warm_up, peak_mb (null: unknown), per call
    environment INTEGER NOT NULL REFERENCES environments (id),
    PRIMARY KEY (suite, policy, condition, scene, round)
)
"""


class Store:
    """The episodes of a run folder.

    Args:
        folder: of the run; its file is `episodes.sqlite`.
        write: False only reads, also while another process writes.

    Raises:
        FileNotFoundError: nothing to read.
        ValueError: the file is none of ours, or of a newer version.
        RuntimeError: another process writes to it.
    """

    def __init__(self, folder: str | Path, *, write: bool = False) -> None:
        self.path = Path(folder) / FILE
        self._lock: int | None = None
        self._environment: int | None = None
        self._stamp: Mapping[str, Any] = {}
        if self.path.exists() and not self.path.is_file():
            raise ValueError(f"{self.path} is no file; move it away")
        if write:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = self._take_lock()
        elif not self.path.exists():
            raise FileNotFoundError(
                f"{folder} holds no {FILE}; make it with `vla-pruner eval` or `vla-pruner sweep`"
            )
        how = "mode=rwc" if write else self._how_to_read()
        self._base = sqlite3.connect(
            f"{self.path.resolve().as_uri()}?{how}", uri=True, isolation_level=None
        )
        self._base.row_factory = sqlite3.Row
        try:
            self._open(write)
        except BaseException:
            self.close()
            raise

    def _how_to_read(self) -> str:
        """How SQLite is to open the file: beside one that is written to it makes files of its own.

        Raises:
            RuntimeError: newer episodes lie in another file, and the folder cannot be written to.
        """
        folder, wal = self.path.parent, self.path.with_name(FILE + "-wal")
        if os.access(folder, os.W_OK) and not _read_only(folder):
            return "mode=ro"
        if wal.exists() and wal.stat().st_size:
            raise RuntimeError(
                f"{folder} is read-only, and the newest episodes are in {wal.name}, which SQLite "
                "has to merge first; copy the folder to where you may write, and read it there"
            )
        return "mode=ro&immutable=1"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        self._base.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _take_lock(self) -> int:
        """Held until this process closes it or dies, however it dies."""
        lock = os.open(self.path.with_name(FILE + ".lock"), os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise RuntimeError(
                f"another process is writing to {self.path}; wait for it, or choose another "
                "folder with --out"
            ) from None
        return lock

    def _open(self, write: bool) -> None:
        try:
            version = self._base.execute("PRAGMA user_version").fetchone()[0]
            empty = not self._base.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        except sqlite3.DatabaseError as error:
            raise ValueError(
                f"{self.path} is damaged or no SQLite file ({error}); move it away"
            ) from error
        if empty and not write:
            raise ValueError(
                f"{self.path} holds no episodes yet; `vla-pruner eval` or `vla-pruner sweep` makes "
                "some"
            )
        if version > VERSION or (version == 0 and not empty):
            raise ValueError(
                f"{self.path} has format {version}, this version of vla-pruner reads {VERSION}"
            )
        if write:
            self._base.execute("PRAGMA journal_mode = WAL")
            self._base.execute("PRAGMA synchronous = FULL")
            if empty:
                with self._transaction():
                    for statement in _SCHEMA.split(";"):
                        self._base.execute(statement)
                    self._base.execute(f"PRAGMA user_version = {VERSION}")
            with self._transaction():
                self._base.execute(_REPLAYS)
                there = {row["name"] for row in self._base.execute("PRAGMA table_info(episodes)")}
                for name, kind in _ADDED.items():
                    if name not in there:
                        self._base.execute(f"ALTER TABLE episodes ADD COLUMN {name} {kind}")

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """All or nothing. Raises OSError: it could not be written, such as on a full disk."""
        try:
            self._base.execute("BEGIN IMMEDIATE")
            yield
            self._base.execute("COMMIT")
        except BaseException as error:
            if self._base.in_transaction:
                self._base.execute("ROLLBACK")
            if isinstance(error, sqlite3.OperationalError):
                raise OSError(
                    f"cannot write to {self.path}: {error}. All episodes before this one are "
                    "kept; make room and run the same command again"
                ) from error
            raise

    # -- writing -----------------------------------------------------------------------------------

    def begin(self, planned: Sequence[Planned], stamp: Mapping[str, Any]) -> None:
        """Note what is going to be run, and on what.

        Raises:
            ValueError: the file holds episodes of other weights, settings or recipes by the same
                name.
        """
        self._stamp = dict(stamp)
        with self._transaction():
            for item in planned:
                self._plan(item)
            self._environment = self._base.execute(
                "INSERT INTO environments (stamp) VALUES (?)", [json.dumps(self._stamp)]
            ).lastrowid

    def _plan(self, item: Planned) -> None:
        setup, condition = item.setup, item.condition
        key = [setup.suite, setup.policy]
        found = self._one("SELECT setup FROM setups WHERE suite = ? AND policy = ?", key)
        if found is not None:
            before = Setup.from_dict(json.loads(found)).as_dict()
            self._agree(before, setup.as_dict(), f"policy {setup.policy} in {setup.suite}")
        self._base.execute(
            "INSERT OR IGNORE INTO setups VALUES (?, ?, ?)", [*key, json.dumps(setup.as_dict())]
        )
        key.append(condition.name)
        where = "WHERE suite = ? AND policy = ? AND condition = ?"
        settings = json.dumps({"recipe": item.recipe, **item.settings}, default=str)
        found = self._one(f"SELECT settings FROM plan {where}", key)
        if self._one(f"SELECT count(*) FROM episodes {where}", key):
            before = json.loads(found)  # a method may have got options since
            wanted = {name: v for name, v in json.loads(settings).items() if name in before}
            self._agree(before, wanted, condition.name)
        self._base.execute(
            "INSERT INTO plan VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) "
            "ON CONFLICT DO UPDATE SET settings = excluded.settings, recipe = excluded.recipe, "
            "first = excluded.first, episodes = excluded.episodes",
            [*key, *_condition_values(condition), settings, item.recipe, item.first, item.episodes],
        )

    def _agree(self, before: Mapping[str, Any], wanted: Mapping[str, Any], what: str) -> None:
        """Refuse to mix episodes that do not compare."""
        for name in wanted:
            if before[name] != wanted[name]:
                raise ValueError(
                    f"{self.path} holds episodes of {what} with another {name} "
                    f"({short(before[name])} instead of {short(wanted[name])}); continue with the "
                    "same one, or choose another folder with --out"
                )

    def _one(self, query: str, values: Sequence[Any]) -> Any:
        row = self._base.execute(query, values).fetchone()
        return None if row is None else row[0]

    def add(self, job: Job, episode: Episode) -> None:
        """Keep a finished episode; `begin` comes first.

        Raises:
            OSError: it cannot be written.
            sqlite3.IntegrityError: it is there already.
        """
        planned, setup, calls = job.planned, job.setup, episode.calls
        method, keep, options = _condition_values(planned.condition)
        values = {
            "suite": setup.suite,
            "task": setup.tasks[episode.target],
            "initial_state": job.suite.initial_state_of(job.seed),
            "seed": episode.seed,
            "policy": setup.policy,
            "weights": setup.weights,
            "condition": episode.condition,
            "method": method,
            "keep": keep,
            "options": options,
            "recipe": planned.recipe,
            "target": episode.target,
            "instruction": episode.instruction,
            "success": episode.success,
            "steps": episode.steps,
            "policy_calls": len(calls),
            "warm_up_calls": sum(call.warm_up for call in calls),
            "tokens": calls[0].tokens,
            "visual": calls[0].visual,
            "visual_kept": min(call.visual_kept for call in calls),
            "full_macs": sum(call.full_macs for call in calls),
            "prefill_macs": sum(call.prefill_macs for call in calls),
            "median_ms": median([call.latency_ms for call in calls]),
            "calls": json.dumps(episode.as_dict()["calls"], separators=(",", ":")),
            "held": episode.held,
            "motion": None if episode.motion is None else json.dumps(episode.motion),
            "stand_in_assets": setup.stand_in_assets,
            "version": str(self._stamp.get("vla-pruner")),
            "git": self._stamp.get("commit"),
            "environment": self._environment,
        }
        marks = ", ".join("?" * len(values))
        with self._transaction():
            self._base.execute(
                f"INSERT INTO episodes ({', '.join(values)}) VALUES ({marks})", [*values.values()]
            )

    def keep_replays(self, setup: Setup, replays: Sequence[TimedReplay]) -> None:
        """Keep what was timed of a policy in a suite, in place of what was before.

        Raises:
            OSError: it cannot be written.
        """
        key = [setup.suite, setup.policy]
        with self._transaction():
            self._base.execute("DELETE FROM replays WHERE suite = ? AND policy = ?", key)
            for one in replays:
                calls = {name: getattr(one, name) for name in _REPLAY_COLUMNS}
                self._base.execute(
                    "INSERT INTO replays VALUES (?, ?, ?, ?, ?, ?, ?)",
                    [
                        *key,
                        one.condition,
                        one.scene,
                        one.round,
                        json.dumps(calls),
                        self._environment,
                    ],
                )

    def drop(self, conditions: Sequence[str]) -> int:
        """Forget conditions: what was planned, run and timed of them. Returns their episodes.

        Raises:
            ValueError: one that the file does not hold.
            OSError: it cannot be written.
        """
        there = {row[0] for row in self._base.execute("SELECT condition FROM plan")}
        if unknown := [name for name in conditions if name not in there]:
            raise ValueError(
                f"{self.path} holds no condition {', '.join(unknown)}; there are "
                f"{', '.join(sorted(there)) or 'none'}"
            )
        marks = ", ".join("?" * len(conditions))
        where = f"WHERE condition IN ({marks})"
        with self._transaction():
            count = self._one(f"SELECT count(*) FROM episodes {where}", conditions)
            for name in ("episodes", "replays", "plan"):
                self._base.execute(f"DELETE FROM {name} {where}", list(conditions))
        return int(count)

    # -- reading -----------------------------------------------------------------------------------

    def finished(self, setup: Setup) -> set[tuple[str, int]]:
        """Condition name and seed of every finished episode of a policy in a suite."""
        return {
            (row["condition"], row["seed"])
            for row in self._base.execute(
                "SELECT condition, seed FROM episodes WHERE suite = ? AND policy = ?",
                [setup.suite, setup.policy],
            )
        }

    def tally(self, item: Planned) -> tuple[int, int]:
        """Solved and finished episodes of a policy in a suite, under one condition."""
        row = self._base.execute(
            "SELECT coalesce(sum(success), 0), count(*) FROM episodes "
            "WHERE suite = ? AND policy = ? AND condition = ?",
            [item.setup.suite, item.setup.policy, item.condition.name],
        ).fetchone()
        return int(row[0]), int(row[1])

    def planned(self) -> list[Planned]:
        """Everything that was asked for, in the order it was asked for."""
        setups = {
            (row["suite"], row["policy"]): Setup.from_dict(json.loads(row["setup"]))
            for row in self._base.execute("SELECT * FROM setups")
        }
        return [
            Planned(
                setups[row["suite"], row["policy"]],
                Condition(row["method"], row["keep"], tuple(json.loads(row["options"]).items())),
                json.loads(row["settings"]),
                row["recipe"],
                row["first"],
                row["episodes"],
            )
            for row in self._base.execute("SELECT * FROM plan ORDER BY rowid")
        ]

    def episodes(
        self, setup: Setup, conditions: Sequence[Condition], seeds: Sequence[int] | None = None
    ) -> list[Episode]:
        """The finished episodes of a policy in a suite, scene by scene.

        Args:
            setup: the policy and the suite.
            conditions: those wanted, in the order wanted within a scene.
            seeds: scenes wanted; None: all.
        """
        there = {row["name"] for row in self._base.execute("PRAGMA table_info(episodes)")}
        names = [f.name for f in fields(Episode) if f.name in there - {"calls", "motion"}]
        rank = {condition.name: number for number, condition in enumerate(conditions)}
        found = [
            Episode.from_dict(
                {name: row[name] for name in names}
                | {"success": bool(row["success"]), "calls": json.loads(row["calls"])}
                | {"motion": _motion(row) if "motion" in there else None}
            )
            for row in self._base.execute(
                "SELECT * FROM episodes WHERE suite = ? AND policy = ?", [setup.suite, setup.policy]
            )
            if row["condition"] in rank and (seeds is None or row["seed"] in seeds)
        ]
        return sorted(found, key=lambda episode: (episode.seed, rank[episode.condition]))

    def environments(self) -> list[dict[str, Any]]:
        """The stamps under which finished episodes were run."""
        return [
            json.loads(row["stamp"])
            for row in self._base.execute(
                "SELECT stamp FROM environments WHERE id IN (SELECT environment FROM episodes)"
            )
        ]

    def replays(self, setup: Setup) -> tuple[list[TimedReplay], dict[str, Any]]:
        """What was timed of a policy in a suite, and the stamp of that; maybe nothing."""
        if not self._one("SELECT count(*) FROM sqlite_master WHERE name = 'replays'", []):
            return [], {}  # The file is from before there were any.
        rows = self._base.execute(
            "SELECT replays.*, stamp FROM replays JOIN environments ON environment = id "
            "WHERE suite = ? AND policy = ? ORDER BY round, scene",
            [setup.suite, setup.policy],
        ).fetchall()
        found = []
        for row in rows:
            calls = json.loads(row["calls"])
            columns: dict[str, Any] = {
                name: None if calls.get(name) is None else tuple(calls[name])
                for name in _REPLAY_COLUMNS
            }
            found.append(TimedReplay(row["condition"], row["scene"], row["round"], **columns))
        return found, json.loads(rows[0]["stamp"]) if rows else {}


def _motion(row: sqlite3.Row) -> dict[str, Any] | None:
    return None if row["motion"] is None else json.loads(row["motion"])


def _read_only(folder: Path) -> bool:
    """Whether the file system that holds a folder is mounted read-only."""
    return bool(os.statvfs(folder).f_flag & os.ST_RDONLY)


def _condition_values(condition: Condition) -> tuple[str, float | int | None, str]:
    return condition.method, condition.keep, json.dumps(dict(condition.options))
