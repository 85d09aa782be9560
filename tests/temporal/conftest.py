"""Tests of methods that remember borrow the tiny policies of `tests/models`."""

import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path += [str(TESTS / "models" / room) for room in ("openvla", "pi0")]
