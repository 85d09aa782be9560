"""What callers and files give, checked before anything is worked out: numbers, words, entries."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

MOST = 1 << 24
"""No size of a model is larger; a damaged one would only fill the memory."""


def listed(names: Sequence[str], most: int = 12) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more


def shown(value: Any, most: int = 80) -> str:
    """A value for a message, cut off where it gets long."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."


# -- numbers of a configuration ------------------------------------------------------------------


def whole(name: str, value: Any, least: int = 1, most: int = MOST) -> None:
    """Refuse what is no whole number in `least..most`. Errors: ValueError."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={shown(value)} must be a whole number, at least {least}")
    if value > most:
        raise ValueError(f"{name}={shown(value)} must be at most {most}")


def number(name: str, value: Any, least: float = -math.inf, *, above: float = -math.inf) -> None:
    """Refuse what is no finite number of at least `least`, or above `above`. Errors: ValueError."""
    fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not fits or value < least or value <= above:
        bound = f" above {above:g}" if above > -math.inf else ""
        bound = f" of at least {least:g}" if least > -math.inf else bound
        raise ValueError(f"{name}={shown(value)} must be a finite number{bound}")


def flag(name: str, value: Any) -> None:
    """Refuse what is neither true nor false. Errors: ValueError."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}={shown(value)} must be true or false")


def numbers(name: str, values: Any, size: int | None = None) -> np.ndarray:
    """A flat list of finite numbers as fp64 [n]. Errors: ValueError that says which is wrong."""
    found = _array(values)
    if found is None:
        raise ValueError(f"{name} must be a list of numbers; got {shown(values)}")
    if found.ndim != 1 or (size is not None and len(found) != size):
        wanted = "a flat list" if size is None else f"{size} entries"
        raise ValueError(f"{name} has shape {found.shape}; expected {wanted}")
    if not np.isfinite(found).all():
        wrong = np.flatnonzero(~np.isfinite(found)).tolist()
        raise ValueError(f"{name} is not finite at {wrong}: {shown(found.tolist())}")
    return found


def flags(name: str, values: Any) -> np.ndarray:
    """A flat list of true and false (or 1 and 0) as bool [n]. Errors: ValueError."""
    try:
        found = np.asarray(values)
    except ValueError:  # lists of different lengths
        found = np.empty(0, dtype=object)
    if found.dtype.kind not in "biuf" or found.ndim != 1 or not np.isin(found, (0, 1)).all():
        raise ValueError(f"{name} must be a list of true and false; got {shown(values)}")
    return found.astype(bool)


def _array(values: Any) -> np.ndarray | None:
    """Numbers as fp64; None for anything else (text and truth values are no numbers)."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().double().numpy() if not values.is_complex() else None
    try:
        found = np.asarray(values)
    except (TypeError, ValueError):
        return None
    return found.astype(np.float64) if found.dtype.kind in "fiu" else None


# -- observations --------------------------------------------------------------------------------


def check_state(proprio: Any, size: int) -> np.ndarray:
    """Robot state fp64 [size].

    Errors: TypeError for what holds no numbers, ValueError when it is missing, of another shape or
    not finite.
    """
    if proprio is None:
        raise ValueError(f"this policy reads a robot state: give `proprio` with {size} numbers")
    state = _array(proprio)
    if state is None:
        raise TypeError(f"proprio must be {size} numbers; got {shown(proprio)}")
    if state.shape != (size,):
        raise ValueError(f"proprio has shape {state.shape}; expected ({size},)")
    if not np.isfinite(state).all():
        raise ValueError(f"proprio is not finite: {state.tolist()}")
    return state


def check_instruction(instruction: Any) -> str:
    """A non-empty sentence. Errors: TypeError or ValueError."""
    if not isinstance(instruction, str):
        raise TypeError(
            f"instruction must be a string such as 'pick up the can', got "
            f"{type(instruction).__name__}"
        )
    if not instruction.strip():
        raise ValueError("instruction is empty; say what the robot should do")
    return instruction


def check_keys(observation: Any, known: Sequence[str]) -> None:
    """Refuse what is no dict of known entries with images and an instruction.

    Errors: TypeError, ValueError.
    """
    if not isinstance(observation, Mapping):
        raise TypeError(
            f"an observation is a dict with {', '.join(known)}; got {type(observation).__name__}"
        )
    unknown = sorted(str(key) for key in set(observation) - set(known))
    missing = [key for key in ("images", "instruction") if key not in observation]
    if unknown or missing:
        raise ValueError(
            f"observation has unknown entries {unknown} and lacks {missing}; expected "
            f"{', '.join(known)} (only the first two are always needed)"
        )
