"""The tiny models of other tests."""

import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path += [str(TESTS / room) for room in ("models", "models/openvla", "models/pi0")]
