"""The tiny policies of other tests, for what is given to them: folders, images, numbers."""

import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path += [str(TESTS / room) for room in ("models", "models/openvla", "models/pi0")]
