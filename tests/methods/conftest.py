"""The tiny models, and the slow versions, of other tests."""

import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
ROOMS = ("models", "models/openvla", "models/pi0", "pruning", "baselines", "core")
sys.path += [str(TESTS / room) for room in ROOMS]
