"""The tiny policies of the two ports, for tests of what they share."""

import sys
from pathlib import Path

sys.path += [str(Path(__file__).parent / room) for room in ("openvla", "pi0")]
