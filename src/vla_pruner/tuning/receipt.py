"""The receipt of a tuning: JSON that says what was measured, of which policy, on which machine.

`vla-pruner serve` takes its ladder of budgets from it, `vla-pruner doctor` checks it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vla_pruner._short import short
from vla_pruner.episodes.condition import ALL_TOKENS, Condition
from vla_pruner.measure.environment import stamp
from vla_pruner.tuning.expectation import shipped_expectation
from vla_pruner.tuning.sources import Source
from vla_pruner.tuning.tune import Row, Tuning

KIND, SCHEMA = "vla-pruner tune", 1
"""What the file calls itself, and the version of its layout; a reader refuses any other."""
_HARDWARE = ("cpu", "threads", "gpu")


@dataclass(frozen=True)
class Rung:
    """One budget of the ladder.

    Args:
        method: name; "none" is all tokens.
        keep: share of the visual tokens, or their number; 1.0 with "none".
        options: of the method.
        p50_ms, p99_ms: of whole calls that drop tokens; None: latency was not measured.
        deviation: mean, in units of the action's spread.
        allowed: whether it is within the receipt's tolerance.
    """

    method: str
    keep: float | int
    p50_ms: float | None
    p99_ms: float | None
    deviation: float
    allowed: bool
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def condition(self) -> Condition:
        """As a condition."""
        keep = None if self.method == ALL_TOKENS else self.keep
        return Condition(self.method, keep, tuple(self.options.items()))


@dataclass(frozen=True)
class Receipt:
    """What a tuning found, as its file says.

    Args:
        policy: name.
        weights: fingerprint of its parameters, see `runs.job.fingerprint`.
        tolerance: largest mean deviation that was asked for.
        recommended: name of a condition.
        ladder: all tokens first, then the recommended method's budgets, most tokens first.
        environment: versions and machine.
        values: everything that is in the file.
    """

    policy: str
    weights: str
    tolerance: float
    recommended: str
    ladder: tuple[Rung, ...]
    environment: Mapping[str, Any]
    values: Mapping[str, Any] = field(repr=False, default_factory=dict)

    @property
    def allowed(self) -> tuple[Rung, ...]:
        """The rungs that a server may use."""
        return tuple(rung for rung in self.ladder if rung.allowed)

    def check(self, weights: str) -> None:
        """Refuse other weights than those that were measured (ValueError)."""
        if weights != self.weights:
            raise ValueError(
                f"the receipt is of {self.policy} with the weights {self.weights}, these are "
                f"{weights}: run `vla-pruner tune` on this policy"
            )

    def differences(self, device: str = "cpu") -> list[str]:
        """What this machine has other than the one that was measured; latencies then differ."""
        now = stamp(device)
        return [
            f"{name} {now[name]} instead of {self.environment.get(name)}"
            for name in _HARDWARE
            if now[name] != self.environment.get(name)
        ]


def receipt_of(
    tuning: Tuning,
    source: Source,
    *,
    policy: str,
    weights: str,
    device: str,
    unnorm_key: str | None,
    seen: str,
) -> dict[str, Any]:
    """The values of the file.

    Args:
        tuning: what was found.
        source: what was replayed.
        policy, weights: whose name and fingerprint.
        device: where it ran.
        unnorm_key: dataset whose statistics scaled the actions.
        seen: where the observations were, for people.
    """
    scale, expectation = tuning.scale, shipped_expectation()
    return {
        "kind": KIND,
        "schema": SCHEMA,
        "policy": {"name": policy, "weights": weights, "unnorm_key": unnorm_key},
        "observations": {
            "kind": source.kind,
            "from": seen,
            "digest": source.digest,
            "episodes": [episode.scene for episode in source.episodes],
            "calls": source.calls,
            "unpruned_from_recorded": tuning.recorded,
        },
        "device": device,
        "environment": stamp(device),
        "execute": scale.execute,
        "spread": scale.spread.tolist(),
        "still": [n for n, moves in enumerate(scale.moving.tolist()) if not moves],
        "gripper": {"dimensions": list(scale.gripper), "threshold": scale.threshold},
        "tolerance": tuning.tolerance,
        "expected_from": {
            "conditions": expectation.conditions,
            "policies": list(expectation.policies),
        },
        "conditions": [_condition(row) for row in tuning.rows],
        "recommended": tuning.recommended.condition.name,
        "ladder": [_rung(row) for row in ladder_rows(tuning)],
    }


def ladder_rows(tuning: Tuning) -> list[Row]:
    """All tokens, then the recommended method's budgets, most tokens first.

    Where nothing but all tokens is allowed, the budgets are those of the first method.
    """
    first = tuning.recommended if tuning.recommended.condition.keep is not None else None
    others = [row for row in tuning.rows if row.condition.keep is not None]
    first = first or (others[0] if others else None)
    same = [
        row
        for row in others
        if first is not None
        and (row.condition.method, row.condition.options)
        == (first.condition.method, first.condition.options)
    ]
    return [tuning.rows[0], *sorted(same, key=lambda row: -row.visual[1])]


def _condition(row: Row) -> dict[str, Any]:
    return {
        "condition": row.condition.name,
        "method": row.condition.method,
        "keep": 1.0 if row.condition.keep is None else row.condition.keep,
        "options": dict(row.condition.options),
        "recipe": row.recipe,
        "deviation": row.deviation.as_dict(),
        "expected_loss": asdict(row.expected),
        "allowed": row.allowed,
        "visual_tokens": row.visual[0],
        "visual_tokens_kept": row.visual[1],
        "flops": row.flops,
        "latency": None if row.latency is None else asdict(row.latency),
    }


def _rung(row: Row) -> dict[str, Any]:
    return {
        "method": row.condition.method,
        "keep": 1.0 if row.condition.keep is None else row.condition.keep,
        "options": dict(row.condition.options),
        "p50_ms": None if row.latency is None else row.latency.p50_ms,
        "p99_ms": None if row.latency is None else row.latency.p99_ms,
        "deviation": row.deviation.mean,
        "allowed": row.allowed,
    }


def save_receipt(values: Mapping[str, Any], path: Path) -> None:
    """Write the file; it appears when it is complete."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(values, indent=1, allow_nan=False) + "\n", "utf-8")
    partial.replace(path)


def load_receipt(path: str | Path) -> Receipt:
    """A receipt from its file, or from the folder that `vla-pruner tune` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no receipt, or one of another schema, or damaged.
    """
    path = Path(path)
    path = path / "receipt.json" if path.is_dir() else path
    try:
        values = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path}: there is no such receipt; `vla-pruner tune` makes one"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON file ({error})") from error
    if not isinstance(values, dict) or values.get("kind") != KIND:
        raise ValueError(f"{path} is no receipt of `vla-pruner tune`")
    if values.get("schema") != SCHEMA:
        raise ValueError(
            f"{path} has schema {short(values.get('schema'))}, this version reads {SCHEMA}; run "
            "`vla-pruner tune` again"
        )
    try:
        found = Receipt(
            policy=_text(values["policy"]["name"]),
            weights=_text(values["policy"]["weights"]),
            tolerance=_number(values["tolerance"]),
            recommended=_text(values["recommended"]),
            ladder=tuple(_read_rung(one) for one in values["ladder"]),
            environment=dict(values["environment"]),
            values=values,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged: {short(error)}; run `vla-pruner tune` again"
        ) from error
    if not found.ladder or found.ladder[0].method != ALL_TOKENS or not found.ladder[0].allowed:
        raise ValueError(f"{path} is damaged: its ladder does not begin with all tokens")
    return found


def _read_rung(values: Mapping[str, Any]) -> Rung:
    if not isinstance(values["allowed"], bool):
        raise ValueError(f"allowed is {short(values['allowed'])}, not true or false")
    rung = Rung(
        method=_text(values["method"]),
        keep=values["keep"],
        options=dict(values.get("options", {})),
        p50_ms=None if values["p50_ms"] is None else _number(values["p50_ms"]),
        p99_ms=None if values["p99_ms"] is None else _number(values["p99_ms"]),
        deviation=_number(values["deviation"]),
        allowed=values["allowed"],
    )
    _number(rung.keep)
    if ":" not in rung.method:  # A file is no reason to import the module of another method.
        rung.condition.build()  # Raises: no such method, option or budget.
    return rung


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{short(value)} is no finite number")
    return float(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{short(value)} is no text")
    return value
