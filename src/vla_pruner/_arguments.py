"""Types of command line arguments: what means nothing is refused while the line is read."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from pathlib import Path

from vla_pruner._short import word


def at_least(
    least: float, kind: Callable[[str], float] = int, most: float = math.inf
) -> Callable[[str], float]:
    """The `type` of an argument: a finite number from `least` to `most`, whole with `kind` int."""
    what = "whole number" if kind is int else "number"
    range_ = f"of at least {least}" if most == math.inf else f"of {least} to {most}"

    def read(said: str) -> float:
        try:
            value = kind(said)
        except ValueError:
            value = math.nan
        if not (least <= value <= most and value < math.inf):
            raise argparse.ArgumentTypeError(f"{word(said)} is no {what} {range_}")
        return value

    return read


def above_0(said: str, most: float = math.inf) -> float:
    """The `type` of an argument: a finite number that is more than 0, and at most `most`."""
    try:
        value = float(said)
    except ValueError:
        value = math.nan
    if not (0 < value <= most and value < math.inf):
        up_to = "" if most == math.inf else f" and up to {most:g}"
        raise argparse.ArgumentTypeError(f"{word(said)} is no number above 0{up_to}")
    return value


def ray_address(said: str) -> str:
    """The `type` of an argument: where a Ray cluster is."""
    if not re.fullmatch(r"auto|local|(ray://)?[^\s:/]+:\d{1,5}", said):
        raise argparse.ArgumentTypeError(f"{word(said)} is no HOST:PORT, nor auto")
    return said


def a_path(said: str) -> Path:
    """The `type` of an argument: a file or folder; an empty name would mean the current folder."""
    if not said.strip():
        raise argparse.ArgumentTypeError("the name is empty; name a file or folder (. is this one)")
    return Path(said)
